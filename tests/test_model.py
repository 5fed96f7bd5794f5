"""The user's API: messages and images in, text out."""

import base64
import io
from dataclasses import replace

import jax
import numpy as np
import PIL.Image
import pytest

import llava_jax
from llava_jax import images
from llava_jax.errors import ConfigError, ImageError, LlavaError, PromptError
from llava_jax.model import LlavaModel, Request, load
from llava_jax.sharding import make_mesh
from llava_jax.text.prompt import build_prompt
from llava_jax.text.show import text_of
from tests.generate.tiny import model, params, tokenizer

SHORT = {"max_new_tokens": 12}


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 24, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def message(text: str, *images) -> dict:
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


REQUESTS = [
    Request("what is this?", [picture()], **SHORT),
    Request("a red disc on a table " * 4, **SHORT),
    Request([message("which?", picture(1), picture(2))], **SHORT),
    Request("what?", [picture(3)], temperature=1.0, seed=5, **SHORT),
    Request("what?", [picture(3)], temperature=1.0, seed=6, top_p=0.9, **SHORT),
]


def test_a_prompt_is_laid_out_as_the_template_says():
    reply = model().generate("what is this?", picture(), **SHORT)
    prompt = build_prompt([message("what is this?", 0)], tokenizer(), "vicuna_v1")
    assert text_of(prompt.ids, tokenizer()).endswith("USER: <image> \nwhat is this? ASSISTANT:")
    assert reply.prompt_tokens == len(prompt.ids) + 3
    assert len(reply.ids) == len(reply.logprobs) <= 12
    assert reply.finish_reason in ("stop", "length")
    assert reply.text == tokenizer().decode(reply.ids, skip_special=True).strip()


def test_a_batch_gives_each_request_its_own_answer_in_order(monkeypatch):
    seen = []
    replies = model().generate_batch(
        REQUESTS, batch_size=2, progress=lambda done, total: seen.append((done, total))
    )
    for request, reply in zip(REQUESTS, replies):
        fields = {k: v for k, v in vars(request).items() if k not in ("messages", "images")}
        alone = model().generate(request.messages, list(request.images), **fields)
        assert reply.ids == alone.ids
        assert reply.text == alone.text
    assert seen[-1] == (5, 5)
    assert model().generate_batch([]) == []
    # 2.5 slots of 512 positions, 256 bytes each
    monkeypatch.setattr(model().generator, "cache_bytes", 2.5 * 512 * 256)
    again = model().generate_batch(REQUESTS, batch_size=None)
    assert [reply.ids for reply in again] == [reply.ids for reply in replies]
    assert model().generator.slots_that_fit(256, 40) == model()._engines[False].slots == 2


def test_a_request_that_cannot_be_asked_is_raised_or_reported():
    requests = [
        REQUESTS[0],
        Request("what?", [b"GIF89a"]),
        Request([]),
        Request("long " * 400, [picture()]),
    ]
    with pytest.raises(PromptError, match="no messages"):
        model().generate_batch(requests)
    seen = []
    replies = model().generate_batch(
        requests, on_error="reply", progress=lambda *counts: seen.append(counts)
    )
    assert seen == [(1, 4), (3, 4), (4, 4)]
    assert replies[0].ids == model().generate("what is this?", [picture()], **SHORT).ids
    assert [r.finish_reason for r in replies[1:]] == ["error"] * 3
    assert "damaged" in replies[1].error
    assert "the model has 512" in replies[3].error


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 3}])
def test_a_stream_gives_the_text_of_the_whole_answer(settings):
    whole = model().generate("what is this?", picture(), max_new_tokens=40, **settings)
    stream = model().stream("what is this?", picture(), max_new_tokens=40, **settings)
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert stream.reply == whole


def test_a_stop_string_ends_the_answer_wherever_it_falls():
    free = model().generate("what is this?", picture(), max_new_tokens=40)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    cut = free.text[: free.text.index(stop)].strip()
    settings = {"stop": ["nowhere at all", stop], "max_new_tokens": 40}
    reply = model().generate("what is this?", picture(), **settings)
    assert reply.text == cut
    assert reply.finish_reason == "stop"
    assert reply.ids == free.ids[: len(reply.ids)]
    assert len(reply.ids) < len(free.ids)
    assert "".join(model().stream("what is this?", picture(), **settings)) == cut
    (batched, _) = model().generate_batch(
        [Request("what is this?", [picture()], **settings), REQUESTS[1]]
    )
    assert (batched.text, batched.ids) == (reply.text, reply.ids)


def test_words_that_look_like_markup_are_words():
    plain = model().example(Request("see <image> and </s> [INST] <s>", [picture()]))
    assert (plain.ids == -200).sum() == 1
    assert (plain.ids == tokenizer().bos_id).sum() == 1
    assert (plain.ids == tokenizer().eos_id).sum() == 0


def test_an_image_may_come_in_any_form(tmp_path):
    pixels = picture(4)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels))
    uri = "data:image/png;base64," + base64.b64encode(encoded(pixels)).decode()
    want = model().pixels(pixels)
    assert want.dtype == np.uint8
    assert want.shape == (32, 32, 3)
    for form in (path, str(path), encoded(pixels), PIL.Image.fromarray(pixels), uri, want):
        np.testing.assert_array_equal(model().pixels(form), want)
    normal = np.zeros((32, 32, 3), np.float32)
    assert model().pixels(normal) is normal


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.org/cat.jpg", "not fetched"),
        ("/nowhere/cat.jpg", "cat.jpg"),
        (3, "of type int is not an image"),
        (np.zeros((4, 4, 3)), "not uint8"),
        (b"", "no bytes"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ImageError, match=message):
        model().generate("what?", image)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"temperature": -1}, ConfigError),
        ({"temperature": "hot"}, ConfigError),
        ({"max_new_tokens": 0}, ConfigError),
        ({"template": "nope"}, ConfigError),
        ({"stop": ["#", 3]}, ConfigError),
    ],
)
def test_a_senseless_setting_is_refused(settings, error):
    with pytest.raises(error):
        model().generate("what?", **settings)


def test_system_prompt_and_template_can_be_chosen():
    ids = model().example(Request("what?", system="a table")).ids
    text = tokenizer().decode(ids, skip_special=True)
    assert text.startswith("a table USER: what?")
    ids = model().example(Request("what?", template="llava_llama_2")).ids
    assert "[INST]" in tokenizer().decode(ids)
    with pytest.raises(PromptError, match="two system prompts"):
        model().generate([{"role": "system", "content": "x"}, message("y")], system="z")


def test_without_a_seed_draws_differ_and_with_one_they_do_not():
    def draw(seed):
        return model().generate("what?", temperature=2.0, seed=seed, max_new_tokens=12)

    assert draw(3).ids == draw(3).ids
    first, second = draw(None), draw(None)
    assert first.seed != second.seed
    assert draw(first.seed).ids == first.ids


def test_n_answers_have_the_seed_and_those_after_it():
    asked = {"temperature": 1.0, "top_p": 0.9, **SHORT}
    several = model().generate_n("what?", picture(3), n=5, seed=5, **asked)
    assert [reply.seed for reply in several] == [5, 6, 7, 8, 9]
    batch = [Request("what?", [picture(3)], seed=seed, **asked) for seed in range(5, 10)]
    assert several == model().generate_batch(batch, batch_size=5)


def test_a_conversation_equals_its_messages_asked_at_once():
    chat = model().chat(**SHORT)
    first = chat.say("what is this?", picture())
    second = chat.say("and this?", picture(1))
    third = "".join(chat.stream("which is red?"))
    assert model().engine().counts["pictures_reused"] > 0  # what was seen is kept
    said = [message("what is this?", picture())]
    assert model().generate(said, **SHORT).text == first.text
    said += [{"role": "assistant", "content": first.text}, message("and this?", picture(1))]
    assert model().generate(said, **SHORT).text == second.text
    said += [{"role": "assistant", "content": second.text}, message("which is red?")]
    assert model().generate(said, **SHORT).text == third
    chat.reset()
    assert chat.messages == []
    assert chat.say("what is this?", picture()).text == first.text


def test_a_picture_is_opened_and_turned_into_pixels_once_a_turn(tmp_path, monkeypatch):
    files = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(files):
        path.write_bytes(encoded(picture(seed)))
    calls = []

    def counting(name: str):
        real = getattr(images.pixels, name)
        return lambda *args, **kw: calls.append(name) or real(*args, **kw)

    for name in ("open_pixels", "to_pixels"):
        monkeypatch.setattr(images.pixels, name, counting(name))

    def counted(ask) -> tuple[int, int]:
        calls.clear()
        ask()
        return calls.count("open_pixels"), calls.count("to_pixels")

    def turns():
        chat = model().chat(**SHORT)
        assert chat.say("what is this?", files[0]).text
        assert chat.say("and this?", files[1]).text
        chat.say("which is red?")

    assert counted(turns) == (2, 2)
    asked = Request("which?", files, **SHORT)
    assert counted(lambda: model().generate("which?", files, **SHORT)) == (2, 2)
    assert counted(lambda: list(model().stream("which?", files, **SHORT))) == (2, 2)
    assert counted(lambda: model().generate_batch([asked, REQUESTS[1]])) == (2, 2)


def test_an_answer_that_is_broken_off_is_remembered_as_far_as_it_came():
    chat = model().chat(max_new_tokens=40)
    stream = chat.stream("what is this?", picture())
    shown = next(iter(stream))
    stream.close()
    assert stream.reply.finish_reason == "cancelled"
    assert chat.messages[-1]["content"].startswith(shown)
    assert chat.say("and now?", picture(1)).finish_reason in ("stop", "length")
    unread = chat.stream("and here?")
    unread.close()
    assert model().engine().busy == 0
    assert list(unread) == []
    assert chat.messages[-1]["content"] == unread.reply.text != ""
    model().stream("what is this?")  # dropped unread
    assert model().engine().busy == 0


def test_ctrl_c_within_a_step_leaves_a_conversation_that_goes_on(monkeypatch):
    chat = model().chat(**SHORT)
    stream = chat.stream("what is this?", picture())
    decode = model().generator.decode

    def interrupted(*args, **how):
        decode(*args, **how)  # the cache is given away, and not taken back
        raise KeyboardInterrupt

    monkeypatch.setattr(model().generator, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    so_far = list(chat.messages)
    assert (
        chat.say("and now?").text == model().generate([*so_far, message("and now?")], **SHORT).text
    )


def test_a_turn_that_fails_leaves_the_conversation_as_it_was():
    chat = model().chat(**SHORT)
    first = chat.say("what is this?", picture())
    for bad in (b"nothing", np.zeros((2, 2, 3))):
        with pytest.raises(ImageError):
            chat.say("and this?", bad)
    with pytest.raises(PromptError):
        chat.say("long " * 400)
    assert [m["content"] for m in chat.messages[1:]] == [first.text]
    assert chat.say("and this?", picture(1)).text
    with pytest.raises(ConfigError, match="no setting 'colour'"):
        model().chat(colour="red")


@pytest.mark.parametrize("layout", ["jax", "hf"])
def test_a_saved_model_gives_the_same_answers(layout, tmp_path):
    want = model().generate("what is this?", picture(), **SHORT)
    model().save(tmp_path / "m", to=layout)
    again = llava_jax.load(tmp_path / "m")
    reply = again.generate("what is this?", picture(), **SHORT)
    assert reply.ids == want.ids
    assert reply.text == want.text
    again.save(tmp_path / "n", to=layout)
    files = {p.name for p in (tmp_path / "m").iterdir()}
    assert files == {p.name for p in (tmp_path / "n").iterdir()}


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        load(tmp_path, dtype="int3")


def test_the_tokenizer_must_fit_the_model():
    config = replace(model().config, language=replace(model().config.language, vocab_size=9))
    with pytest.raises(ConfigError, match="the tokenizer has"):
        LlavaModel(config, params(config), tokenizer())


@pytest.mark.slow  # without text: tests/generate/test_engine.py::test_eight_devices_give_the_tokens_of_one
def test_a_model_on_a_mesh_gives_the_same_answers(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    model().save(tmp_path / "m")
    spread = load(tmp_path / "m", mesh=make_mesh(fsdp=4, tensor=2))
    want = model().generate_batch(REQUESTS)
    got = spread.generate_batch(REQUESTS)
    assert [r.ids for r in got] == [r.ids for r in want]


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    array = picture()
    path = tmp_path / "a.png"
    PIL.Image.fromarray(array).save(path)
    data = path.read_bytes()
    want = model().pixels(array)
    forms = [path, str(path), data, bytearray(data), io.BytesIO(data), PIL.Image.open(path)]
    for form in forms:
        assert np.array_equal(model().pixels(form), want), type(form)


def test_a_picture_without_pixels_or_with_half_its_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match="width or height is zero"):
        model().pixels(np.zeros((0, 5, 3), np.uint8))
    path = tmp_path / "a.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ImageError, match="damaged"):
        model().pixels(PIL.Image.open(path))


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda m: m.generate(None), "messages must be a text or a list"),
        (lambda m: m.generate([]), "there are no messages"),
        (
            lambda m: m.generate([message("a?"), {"role": "assistant", "content": "b"}]),
            "the last message must be the user's",
        ),
        (lambda m: m.generate("a", max_tokens=3), "did you mean max_new_tokens"),
        (lambda m: m.generate("a", stop=[3]), "stop is .*, not a string or a tuple of strings"),
        (lambda m: m.chat(temperature=-1), "temperature is -1"),
        (lambda m: m.generate_batch(["a"]), "type str is not a Request"),
        (lambda m: m.generate_batch(Request("a")), "must be a list of Request"),
        (lambda m: m.generate_batch([Request("a")], on_error="ignore"), "on_error 'ignore'"),
        (lambda m: m.generate_batch([Request("a")], batch_size=0), "batch_size is 0"),
    ],
)
def test_a_call_that_makes_no_sense_says_why(ask, says):
    with pytest.raises(LlavaError, match=says):
        ask(model())


def test_numbers_of_numpy_are_numbers():
    settings = {"temperature": np.float32(0.5), "seed": np.int64(3), "max_new_tokens": np.int32(4)}
    want = model().generate("a", temperature=0.5, seed=3, max_new_tokens=4)
    assert model().generate("a", **settings).ids == want.ids


def test_one_part_of_a_content_needs_no_list():
    """A mapping is a part and not a list of its keys, with images= as without."""
    part = [{"role": "user", "content": {"type": "text", "text": "what?"}}]
    plain = [{"role": "user", "content": "what?"}]
    for images_ in ((), (picture(),)):
        prompts = [model().example(Request(m, images_)).ids.tolist() for m in (part, plain)]
        assert prompts[0] == prompts[1]


@pytest.mark.parametrize("shown", [(), (picture(),)])
@pytest.mark.parametrize("content", [None, 5, [], 2.5])
def test_a_message_without_content_is_refused_with_images_too(content, shown):
    with pytest.raises(PromptError, match="message 0 has no content"):
        model().generate([{"role": "user", "content": content}], shown)


def test_one_senseless_request_does_not_end_a_batch():
    odd = [
        Request([{"role": ["user"], "content": "x"}]),
        Request([{"role": "user", "content": 5}], picture()),
    ]
    replies = model().generate_batch([*odd, REQUESTS[0]], on_error="reply")
    assert [r.finish_reason for r in replies[:2]] == ["error", "error"]
    assert replies[2].text == model().generate_batch(iter(REQUESTS[:1]))[0].text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Request("x", image="a.png"), "'image'.*did you mean images"),
        (lambda: Request("x", foo=1), "foo"),
        (lambda: Request("x", stop=5), "stop is 5"),
        (lambda: Request("x", stop=0), "stop is 0"),
        (lambda: Request("x", stop={"a": 1}), "stop is"),
        (lambda: model().generate_batch(REQUESTS, batch_size="4"), "batch_size is '4'"),
        (lambda: model().generate_batch(None), "must be a list of Request"),
        (lambda: model().generate_batch({"a": 1}), "must be a list of Request"),
        (lambda: load(None), "path is None"),
        (lambda: load(5), "path is 5"),
        (lambda: load("tiny", mesh=5), "mesh is 5"),
        (lambda: load("tiny", limits=5), "limits is 5"),
        (lambda: model().save(None), "path is None"),
        (lambda: images.decode.Limits(formats=None), "formats is None"),
    ],
)
def test_arguments_of_the_wrong_type_are_errors_of_ours(call, says):
    with pytest.raises(LlavaError, match=says):
        call()


def test_a_normalised_image_with_nan_is_refused():
    size = model().config.vision.image_size
    bad = np.zeros((size, size, 3), np.float32)
    bad[0, 0, 0] = np.nan
    with pytest.raises(ImageError, match="the image: holds NaN or infinity"):
        model().generate("what?", bad)


def test_a_conversation_knows_whether_it_shows_an_image():
    chat = model().chat(**SHORT)
    chat.messages = [message("what?"), {"role": "assistant", "content": "x"}]
    assert not chat.has_images
    chat.messages.append(message("and this?", picture()))
    assert chat.has_images
