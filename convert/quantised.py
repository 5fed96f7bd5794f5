"""Checkpoints whose weights are quantised: not read, and said so by the name of the method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_jax.errors import WeightError

FIX = "use the 16-bit weights"
# Where a config.json says it: transformers', compressed-tensors' older name, and MLX's.
_KEYS = ("quantization_config", "compression_config", "quantization")
# What the methods call their tensors (the names under which transformers 5 and vLLM load them).
_TENSORS = (
    ("bitsandbytes", r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)"),
    ("GPTQ or AWQ", r"\.(qweight|qzeros|g_idx)"),
    ("compressed-tensors", r"\.(weight_packed|weight_zero_point|weight_shape)"),
    ("FP8", r"\.(weight_scale|weight_scale_inv|input_scale)"),
    ("HQQ", r"\.W_q"),
    ("AQLM", r"\.(codebooks|codes)"),
    ("quanto", r"\.weight\._(data|scale)"),
    ("EETQ", r"\.weight_scales"),
)


def refuse_config(data: Mapping[str, Any], file: str | Path) -> None:
    """Raises WeightError naming the method when a config.json, or a part of it, is of quantised weights.

    file: its path, for the message.
    """
    for part in (data, *(v for v in data.values() if isinstance(v, Mapping))):
        for key in _KEYS:
            if part is data or key in _KEYS[:2]:
                name = method(part.get(key))
                if name:
                    raise WeightError(f"{file}: {key} {name} is not supported", fix=FIX)


def method(settings: Any) -> str | None:
    """The method that a quantization_config names; None where it quantises nothing."""
    if not isinstance(settings, Mapping) or not settings:
        return None
    loads = [v for k, v in settings.items() if k.lstrip("_") in ("load_in_4bit", "load_in_8bit")]
    if loads and not any(loads):
        return None
    name = settings.get("quant_method") or ("bitsandbytes" if loads else None)
    bits = settings.get("bits")
    name = name or (f"of {bits} bits" if isinstance(bits, int) else "of unknown method")
    return ascii(str(name))[1:-1][:40]


def without(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says its weights are quantised: the base's are, not these."""
    return {k: v for k, v in data.items() if k not in _KEYS}


def refuse_tensors(names: Iterable[str], where: str | Path) -> None:
    """Raises WeightError naming the method and a tensor when the names are those of quantised weights."""
    for name in names:
        for kind, pattern in _TENSORS:
            if re.search(rf"{pattern}$", name):
                raise WeightError(
                    f"{where}: {name[:200]} belongs to weights quantised by {kind}, "
                    "which are not supported",
                    fix=FIX,
                )
