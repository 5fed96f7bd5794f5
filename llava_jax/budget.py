"""Token budgets: fewer features of an image for the decoder, chosen or merged without any training.

Every rule gives one static number of features, in the order in which they stand in the image except for
VisionZip's merged ones, which its authors put last, and says where among the S features that it was given
each is from. Sources: VisionZip, arXiv 2412.04467, dvlab-research/VisionZip @ 3151f6d,
visionzip/clip_encoder.py; DivPrune, arXiv 2503.02175, vbdi/divprune @ 799e2d9, llava/model/llava_arch.py.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_exact = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def _pick(x_MSD: jax.Array, at_MT: jax.Array) -> jax.Array:
    """Rows of each image -> [M, T, D]."""
    return jnp.take_along_axis(x_MSD, at_MT[..., None], axis=1)


def merged_of(tokens: int) -> int:
    """How many of a VisionZip budget are merged: 10 of 64, as its authors' 192, 128 and 64 have it."""
    return max(1, tokens * 10 // 64)


def visionzip(
    states_MSD: jax.Array, looked_MS: jax.Array, keys_MSH: jax.Array, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """(dtype[M, tokens, D], places int32[M, tokens]): the class token, the features that it looks at
    most, and of the others every n-th with the mean of those whose keys are nearest to it added.

    looked_MS: the class token's attention, summed over heads. keys_MSH: of the same layer, their mean.
    """
    m, s, _ = states_MSD.shape
    merged = merged_of(tokens)
    first = tokens - merged
    top = jax.lax.top_k(looked_MS[:, 1:], first - 1)[1] + 1
    chosen = jnp.zeros((m, s), bool).at[:, 0].set(True).at[jnp.arange(m)[:, None], top].set(True)
    order = jnp.argsort(~chosen, axis=1, stable=True)  # the chosen in their order, then the others
    rest = order[:, first:]  # [M, R]
    every = np.arange(merged) * (rest.shape[1] // merged)
    target, other = rest[:, every], rest[:, np.delete(np.arange(rest.shape[1]), every)]
    keys = keys_MSH.astype(jnp.float32)
    keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
    near = _exact("moh,mth->mot", _pick(keys, other), _pick(keys, target))
    joins = jax.nn.one_hot(near.argmax(-1), merged)  # [M, O, T]
    total = _exact("mot,mod->mtd", joins, _pick(states_MSD, other).astype(jnp.float32))
    mean = total / jnp.maximum(joins.sum(1), 1)[..., None]
    places = jnp.concatenate([order[:, :first], target], axis=1)
    kept = _pick(states_MSD, places)
    return kept.at[:, first:].add(mean.astype(kept.dtype)), places


def divprune(features_MID: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """(dtype[M, tokens, D], places, rising): one by one the feature farthest, by cosine, from the chosen.

    The first is the one that is farthest from its nearest. What is chosen is not chosen again.
    """
    m, x = len(features_MID), features_MID.astype(jnp.float32)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    apart = 1 - _exact("mid,mjd->mij", x, x)  # [M, I, I]
    rows = jnp.arange(m)
    second = -jax.lax.top_k(-apart.swapaxes(1, 2), 2)[0][..., 1]  # [M, I]; the nearest is itself

    def take(places, nearest, i, new):
        return places.at[:, i].set(new), nearest.at[rows, new].set(-jnp.inf)

    def choose(i, carry):
        places, nearest = carry
        new = nearest.argmax(-1)  # [M]
        return take(places, jnp.minimum(nearest, apart[rows, new]), i, new)

    first = second.argmax(-1)
    begin = take(jnp.zeros((m, tokens), jnp.int32), apart[rows, first], 0, first)
    places, _ = jax.lax.fori_loop(1, tokens, choose, begin)
    places = jnp.sort(places, axis=1)
    return _pick(features_MID, places), places


def pool(patches_MPD: jax.Array, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """(dtype[M, rows * columns, D], places): means of areas of a square image (adaptive average pooling)."""
    m, p, d = patches_MPD.shape
    side = round(p**0.5)
    (down, rows), (across, columns) = (_areas(side, count) for count in grid)
    x = patches_MPD.reshape(m, side, side, d).astype(jnp.float32)
    x = _exact("ra,cb,mabd->mrcd", down, across, x).reshape(m, grid[0] * grid[1], d)
    places = (rows[:, None] * side + columns).reshape(-1)  # the middles
    return x.astype(patches_MPD.dtype), jnp.broadcast_to(jnp.asarray(places), (m, len(places)))


def _areas(side: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32[count, side], int32[count]): weights of the means of `count` areas, and their middles.

    Where `count` does not divide `side`, neighbouring areas overlap.
    """
    at, patches = np.arange(count), np.arange(side)
    first, last = at * side // count, -(-(at + 1) * side // count)
    inside = (patches >= first[:, None]) & (patches < last[:, None])
    weights = inside.astype(np.float32) / (last - first)[:, None]
    return weights.astype(np.float32), ((first + last - 1) // 2).astype(np.int32)
