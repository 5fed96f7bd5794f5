"""FLOPs of a step, counted from the parameters' shapes. The rules are those of `python -m bench train`.

Model FLOPs, the numerator of MFU: 2 x real tokens x weights of each matmul forward, as much for the
gradient of its input where something before it learns, as much for that of its weights where they
learn. Causal attention is half of T x T within a sample, and twice that backward. The head, and the last
layer's query, output and MLP, at supervised positions alone. The tower: the layers that features need.
Not counted: padding, recomputation, embedding, norms, softmax, the loss, the optimizer.

Executed FLOPs: what the step computes as it is compiled, padding and recomputation included, every layer
at every position, attention over the whole row, or its causal half where the kernel skips the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.params import is_run


@dataclass(frozen=True)
class Work:
    """What a step goes through. keys: positions that a query reads, on average.

    last: positions of which the last layer's outputs are needed.
    """

    tokens: float
    targets: float
    images: float
    keys: float
    last: float


@dataclass(frozen=True)
class Flops:
    """Of a step over all devices."""

    language: float  # layers and head
    attention: float
    projector: float
    tower: float
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return self.language + self.attention + self.projector + self.tower + self.recomputed


_LAST = ("attn.q.", "attn.o.", "mlp.")


def count(
    model: LlavaConfig,
    params: Mapping[str, Any],
    trained: Iterable[str],
    work: Work,
    remat: str = "none",
    head_again: bool = False,
) -> Flops:
    """FLOPs of a step over `work`.

    params: shapes by name. remat: what the backward pass computes once more, a setting of that name.
    head_again: whether it does so with logits.
    """
    learns = set(trained)
    language, head, projector, tower = 0.0, 0.0, 0.0, 0.0
    below = {part: any(n.startswith(part) for n in learns) for part in ("vision.", "projector.")}
    into_language = bool(learns)  # whatever learns lies before the last layer's end
    for name, leaf in params.items():
        weights = float(_weights(name, leaf))
        if not weights or not is_run(name):
            continue
        passes = 1 + (name in learns)
        if name == "language.head.kernel":
            head += 2 * weights * work.targets * (passes + into_language)
        elif name.startswith("language."):
            positions = work.tokens
            if any(part in name for part in _LAST):
                layers = leaf.shape[0]
                positions = ((layers - 1) * work.tokens + work.last) / layers
            language += 2 * weights * positions * (passes + into_language)
        elif name.startswith("projector."):
            before = below["vision."] or (below["projector."] and "linear_0" not in name)
            projector += 2 * weights * work.images * model.image_tokens * (passes + before)
        else:
            rows = model.vision.patches + (".patch_embed." not in name)
            tower += 2 * weights * work.images * rows * (passes + below["vision."])
    if model.language.tied_head:
        size = model.language.width * model.language.vocab_size
        head += (
            2 * size * work.targets * (1 + into_language + ("language.embed.embedding" in learns))
        )
    lm, v = model.language, model.vision
    attention = 4 * work.tokens * work.keys * lm.heads * lm.head_width * lm.layers
    again = 0.0
    if remat != "none":
        mlp = 3 * lm.width * lm.mlp_width
        rest = mlp + 2 * lm.width * lm.head_width * (lm.heads + lm.kv_heads)
        # "dots" keeps what matmuls give, "minimal" what those of attention do.
        share = {"dots": 0.0, "minimal": mlp / rest}.get(remat, 1.0)
        again = attention + share * language / (1 + into_language + _share(params, learns))
    if head_again:
        again += 2 * model.language.width * model.language.vocab_size * work.targets
    tower_attention = 4 * work.images * (v.patches + 1) ** 2 * v.width * model.vision_layers_run
    return Flops(
        language + head,
        attention * (3 if into_language else 1),
        projector,
        tower + tower_attention * (3 if below["vision."] else 1),
        again,
    )


def _share(params: Mapping[str, Any], learns: set[str]) -> float:
    """Of the weights in the decoder's layers, the part that learns."""
    sizes = {
        name: _weights(name, leaf)
        for name, leaf in params.items()
        if name.startswith("language.layers.")
    }
    return sum(size for name, size in sizes.items() if name in learns) / sum(sizes.values())


def _weights(name: str, leaf: Any) -> int:
    """The weights of a matrix that is multiplied with; 0 for any other parameter."""
    if name.endswith(".codes"):  # of nf4, two in a byte
        return _size(leaf.shape) * (2 if leaf.dtype == "uint8" else 1)
    return _size(leaf.shape) if name.endswith((".kernel", ".lora_a", ".lora_b")) else 0


def _size(shape: Iterable[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
