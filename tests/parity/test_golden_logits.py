"""The model against the original PyTorch code: logits, losses, gradients of every golden case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.convert.io.lazy import leaf, of_array
from llava_jax.convert.table import keys
from llava_jax.llava import binder
from tests.conftest import shared
from tests.parity.golden_model import (
    GOLDEN,
    LOSS,
    arrays,
    batch_of,
    cases,
    column_stride,
    forward,
    load_with,
    loss_of,
    models_with,
    numbered,
    right_padded,
    valid_rows,
)

LOGITS, NORMS = 1e-4, 1e-4


def check_logits(logits, lengths, case, golden, stride):
    wanted = valid_rows(golden, case.get("new_attention_mask", case.get("attention_mask")))
    for ours, n, theirs in zip(np.asarray(logits), lengths, wanted):
        if case.get("new_attention_mask") is None:
            theirs = theirs[:n] if len(theirs) > n else theirs
        assert len(theirs) == n
        np.testing.assert_allclose(ours[:n, ::stride], theirs, atol=LOGITS, rtol=0)


@pytest.mark.parametrize(("model", "number"), numbered("golden.json", "cases"))
def test_case(model, number, tmp_path):
    folder = shared(f"{GOLDEN}/{model}")
    case = cases(folder)["cases"][number]
    checkpoint = load_with(folder / "llava", case["config"], tmp_path)
    config, params = checkpoint.config, checkpoint.params
    batch, lengths = batch_of(case, arrays(folder)["images"], config)
    labels = right_padded(
        valid_rows(np.array(case["new_labels"]), case["new_attention_mask"]),
        batch["tokens"].shape[1],
    )

    def loss(trained):
        return loss_of(forward(config, params | trained, batch), jnp.asarray(labels))

    # By the forward program alone: XLA fuses the ones with a loss otherwise, and at the worst
    # conditioned positions of these random models that rounding alone can pass 1e-4.
    logits = forward(config, params, batch)
    value = loss_of(logits, jnp.asarray(labels))
    if "grad_norms" in case:
        trained = {
            n: jnp.asarray(p, jnp.float32) for n, p in params.items() if not n.startswith("vision.")
        }
        value, grads = jax.jit(jax.value_and_grad(loss))(trained)
        check_gradients(grads, case, config)
    check_logits(
        logits, lengths, case, arrays(folder)[f"{case['id']}/logits"], case["logits_column_stride"]
    )
    assert abs(float(value) - case["loss"]) < LOSS


def check_gradients(grads, case, config):
    leaves = {}
    for name, g in grads.items():
        leaves[name] = leaf(name, of_array(np.asarray(g)))
    layout = keys.Layout("trained", "model", "lm_head", "model.mm_projector")
    theirs = {n: t.read() for n, t in keys.to_theirs(leaves, layout, config).items()}
    assert set(case["grad_norms"]) <= set(theirs)
    for name, norm in case["grad_norms"].items():
        ours = float(np.linalg.norm(theirs[name].astype(np.float64)))
        assert ours == pytest.approx(norm, rel=NORMS, abs=1e-7), name
        first = theirs[name].reshape(-1)[:8]
        np.testing.assert_allclose(
            first, case["grad_first8"][name], rtol=1e-3, atol=1e-5 * max(norm, 1e-3)
        )


@pytest.mark.parametrize("model", models_with())
def test_tower_and_projector(model):
    folder = shared(f"{GOLDEN}/{model}")
    checkpoint, data = load_checkpoint(folder / "llava", allow_pickle=True), arrays(folder)
    params = {n: jnp.asarray(p, jnp.float32) for n, p in checkpoint.params.items()}
    llava = binder(checkpoint.config)(params)
    features = llava.image_features(jnp.asarray(data["images"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(features, data["vision/tower_output"], 1e-5, 1e-5)
    np.testing.assert_allclose(llava.projector(features), data["vision/projected"], 1e-5, 1e-5)


@pytest.mark.parametrize(("model", "number"), numbered("hf_golden.json", "cases"))
def test_hugging_face(model, number):
    folder = shared(f"{GOLDEN}/{model}")
    golden = cases(folder, "hf_golden.json")
    case, images = golden["cases"][number], arrays(folder)["images"]
    checkpoint = load_checkpoint(folder / "hf")
    config = checkpoint.config
    batch, lengths = hf_batch(case, images, golden["image_token_index"], config)
    logits = forward(config, checkpoint.params, batch)
    wanted = arrays(folder, "hf_golden.npz")[f"hf{case['id']}/logits"]
    check_logits(logits, lengths, case, wanted, case["logits_column_stride"])
    mask = case["attention_mask"]
    labels = right_padded(valid_rows(np.array(case["labels"]), mask), batch["tokens"].shape[1])
    assert abs(float(loss_of(logits, jnp.asarray(labels))) - case["loss"]) < LOSS


@pytest.mark.parametrize("model", models_with("hf_golden.json"))
def test_hugging_face_left_padded_batch(model):
    folder = shared(f"{GOLDEN}/{model}")
    golden = cases(folder, "hf_golden.json")
    case, checkpoint = golden["generate_batch_left"], load_checkpoint(folder / "hf")
    batch, lengths = hf_batch(
        case, arrays(folder)["images"], golden["image_token_index"], checkpoint.config
    )
    logits = np.asarray(forward(checkpoint.config, checkpoint.params, batch))
    wanted = arrays(folder, "hf_golden.npz")["left/last_logits"]
    told = [c.get("logits_column_stride") for c in (case, *golden["cases"])]
    stride = column_stride(wanted.shape[-1], logits.shape[-1], *told)
    for row, n, theirs in zip(logits, lengths, wanted, strict=True):
        np.testing.assert_allclose(row[n - 1, ::stride], theirs, atol=LOGITS, rtol=0)


def hf_batch(case, images, image_id, config):
    """A case whose image is a run of `image_id`, as one whose image is one -200."""
    rows, used = [], iter(case["image_index"])
    index = []
    for ids, mask in zip(case["input_ids"], case["attention_mask"]):
        row, run = [], 0
        for token in np.array(ids)[np.array(mask, bool)]:
            run = run + 1 if token == image_id else 0
            if token != image_id:
                row.append(int(token))
            elif run % config.image_tokens == 1:
                row.append(-200)
        rows.append(row)
        count = row.count(-200)
        index += [next(used) for _ in range(count)] or [0]
    assert next(used, None) is None
    return batch_of({"input_ids": rows, "image_index": index}, images, config)
