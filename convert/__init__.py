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
    from llava_jax.convert.checkpoint import open_source as open_source
    from llava_jax.convert.checkpoint import read_leaves as read_leaves
    from llava_jax.convert.checkpoint import save_checkpoint as save_checkpoint
    from llava_jax.convert.source import KINDS as KINDS
    from llava_jax.convert.source import Options as Options
    from llava_jax.convert.source import Source as Source
    from llava_jax.convert.source import Target as Target

_LAZY = {
    **dict.fromkeys(("Checkpoint", "convert", "load_checkpoint"), "checkpoint"),
    **dict.fromkeys(("open_source", "read_leaves", "save_checkpoint"), "checkpoint"),
    **dict.fromkeys(("KINDS", "Options", "Source", "Target"), "source"),
}


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"llava_jax.convert.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'llava_jax.convert' has no attribute {name!r}")
