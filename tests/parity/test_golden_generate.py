"""Greedy answers of the original PyTorch code, token by token."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.generate import Generator, answer
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example
from tests.conftest import shared
from tests.parity.golden_model import GOLDEN, arrays, cases, models_with

UNDECIDED = 1e-3  # a smaller gap between the best two logits may fall either way


@functools.cache
def generator(model: str, name: str = "llava") -> Generator:
    checkpoint = load_checkpoint(
        shared(f"{GOLDEN}/{model}") / name, allow_pickle=True, dtype="fp32"
    )
    params = {n: jnp.asarray(p) for n, p in checkpoint.params.items()}
    return Generator(checkpoint.config, params)


def prompts(model: str, rows, image_index, image_id: int | None = None) -> list[Example]:
    """Golden rows of ids as prompts; `image_id` stands for each feature of an image (HF's way)."""
    pictures = arrays(shared(f"{GOLDEN}/{model}"))["images"].transpose(0, 2, 3, 1)
    features = generator(model).config.image_tokens
    index, made = iter(image_index), []
    for row in rows:
        row = np.array(row)
        if image_id is not None:
            widths = np.where(row == image_id, 1 / features, 1)
            ends = np.floor(np.cumsum(widths) + 1e-6)
            row = np.where(row == image_id, -200, row)[np.diff(ends, prepend=0) > 0]
        count = int((row == -200).sum())
        made.append(Example(row, tuple(pictures[next(index)] for _ in range(count))))
    return made


def decided(margins) -> int:
    """Steps before the first near tie."""
    return next((i for i, gap in enumerate(margins) if gap < UNDECIDED), len(margins))


@pytest.mark.parametrize("model", models_with())
def test_each_prompt_alone(model):
    folder = shared(f"{GOLDEN}/{model}")
    for i, case in enumerate(cases(folder)["generate"]):
        (one,) = prompts(model, [case["input_ids"]], case["image_index"])
        sampling = SamplingSettings(max_new_tokens=case["max_new_tokens"])
        (out,) = answer(generator(model), [one], sampling, keep_logits=True)
        n = decided(case["margins"])
        assert list(out.ids[:n]) == case["output_ids"][1 : n + 1]
        named = f"{case['id']}/scores" in arrays(folder)
        scores = arrays(folder)[f"{case['id'] if named else f'gen{i}'}/scores"][:n]
        ours = np.stack(out.logits)[:n, :: case["scores_column_stride"]]
        np.testing.assert_allclose(ours, scores, atol=1e-4)


@pytest.mark.parametrize("model", models_with())
def test_one_batch(model):
    golden = cases(shared(f"{GOLDEN}/{model}"))
    batch = golden["generate_batch_left"]
    rows = [next(c for c in golden["generate"] if c["id"] == i) for i in batch["of"]]
    images = [i for c in rows for i in c["image_index"]]
    given = prompts(model, [c["input_ids"] for c in rows], images)
    longest = max(c["max_new_tokens"] for c in rows)
    outputs = answer(generator(model), given, SamplingSettings(max_new_tokens=longest))
    for out, case, ids in zip(outputs, rows, batch["output_ids"], strict=True):
        n = decided(case["margins"])
        assert list(out.ids[:n]) == ids[1 : n + 1]


@pytest.mark.parametrize("model", models_with("hf_golden.json"))
def test_the_same_weights_in_hugging_face_s_format(model):
    folder = shared(f"{GOLDEN}/{model}")
    golden = cases(folder, "hf_golden.json")
    own, image_id = generator(model, "hf"), golden["image_token_index"]
    for case in golden["generate"]:
        (one,) = prompts(model, [case["input_ids"]], case["image_index"], image_id)
        (out,) = answer(own, [one], SamplingSettings(max_new_tokens=len(case["new_ids"])))
        n = decided(case["margins"])
        assert list(out.ids[:n]) == case["new_ids"][:n]


@pytest.mark.parametrize("model", models_with("hf_golden.json"))
def test_a_batch_in_hugging_face_s_format(model):
    """As far as the margins decide, which are known of the same prompts alone."""
    golden = cases(shared(f"{GOLDEN}/{model}"), "hf_golden.json")
    batch, image_id = golden["generate_batch_left"], golden["image_token_index"]
    margins = {c["id"]: c["margins"] for c in golden["generate"]}
    rows = [
        np.array(ids)[np.array(mask, bool)]
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"])
    ]
    given = prompts(model, rows, batch["image_index"], image_id)
    sampling = SamplingSettings(max_new_tokens=max(map(len, batch["new_ids"])))
    outputs = answer(generator(model, "hf"), given, sampling)
    for name, out, ids in zip(batch["of"], outputs, batch["new_ids"], strict=True):
        n = decided(margins[name])
        assert list(out.ids[:n]) == ids[:n]
