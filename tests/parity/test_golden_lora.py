"""LoRA against the original PyTorch code: logits and losses, unmerged and merged, and the merged weights."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import Options, load_checkpoint, open_source
from llava_jax.convert.table import keys
from tests.conftest import shared
from tests.parity import float64
from tests.parity.golden_model import (
    GOLDEN,
    LOSS,
    adapters,
    arrays,
    batch_of,
    cases,
    forward,
    lora_cases,
    loss_of,
    right_padded,
    valid_rows,
)

# The adapters' large random weights make some positions so ill-conditioned that any two float32 runs
# differ by more than LOGITS there: a rounding of the last bit of an embedding moves a logit by 1e-4.
# So float64 is the reference of the adapted model, and the original's float32 run the yardstick: ours
# is at most this many times as far from float64, by the largest difference of each case.
AS_FAR = 2


@pytest.mark.parametrize(("model", "adapter", "number"), lora_cases())
def test_lora(model, adapter, number):
    """Unmerged, merged, and the one against the other; losses within LOSS of the golden one."""
    folder = shared(f"{GOLDEN}/{model}")
    case = cases(folder)["lora"]["cases"][number]
    stride, runs = case["logits_column_stride"], {}
    for merge in (False, True):
        checkpoint = load_checkpoint(folder / adapter, allow_pickle=True, merge=merge)
        assert (checkpoint.config.lora is None) == merge
        batch, lengths = batch_of(case, arrays(folder)["images"], checkpoint.config)
        exact = float64.logits(checkpoint.config, float64.added(checkpoint), batch)
        logits = forward(checkpoint.config, checkpoint.params, batch)
        assert abs(golden_loss(logits, case) - case["loss"]) < LOSS
        ours = [row[:n, ::stride] for row, n in zip(np.asarray(logits), lengths, strict=True)]
        runs[merge] = ours, [row[:, ::stride] for row in exact]
    golden = valid_rows(arrays(folder)[f"{case['id']}/logits"], case["new_attention_mask"])
    (unmerged, exact), (merged, exact_merged) = runs[False], runs[True]
    allowed = AS_FAR * float64.distance(golden, exact)
    for ours in (unmerged, merged, exact_merged):
        assert float64.distance(ours, exact) <= allowed
    assert float64.distance(unmerged, merged) <= allowed


def golden_loss(logits, case) -> float:
    rows = valid_rows(np.array(case["new_labels"]), case["new_attention_mask"])
    return float(loss_of(logits, jnp.asarray(right_padded(rows, logits.shape[1]))))


@pytest.mark.parametrize(("model", "adapter"), adapters())
def test_merged_checksums(model, adapter):
    folder = shared(f"{GOLDEN}/{model}")
    source = open_source(folder / adapter, Options(allow_pickle=True, merge=True))
    state = keys.to_theirs(source.leaves, keys.ORIGINAL, source.config)
    for name, (total, absolute) in cases(folder)["lora"]["merged_checksums"].items():
        values = state[name].read().astype(np.float64)
        assert np.abs(values).sum() == pytest.approx(absolute, rel=1e-6), name
        assert values.sum() == pytest.approx(total, abs=1e-6 * absolute), name
