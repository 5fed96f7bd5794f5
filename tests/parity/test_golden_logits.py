"""The model against the original PyTorch code: logits, losses, gradients of every golden case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import keymap, load_checkpoint
from llava_jax.convert.lazy import of_array, single, stacked_block
from llava_jax.convert.opening import open_source
from llava_jax.convert.source import Options
from llava_jax.llava import binder
from tests.conftest import shared
from tests.parity import float64
from tests.parity.golden_model import (
    GOLDEN,
    arrays,
    batch_of,
    cases,
    load_with,
    models_with,
    numbered,
    valid_rows,
)

LOGITS, LOSS, NORMS, MERGED = 1e-4, 1e-5, 1e-4, 5e-5
# The golden float32 runs end within 12 times what one rounding of the embeddings moves a logit.
ROUNDINGS = 12


def forward(config, params, batch):
    bind = binder(config)

    @jax.jit
    def logits(params, batch):
        model = bind(params)
        return model.logits(model(batch))

    return logits({n: jnp.asarray(p, jnp.float32) for n, p in params.items()}, batch)


def loss_of(logits, labels):
    """Mean cross entropy over the labels that are not -100, shifted by one."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, jnp.maximum(labels, 0)[..., None], -1
    ).squeeze(-1)
    return jnp.where(labels >= 0, nll, 0).sum() / (labels >= 0).sum()


def right_padded(rows, width):
    out = np.full((len(rows), width), -100, np.int32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


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
        logits = forward(config, params | trained, batch)
        return loss_of(logits, jnp.asarray(labels)), logits

    trained = {
        n: jnp.asarray(p, jnp.float32) for n, p in params.items() if not n.startswith("vision.")
    }
    if "grad_norms" not in case:
        value, _ = jax.jit(loss)(trained)
    else:
        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
        check_gradients(grads, case, config)
    # By the forward program alone: XLA fuses the ones with a loss otherwise, and at the worst
    # conditioned positions of these random models that rounding alone can pass 1e-4.
    logits = forward(config, params, batch)
    check_logits(
        logits, lengths, case, arrays(folder)[f"{case['id']}/logits"], case["logits_column_stride"]
    )
    assert abs(float(value) - case["loss"]) < LOSS


def check_gradients(grads, case, config):
    leaves = {}
    for name, g in grads.items():
        lazy = of_array(np.asarray(g))
        leaves[name] = stacked_block(lazy) if ".layers." in name else single(lazy)
    layout = keymap.Layout("trained", "model", "lm_head", "model.mm_projector")
    theirs = {n: t.read() for n, t in keymap.to_theirs(leaves, layout, config).items()}
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


@pytest.mark.parametrize("adapter", ["lora_bin", "lora_safetensors"])
@pytest.mark.parametrize(("model", "number"), numbered("golden.json", "lora", "cases"))
def test_lora(adapter, model, number):
    folder = shared(f"{GOLDEN}/{model}")
    golden = cases(folder)["lora"]
    case = golden["cases"][number]
    both = []
    for merge in (False, True):
        checkpoint = load_checkpoint(folder / adapter, allow_pickle=True, merge=merge)
        assert (checkpoint.config.lora is None) == merge
        batch, lengths = batch_of(case, arrays(folder)["images"], checkpoint.config)
        logits = np.asarray(forward(checkpoint.config, checkpoint.params, batch))
        both.append([row[:n] for row, n in zip(logits, lengths)])
    exact = float64.logits(checkpoint.config, checkpoint.params, batch)
    check_merged(folder / adapter, both, exact, checkpoint, batch)
    stride = case["logits_column_stride"]
    golden = valid_rows(arrays(folder)[f"{case['id']}/logits"], case["new_attention_mask"])
    check_against_golden(both[1], golden, [row[:, ::stride] for row in exact], stride)


def check_merged(folder, both, exact, checkpoint, batch):
    """Merged = unmerged: within MERGED in float64, and in float32 but for its own noise."""
    apart = load_checkpoint(folder, allow_pickle=True)
    for one, other in zip(exact, float64.logits(apart.config, added(apart), batch), strict=True):
        np.testing.assert_allclose(one, other, atol=MERGED, rtol=0)
    noise = float64.rounding_noise(checkpoint.config, checkpoint.params, batch)
    for unmerged, merged, truth, shift in zip(*both, exact, noise, strict=True):
        assert (np.abs(unmerged - merged).max(-1) <= np.maximum(MERGED, ROUNDINGS * shift)).all()
        for ours in (unmerged, merged):
            assert (np.abs(ours - truth).max(-1) <= ROUNDINGS * shift).all()


def added(checkpoint):
    """The kernels with their updates, added in float64."""
    params = {n: np.asarray(p, np.float64) for n, p in checkpoint.params.items()}
    for name in [n.removesuffix(".lora_a") for n in params if n.endswith(".lora_a")]:
        a, b = params[f"{name}.lora_a"], params[f"{name}.lora_b"]
        params[f"{name}.kernel"] += checkpoint.config.lora.scale * np.einsum("lir,lro->lio", a, b)
    return params


def check_against_golden(logits, golden, exact, stride):
    """Within LOGITS of the golden values, or nearer to float64 than they are and xfailed.

    The adapter's large random weights make the positions of case 1 ill-conditioned. At one, a rounding
    of the last bit of the embeddings moves a logit by 1e-4: the golden run is 9e-4 from float64 there,
    transformers' float32 run under six settings 2e-4 to 4e-4 from the golden one, ours 8e-4. At seven
    more of the 85 ours is 1.2e-4 to 1.5e-4 from the golden run. Missing LOGITS is a finding, not a pass.
    """
    off = max(np.abs(a[:, ::stride] - b).max() for a, b in zip(logits, golden, strict=True))
    if off > LOGITS:
        ours = max(np.abs(a[:, ::stride] - b).max() for a, b in zip(logits, exact, strict=True))
        theirs = max(np.abs(a - b).max() for a, b in zip(golden, exact, strict=True))
        assert ours < theirs, "the golden values are nearer to float64 than ours"
        pytest.xfail(f"off by {off:.1e}; from float64 ours is {ours:.1e}, the golden {theirs:.1e}")


@pytest.mark.parametrize("adapter", ["lora_bin", "lora_safetensors"])
@pytest.mark.parametrize("model", models_with("lora_bin"))
def test_merged_checksums(adapter, model):
    folder = shared(f"{GOLDEN}/{model}")
    source = open_source(folder / adapter, Options(allow_pickle=True, merge=True))
    state = keymap.to_theirs(source.leaves, keymap.ORIGINAL, source.config)
    for name, (total, absolute) in cases(folder)["lora"]["merged_checksums"].items():
        values = state[name].read().astype(np.float64)
        assert np.abs(values).sum() == pytest.approx(absolute, rel=1e-6), name
        assert values.sum() == pytest.approx(total, abs=1e-6 * absolute), name


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
    for row, n, theirs in zip(logits, lengths, wanted):
        np.testing.assert_allclose(row[n - 1], theirs, atol=LOGITS, rtol=0)


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
