"""Weights in and out: every LLaVA layout <-> the flat parameters of this package.

from llava_jax.convert import load_checkpoint, save_checkpoint
checkpoint = load_checkpoint("llava-hf/llava-1.5-7b-hf")
save_checkpoint(checkpoint, "my-llava", to="original")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.convert.checkpoint import Checkpoint as Checkpoint
    from llava_jax.convert.checkpoint import convert as convert
    from llava_jax.convert.checkpoint import load_checkpoint as load_checkpoint
    from llava_jax.convert.checkpoint import save_checkpoint as save_checkpoint

_LAZY = ("Checkpoint", "convert", "load_checkpoint", "save_checkpoint")
__all__ = ["Checkpoint", "convert", "load_checkpoint", "save_checkpoint"]


def __getattr__(name: str):
    if name in _LAZY:
        from llava_jax.convert import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'llava_jax.convert' has no attribute {name!r}")
