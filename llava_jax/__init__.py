"""LLaVA-1.5 in JAX/Flax: train, evaluate, serve, and move weights to and from PyTorch.

Importing this package imports neither jax nor torch and touches no device; the public names below
load what they need on first use.
"""

from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not (_Path(__file__).parent / "convert").is_dir():
    # A checkout: convert/, eval/ and configs/ lie beside this package (setup.py puts them inside).
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from llava_jax.config import LlavaConfig as LlavaConfig
    from llava_jax.model import LlavaModel as LlavaModel
    from llava_jax.model import load as load

_LAZY = {
    "load": "llava_jax.model",
    "LlavaModel": "llava_jax.model",
    "LlavaConfig": "llava_jax.config",
}
__all__ = ["LlavaConfig", "LlavaModel", "__version__", "load"]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'llava_jax' has no attribute {name!r}")
