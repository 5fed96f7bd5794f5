"""LLaVA: tower, projector and decoder, and the splice of image features into the prompt.

Batch layout (made by llava_jax.batch): B rows of T positions, in G groups that share M images each;
`slots` says which image feature of its group, if any, belongs at a position. Splicing, labels and
positions are decided on the host, so every step has static shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llava_jax import budget
from llava_jax.clip import ClipVision
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute, linears_of, no_rngs
from llava_jax.llama import Llama
from llava_jax.params import check_params
from llava_jax.products import splits_positions
from llava_jax.sharding import IMAGES, LOOKED_UP, SEQUENCE, constrain, state_shardings


class Projector(nnx.Module):
    """Image features to decoder width: linear, mlpNx_gelu (exact GELU between layers), identity.

    Source: llava/model/multimodal_projector/builder.py.
    """

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        self.depth = config.projector_depth
        d_in, d_out = config.vision.width, config.language.width
        linear = linears_of("projector", config.lora, rngs=rngs)
        for i in range(self.depth):
            # The last axis of each layer is the next one's input: only one of the two is sharded.
            name, width = f"linear_{i}", d_in if i == 0 else d_out
            layer = linear(name, width, d_out, ("embed", None), bias=True, init="torch")
            setattr(self, name, layer)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """dtype[..., vision width] -> dtype[..., language width]. A key turns LoRA dropout on."""
        for i in range(self.depth):
            if i:
                x = jax.nn.gelu(x, approximate=False)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            x = getattr(self, f"linear_{i}")(x, key)
        return x


def head_widths(config: LlavaConfig) -> tuple[int, int]:
    """Features of a head of attention: the decoder's and the tower's."""
    return config.language.head_width, config.vision.width // config.vision.heads


def merge_images(text_BTD: jax.Array, features_GRD: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """Puts image features where the prompt has image slots.

    text_BTD: token embeddings; features_GRD: the R = M * I feature rows of the M images that each
    group of B / G rows shares; slots_BT: int32, index into those rows, or -1 for a text token (or
    padding).

        slots      -1  -1   0   1   2   3  -1
        text        a   b   .   .   .   .   c
        result      a   b  f0  f1  f2  f3   c
    """
    groups, count = features_GRD.shape[:2]
    if not count:
        return text_BTD
    b, t = slots_BT.shape
    # Clamped: a text position gathers row 0, and `where` then discards it. Rows and positions stay
    # axes of their own, so that each may be sharded.
    at = jnp.maximum(slots_BT, 0).reshape(groups, b // groups, t)
    rows = jax.vmap(lambda features, here: features[here])(features_GRD, at)  # [G, B / G, T, D]
    return jnp.where((slots_BT >= 0)[..., None], rows.reshape(text_BTD.shape), text_BTD)


def places_at(places_GR: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """int32[B, T]: how far behind its image's first position a feature stands; 0 for a text token."""
    nothing = jnp.zeros((*slots_BT.shape, 1), places_GR.dtype)
    return merge_images(nothing, places_GR[..., None], slots_BT)[..., 0]


class Llava(nnx.Module):
    """The whole model. Parameter names are listed in docs/architecture.md."""

    def __init__(self, config: LlavaConfig, compute: Compute | None = None, *, rngs: nnx.Rngs):
        self.config, self.compute = config, compute or Compute()
        run, lora = config.vision_layers_run, config.lora
        self.vision = ClipVision(config.vision, run, self.compute, lora, rngs=rngs)
        self.projector = Projector(config, rngs=rngs)
        self.language = Llama(config.language, self.compute, lora, config.quantize, rngs=rngs)

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8[..., H, W, 3] -> float32 in CLIP's units; float input is passed on as it is."""
        if images.dtype != jnp.uint8:
            return images
        v = self.config.vision
        scaled = images.astype(jnp.float32) * jnp.float32(v.pixels.rescale)
        mean, std = (jnp.asarray(values, jnp.float32) for values in v.units)
        return (scaled - mean) / std

    def image_features(
        self, images_MHWC: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """uint8 or normalised float [M, H, W, 3] -> dtype[M, I, vision width], before projection."""
        features = self.vision(self.normalize(images_MHWC), dropout_key)  # [M, 1 + patches, width]
        return features[:, 1:] if self.config.feature_select == "patch" else features

    def read(self, images_MHWC: jax.Array, keys: Any = (None, None)) -> tuple[jax.Array, Any]:
        """Images -> (what the decoder reads of each, dtype[M, I, D]; where in the image that stands).

        The second is int32[M, I], positions behind the image's first, for a budget that keeps original
        ones; else None. keys: of dropout, in the tower and the projector.
        """
        c = self.config
        if c.budget is None:
            return self.projector(self.image_features(images_MHWC, keys[0]), keys[1]), None
        if c.budget.by == "divprune":  # by what the decoder would read
            kept, places = budget.divprune(
                self.projector(self.image_features(images_MHWC)), c.budget.tokens
            )
        elif c.budget.by == "pool":
            grid: Any = c.budget.grid(c.vision.side)  # the config was checked
            kept, places = budget.pool(self.image_features(images_MHWC), grid)
        else:
            seen = self.vision.with_looks(self.normalize(images_MHWC))
            kept, places = budget.visionzip(*seen, c.budget.tokens)
            if c.feature_select == "patch":  # the class token has no place of its own
                places = jnp.maximum(places - 1, 0)
        if c.budget.positions == "original":
            order = jnp.argsort(places, axis=1)[..., None]
            kept = jnp.take_along_axis(kept, order, axis=1)
            places = jnp.sort(places, axis=1)
        kept = kept if c.budget.by == "divprune" else self.projector(kept)
        return kept, places if c.budget.positions == "original" else None

    def embed(
        self, tokens_BT, slots_BT, images_GMHWC, dropout_key=None, positions_BT=None
    ) -> tuple[jax.Array, Any]:
        """(token embeddings with the projected features of each group's images spliced in, positions).

        positions_BT: as the batch has them; what is given has places within images added.
        """
        text = self.language.embed(tokens_BT, self.compute.dtype)  # [B, T, D]
        if (
            splits_positions()
        ):  # from the table's place to SEQUENCE in two steps: XLA finds none in one
            text = constrain(text, LOOKED_UP)
        g, m = images_GMHWC.shape[:2]
        if not m:
            return text, positions_BT
        images_NHWC = images_GMHWC.reshape(g * m, *images_GMHWC.shape[2:])  # N = G * M
        images_NHWC = constrain(images_NHWC, IMAGES)
        # The decoder's keys come from `dropout_key` itself.
        keys = [None if dropout_key is None else jax.random.fold_in(dropout_key, i) for i in (1, 2)]
        projected, places = self.read(images_NHWC, keys)  # [N, I, D]
        rows = projected.reshape(g, m * projected.shape[1], projected.shape[-1])  # [G, M * I, D]
        if places is not None and positions_BT is not None:
            positions_BT = positions_BT + places_at(places.reshape(g, -1), slots_BT)
        return merge_images(text, rows, slots_BT), positions_BT

    def __call__(
        self,
        batch: Mapping[str, jax.Array],
        dropout_key: jax.Array | None = None,
        at_GP: jax.Array | None = None,
        prune: bool = False,
    ) -> jax.Array:
        """A batch (tokens, slots, positions, segments, turns, images) -> hidden dtype[B, T, D].

        at_GP, prune: for hidden dtype[G, P, D] at those positions, see Llama.
        """
        given = batch["tokens"], batch["slots"], batch["images"], dropout_key
        x, positions = self.embed(*given, positions_BT=batch["positions"])
        x = constrain(x, SEQUENCE)  # [B, T, D]
        turns = batch.get("turns") if self.compute.turns else None
        places = positions, batch["segments"], turns
        at = {"at_GP": at_GP, "prune": prune}
        return self.language(x, *places, dropout_key=dropout_key, **at)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32[..., V]."""
        return self.language.logits(hidden)


# Parameters as a flat dict: dotted name -> array ------------------------------------------------


def init_params(config: LlavaConfig, seed: int = 0) -> dict[str, jax.Array]:
    """{dotted name: float32 array} of random parameters, compiled as one program."""

    def make():
        return flatten(nnx.state(Llava(config, rngs=nnx.Rngs(seed))))

    with nnx.use_eager_sharding(False):
        return jax.jit(make)()


def init_sharded(
    config: LlavaConfig, seed: int, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """Random parameters of the names in `shardings` alone, each made where it lies."""

    def make():
        flat = flatten(nnx.state(Llava(config, rngs=nnx.Rngs(seed))))
        return {name: flat[name] for name in shardings}

    with nnx.use_eager_sharding(False):
        return jax.jit(make, out_shardings=dict(shardings))()


@functools.lru_cache(8)
def abstract_model(config: LlavaConfig, compute: Compute | None = None):
    """(graphdef, state of ShapeDtypeStructs) of a model that was never built: no memory used.

    Kept, since a run asks several times; not to be changed.
    """
    with nnx.use_eager_sharding(False):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Llava(config, compute, rngs=no_rngs())))

    def held(x):  # in float32, unless it is codes
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if floats else x.dtype)

    return graphdef, jax.tree.map(held, state)


def flatten(state: nnx.State) -> dict[str, Any]:
    """NNX state -> {dotted name: array}, in the model's own order."""
    return {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(state)}


def abstract_params(config: LlavaConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{dotted name: shape and dtype} of every parameter the configuration has."""
    state = abstract_model(config)[1]
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}


def _fill(flat: Any, params: Mapping[str, Any]) -> nnx.State:
    """The variables of `flat` with the values of `params`, which must fit them."""
    variables = {".".join(map(str, path)): (path, variable) for path, variable in flat}
    check_params(params, {n: v.get_value().shape for n, (_, v) in variables.items()})
    filled = [(path, v.replace(params[name])) for name, (path, v) in variables.items()]
    return nnx.from_flat_state(filled)


def binder(config: LlavaConfig, compute: Compute | None = None) -> Callable[..., Llava]:
    """A function from flat parameters to a model over them; cheap enough to call inside jit."""
    graphdef, state = abstract_model(config, compute)
    flat = nnx.to_flat_state(state)
    return lambda params: nnx.merge(graphdef, _fill(flat, params))


def build(config: LlavaConfig, params: Mapping[str, Any], compute: Compute | None = None) -> Llava:
    """A model over the given flat parameters (arrays are used as they are, not copied)."""
    return binder(config, compute)(params)


def param_shardings(config: LlavaConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """{dotted name: where it lies on the mesh} of every parameter."""
    state = state_shardings(abstract_model(config)[1], config, mesh)
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}
