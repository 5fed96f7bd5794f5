"""What transformers makes of an exported folder: nothing missing, same pixels, ids and answers."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_jax.convert import Target, convert, load_checkpoint, open_source
from llava_jax.convert.probe import jax_answer, torch_answer
from llava_jax.text.constants import IM_END, IM_START
from llava_jax.text.prompt import build_prompt
from llava_jax.text.tokenizer import Tokenizer
from tests.convert import tiny

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is  this? 図"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red disc"}]},
    {"role": "user", "content": [{"type": "text", "text": "left of what?"}]},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer = tiny.tokenizer(folder / "tokenizer")
    source = tiny.save(folder / "jax", "jax", tiny.TEXT, tokenizer=tokenizer)
    convert(source, folder / "hf", Target("hf"))
    return folder / "hf"


def test_every_weight_is_found(exported):
    model, found = transformers.LlavaForConditionalGeneration.from_pretrained(
        exported, output_loading_info=True
    )
    assert not any(found.values()), found
    assert model.config.image_token_index == 320
    assert model.config.pad_token_id == 321


@pytest.mark.parametrize("layout", ["hf5", "hf4_memory", "hf5_memory"])
def test_other_layouts_load_too(layout, tmp_path):
    folder = tiny.save(tmp_path / "a", "hf", layout=layout)
    _, found = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(found.values()), found


def test_prompt_and_pixels_are_ours(exported):
    from llava_jax.images.pixels import normalize, to_pixels

    processor = transformers.AutoProcessor.from_pretrained(exported)
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (31, 57, 3), dtype=np.uint8), "RGB"
    )
    text = processor.apply_chat_template(CHAT, add_generation_prompt=True)
    theirs = processor(images=image, text=text, return_tensors="pt")
    config = load_checkpoint(exported).config
    vision = config.vision
    pixels = normalize(to_pixels(image, config), vision.image_mean, vision.image_std)
    assert np.array_equal(pixels.transpose(2, 0, 1), theirs["pixel_values"][0].numpy())

    tokenizer = Tokenizer.load(exported.parent / "jax")
    parts = tokenizer.split_markup(text.replace("<image> \n", "<image>\n"), image_tags=True)
    ours = []
    for token in tokenizer.encode_parts(parts):
        ours += [320] * config.image_tokens if token == -200 else [token]
    assert theirs["input_ids"][0].tolist() == ours


@pytest.mark.parametrize("legacy", [False, True])
def test_tokens_around_images_are_ours(exported, legacy, tmp_path):
    """mm_use_im_start_end, of both kinds of tokenizer."""
    tokenizer = Tokenizer.load(exported.parent / "tokenizer", legacy=legacy)
    tokenizer = tokenizer.with_tokens([IM_START, IM_END])
    tokenizer.save(tmp_path / "tokenizer")
    config = replace(tiny.TEXT, language=replace(tiny.TEXT.language, vocab_size=322))
    config = replace(config, use_im_start_end=True, tokenizer_legacy=legacy)
    tiny.save(tmp_path / "hf", "hf", config, tokenizer=tmp_path / "tokenizer")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    image = {"type": "image", "image": Image.new("RGB", (9, 5))}
    for content in (CHAT[0]["content"], [image, image, CHAT[0]["content"][1]]):
        asked = [{"role": "user", "content": content}, *CHAT[1:]]
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        pictures = [image["image"]] * text.count("<image>")
        theirs = processor(images=pictures, text=text)["input_ids"][0]
        given = [image if part["type"] == "image" else part for part in content]
        prompt = build_prompt(
            [{"role": "user", "content": given}, *CHAT[1:]], tokenizer, use_im_start_end=True
        )
        ours = []
        for token in prompt.ids:
            ours += [322] * config.image_tokens if token == -200 else [int(token)]
        assert list(theirs) == ours
    shutil.rmtree(tmp_path / "hf/llava_jax")  # as another program would read it
    assert open_source(tmp_path / "hf").config.template == "vicuna_v1"


def test_generate_is_handed_nothing_it_refuses(exported):
    """transformers 4 would add token_type_ids by itself, and its generate raises at them."""
    settings = json.loads((exported / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    processor = transformers.AutoProcessor.from_pretrained(exported)
    inputs = processor(images=Image.new("RGB", (9, 5)), text="<image> a", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}


def test_generate_gives_our_tokens(exported):
    source = open_source(exported)
    logits, tokens = jax_answer(source)
    theirs, answer = torch_answer(source)
    np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)
    assert tokens == answer


def test_greedy_text_of_the_whole_pipeline(exported):
    """Folder, processor and chat template through transformers; the same folder through `load`."""
    import llava_jax

    image = Image.fromarray(
        np.random.default_rng(1).integers(0, 256, (40, 25, 3), dtype=np.uint8), "RGB"
    )
    processor = transformers.AutoProcessor.from_pretrained(exported)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(exported).eval()
    text = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
    reply = llava_jax.load(exported.parent / "jax").generate(
        CHAT[0]["content"][1]["text"], image, max_new_tokens=12, temperature=0.0
    )
    assert list(reply.ids) == theirs


def test_a_checkpoint_of_transformers_comes_back(tmp_path):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            image_size=28, patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        ),
        image_token_index=80,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).bfloat16()
    model.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", Target("jax"))
    convert(tmp_path / "b", tmp_path / "c", Target("hf"))
    tiny.same_tensors(tmp_path / "a", tmp_path / "c")
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "c")
    for (name, x), (_, y) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(x, y), name


def test_chat_template_of_the_source_is_not_passed_on(exported, tmp_path):
    path = exported / "chat_template.jinja"
    kept = path.read_text()
    path.write_text("{{ cycler.__init__.__globals__.os.system('touch canary') }}")
    try:
        convert(exported, tmp_path / "b", Target("hf"))
    finally:
        path.write_text(kept)
    assert (tmp_path / "b/chat_template.jinja").read_text() == kept
