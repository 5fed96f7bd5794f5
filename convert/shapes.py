"""The shape of every parameter a configuration has, without jax.

A second statement of what llava_jax.llava builds, kept so that tools need no jax (2.5 s to import);
tests/convert/test_shapes.py holds it against `llava.abstract_params`.
"""

from __future__ import annotations

from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")


def parameter_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """{dotted name: shape} of every parameter, LoRA's included where config.lora is set."""
    shapes = {**_vision(config.vision, config.vision_layers_run), **_projector(config)}
    shapes.update(_language(config.language))
    if config.lora:
        r, n = config.lora.rank, config.language.layers
        for name in LINEARS:
            _, d_in, d_out = shapes[f"language.layers.{name}.kernel"]
            shapes[f"language.layers.{name}.lora_a"] = (n, d_in, r)
            shapes[f"language.layers.{name}.lora_b"] = (n, r, d_out)
    return shapes


def _vision(c: VisionConfig, run: int) -> dict[str, tuple[int, ...]]:
    d, p = c.width, c.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.kernel": (p, p, 3, d),
        "vision.class_embed": (d,),
        "vision.pos_embed": (1 + c.patches, d),
    }
    for norm in ("vision.pre_norm", "vision.tail.post_norm"):
        shapes |= {f"{norm}.scale": (d,), f"{norm}.bias": (d,)}
    for stack, n in (("vision.layers", run), ("vision.tail.layers", c.layers - run)):
        if not n:
            continue
        for norm in ("norm1", "norm2"):
            shapes |= {f"{stack}.{norm}.scale": (n, d), f"{stack}.{norm}.bias": (n, d)}
        for name in ("q", "k", "v", "out"):
            shapes[f"{stack}.attn.{name}.kernel"] = (n, d, d)
            shapes[f"{stack}.attn.{name}.bias"] = (n, d)
        for name, d_in, d_out in (("fc1", d, c.mlp_width), ("fc2", c.mlp_width, d)):
            shapes[f"{stack}.mlp.{name}.kernel"] = (n, d_in, d_out)
            shapes[f"{stack}.mlp.{name}.bias"] = (n, d_out)
    return shapes


def _projector(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    d_in, d_out = config.vision.width, config.language.width
    for i in range(config.projector_depth):
        shapes[f"projector.linear_{i}.kernel"] = (d_in, d_out)
        shapes[f"projector.linear_{i}.bias"] = (d_out,)
        d_in = d_out
    return shapes


def _language(c: LanguageConfig) -> dict[str, tuple[int, ...]]:
    n, d, f = c.layers, c.width, c.mlp_width
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "language.embed.embedding": (c.vocab_size, d),
        "language.layers.attn_norm.scale": (n, d),
        "language.layers.mlp_norm.scale": (n, d),
        "language.norm.scale": (d,),
    }
    sizes = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    for name, (d_in, d_out) in zip(LINEARS, sizes):
        shapes[f"language.layers.{name}.kernel"] = (n, d_in, d_out)
        if c.attention_bias and name.startswith("attn"):
            shapes[f"language.layers.{name}.bias"] = (n, d_out)
    if not c.tied_head:
        shapes["language.head.kernel"] = (d, c.vocab_size)
    return shapes
