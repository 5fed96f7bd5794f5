"""Cross-entropy at the supervised positions alone.

Logits exist only where a label does: in stage 2 of LLaVA-1.5 that is a small part of the sequence,
so neither the memory nor the time of a [B, T, V] array is spent. The result is exact.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llava_jax.llava import Llava
from llava_jax.text.constants import IGNORE


def supervised_nll(
    model: Llava,
    hidden_GPD: jax.Array,
    targets_GP: jax.Array,
    chunk: int = 256,
    z_loss: float = 0.0,
) -> jax.Array:
    """float32[G, P]: -log p(target) at each supervised position, 0 where targets are -100.

    hidden_GPD: the model's hidden states at `target_at`. Wider P than `chunk` is worked off in pieces
    that are recomputed in the backward pass, so that at most [G, chunk, V] logits live at a time.
    z_loss: weight of the squared log-normalizer that is added to each, which keeps logits from
    drifting (PaLM, arXiv 2204.02311, section 5).
    """
    groups, p = targets_GP.shape

    def nll(hidden, targets):
        logits = model.logits(hidden)
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        loss = log_z - picked
        if z_loss:
            loss += z_loss * log_z**2
        return jnp.where(targets == IGNORE, 0.0, loss)

    if p <= chunk:
        return nll(hidden_GPD, targets_GP)
    pad = -p % chunk
    hidden_GPD = jnp.pad(hidden_GPD, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets_GP, ((0, 0), (0, pad)), constant_values=IGNORE)
    parts = targets.shape[1] // chunk
    pieces = jax.lax.map(
        jax.checkpoint(lambda piece: nll(*piece), prevent_cse=False),
        (
            hidden_GPD.reshape(groups, parts, chunk, hidden_GPD.shape[-1]).swapaxes(0, 1),
            targets.reshape(groups, parts, chunk).swapaxes(0, 1),
        ),
    )
    return pieces.swapaxes(0, 1).reshape(groups, parts * chunk)[:, :p]


def loss_by_file(nll_GP: jax.Array, batch: Mapping[str, jax.Array], files: int) -> jax.Array:
    """float32[2, files]: summed loss and number of the supervised tokens of each data file."""
    held = batch["targets"] != IGNORE
    own_GPF = jax.nn.one_hot(batch["files"], files) * held[..., None]
    return jnp.stack([jnp.einsum("gp,gpf->f", nll_GP, own_GPF), own_GPF.sum((0, 1))])


def mean_loss(nll_GP: jax.Array, targets_GP: jax.Array, groups: int = 1) -> jax.Array:
    """Mean over supervised tokens; with `groups`, the mean of the token means of that many row groups.

    The original averages within each device's micro-batch and then over devices
    (llava/train/train.py under DeepSpeed); groups = its number of devices gives the same number.
    A group without a supervised token counts as 0, where torch gives NaN. Row groups are those of an
    unpacked batch, whose rows are groups of their own.
    """
    # Not -1: a group may have no supervised position at all.
    split = (groups, targets_GP.size // groups)
    count = (targets_GP != IGNORE).reshape(split).sum(-1)
    return jnp.mean(nll_GP.reshape(split).sum(-1) / jnp.maximum(count, 1))
