"""Cross-entropy at the supervised positions alone.

Logits exist only where a label does: in stage 2 of LLaVA-1.5 that is a small part of the sequence,
so neither the memory nor the time of a [B, T, V] array is spent. The result is exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llava_jax.llava import Llava
from llava_jax.text.constants import IGNORE


def supervised_nll(
    model: Llava,
    hidden_BTD: jax.Array,
    target_at_BP: jax.Array,
    targets_BP: jax.Array,
    chunk: int = 256,
) -> jax.Array:
    """float32[B, P]: -log p(target) at each supervised position, 0 where targets are -100.

    Wider P than `chunk` is worked off in pieces that are recomputed in the backward pass, so that
    at most [B, chunk, V] logits live at a time.
    """
    hidden_BPD = jnp.take_along_axis(hidden_BTD, target_at_BP[..., None], axis=1)

    def nll(hidden, targets):
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets == IGNORE, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked)

    p = targets_BP.shape[1]
    if p <= chunk:
        return nll(hidden_BPD, targets_BP)
    pad = -p % chunk
    hidden_BPD = jnp.pad(hidden_BPD, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets_BP, ((0, 0), (0, pad)), constant_values=IGNORE)
    rows, parts = len(targets), targets.shape[1] // chunk
    pieces = jax.lax.map(
        jax.checkpoint(lambda piece: nll(*piece), prevent_cse=False),
        (
            hidden_BPD.reshape(rows, parts, chunk, hidden_BPD.shape[-1]).swapaxes(0, 1),
            targets.reshape(rows, parts, chunk).swapaxes(0, 1),
        ),
    )
    return pieces.swapaxes(0, 1).reshape(rows, parts * chunk)[:, :p]


def mean_loss(nll_BP: jax.Array, targets_BP: jax.Array, groups: int = 1) -> jax.Array:
    """Mean over supervised tokens; with `groups`, the mean of the token means of that many row groups.

    The original averages within each device's micro-batch and then over devices
    (llava/train/train.py under DeepSpeed); groups = its number of devices gives the same number.
    A group without a supervised token counts as 0, where torch gives NaN.
    """
    # Not -1: a group may have no supervised position at all.
    split = (groups, targets_BP.size // groups)
    count = (targets_BP != IGNORE).reshape(split).sum(-1)
    return jnp.mean(nll_BP.reshape(split).sum(-1) / jnp.maximum(count, 1))
