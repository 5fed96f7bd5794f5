"""Greedy answers of randomly made Hugging Face models, token by token. Needs no data."""

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llava_jax.convert import load_checkpoint  # noqa: E402
from llava_jax.generate import Engine, Generator, Job, answer  # noqa: E402
from llava_jax.generate.beam import search  # noqa: E402
from llava_jax.settings import SamplingSettings  # noqa: E402
from llava_jax.text.example import Example  # noqa: E402

IMAGE, VOCAB, STEPS = 90, 96, 24
UNDECIDED = 1e-3  # a smaller gap between the best two logits may fall either way
FAMILIES = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4},
    "grouped": {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True},
    # The window is shorter than the prompts: decoding must forget what lies behind it.
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
}


@functools.cache
def theirs(family: str):
    config = transformers.LlavaConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "eos_token_id": 2,
            **FAMILIES[family],
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 16,
        },
        image_token_index=IMAGE,
        image_seq_length=4,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # their 0.02 gives near-equal logits
            weight += torch.randn_like(weight) * (0.15 if weight.ndim > 1 else 0.05)
            if "lm_head" in name:
                weight[IMAGE] -= 100 * weight[IMAGE]  # the slot's own token is no answer
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(their model, ours from the files that theirs wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs(request.param).save_pretrained(folder)
    checkpoint = load_checkpoint(folder)
    return theirs(request.param), Generator(checkpoint.config, checkpoint.params)


def prompts() -> list[Example]:
    """Different lengths and numbers of images."""
    rng = np.random.default_rng(0)
    made = []
    for length, images in ((14, 1), (5, 2), (30, 0), (3, 1)):
        ids = rng.integers(3, IMAGE, length)
        ids[rng.choice(length, images, replace=False)] = -200
        made.append(Example(ids, tuple(rng.normal(0, 1, (images, 28, 28, 3)).astype(np.float32))))
    return made


def padded_left(given: list[Example]):
    """What their processor makes of the prompts."""
    rows = [np.repeat(p.ids, np.where(p.ids == -200, 4, 1)) for p in given]
    width = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), width), np.int64) for _ in "im")
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = np.where(row == -200, IMAGE, row)
        mask[i, width - len(row) :] = 1
    images = [image.transpose(2, 0, 1) for p in given for image in p.images]
    pixels = {"pixel_values": torch.tensor(np.stack(images))} if images else {}
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **pixels}


def ask(model, given: list[Example]) -> tuple[list[list[int]], list[int]]:
    """Their greedy tokens, and how many steps of each row are decided beyond rounding."""
    inputs = padded_left(given)
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(out.logits).topk(2, -1).values.numpy()  # [steps, B, 2]
    near = best[..., 0] - best[..., 1] < UNDECIDED
    decided = [int(n.argmax()) if n.any() else STEPS for n in near.T]
    rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in rows], decided


def test_each_prompt_alone_and_all_as_one_batch(pair):
    model, own = pair
    given = prompts()
    batch, _ = ask(model, given)
    ours = answer(own, given, SamplingSettings(max_new_tokens=STEPS))
    compared = 0
    for one, mine, in_batch in zip(given, ours, batch):
        (want,), (n,) = ask(model, [one])
        assert list(mine.ids[:n]) == want[:n]
        assert in_batch[:n] == want[:n]  # their own batch agrees, so ours is compared with both
        compared += min(n, len(want))
    assert compared > 2 * STEPS
    (alone,) = answer(own, given[:1], SamplingSettings(max_new_tokens=STEPS))
    assert alone.ids == ours[0].ids


@pytest.mark.parametrize(
    ("beams", "penalty"),
    [(3, 1.0), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((4, 0.0), (2, 2.0)))],
)
def test_beam_search_token_by_token(pair, beams, penalty, request):
    model, own = pair
    if model is not theirs("llama") and not request.config.getoption("--slow"):
        pytest.skip("one family, unless --slow is given")
    for one in prompts()[1:2] if penalty == 1.0 else [prompts()[0], prompts()[2]]:
        with torch.no_grad():
            out = model.generate(
                **padded_left([one]),
                max_new_tokens=STEPS,
                do_sample=False,
                num_beams=beams,
                num_return_sequences=beams,
                length_penalty=penalty,
                early_stopping=False,
                eos_token_id=2,
                pad_token_id=0,
                output_scores=True,
                return_dict_in_generate=True,
            )
        start = len(padded_left([one])["input_ids"][0])
        want = [
            row[: row.index(2) + 1] if 2 in row else row
            for row in out.sequences[:, start:].tolist()
        ]
        engine = Engine(own, beams, keep_logits=True)
        found = search(engine, Job(one, SamplingSettings(max_new_tokens=STEPS)), beams, penalty)
        assert [list(beam.ids) for _, beam in found] == want
        scores = [score for score, _ in found]
        np.testing.assert_allclose(scores, out.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)
