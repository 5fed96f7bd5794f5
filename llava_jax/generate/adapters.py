"""LoRA adapters beside a model, unmerged: a request says which one it goes through.

The factors of all of them lie side by side in one LoRA, of which a row takes its own columns
(layers.Linear), so that one compiled step serves slots with different adapters, whatever their ranks.
What an adapter has of its own in tower and projector takes the model's place when its pictures are seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig, LoraConfig, LoraSet
from llava_jax.errors import ConfigError, WeightError
from llava_jax.params import is_lora, parameter_shapes


class Adapter(NamedTuple):
    """One adapter. lora: its rank, scale and targets, all of the decoder.

    params: its factors, and the parameters of tower and projector that differ from the model's.
    """

    lora: LoraConfig
    params: Mapping[str, np.ndarray]


class Adapters:
    """Those of a model.

    config: the model's, with room for them. factors: theirs, side by side. eyes: by name, what those
    that see for themselves see with.
    Raises WeightError for values that are not finite, which would reach other rows.
    """

    def __init__(self, config: LlavaConfig, found: Mapping[str, Adapter]):
        self.names, self.config, self.factors = tuple(found), config, {}
        for name, adapter in found.items():
            for key, value in adapter.params.items():
                if not np.isfinite(np.asarray(value, np.float32)).all():
                    raise WeightError(f"adapter {name}: {key} has values that are not finite")
        eyes = {
            name: {k: v for k, v in adapter.params.items() if not is_lora(k)}
            for name, adapter in found.items()
        }
        self.eyes = {name: own for name, own in eyes.items() if own}
        if not found:
            return
        parts = [(adapter.lora.rank, adapter.lora.scale) for adapter in found.values()]
        targets = tuple(dict.fromkeys(t for a in found.values() for t in a.lora.targets))
        lora = LoraSet(sum(rank for rank, _ in parts), targets=targets, each=tuple(parts))
        self.config = replace(config, lora=lora)
        self.factors = self._side_by_side(list(found.values()))

    def _side_by_side(self, found: list[Adapter]) -> dict[str, np.ndarray]:
        made: dict[str, Any] = {}
        for name, shape in parameter_shapes(self.config).items():
            if not is_lora(name):
                continue
            axis, parts = (-1 if name.endswith("lora_a") else -2), []
            for adapter in found:
                one = list(shape)
                one[axis] = adapter.lora.rank
                own = adapter.params.get(name)  # an adapter may lack a target
                parts.append(np.zeros(one, _dtype(found, name)) if own is None else own)
            made[name] = np.concatenate(parts, axis)
        return made

    def index(self, name: str) -> int:
        """The number of an adapter, from 1 on; 0 for the model itself, whose name here is empty.

        Raises ConfigError for one that is not here.
        """
        if not name:
            return 0
        if name not in self.names:
            fix = (
                f"one of {', '.join(self.names)}" if self.names else "load the model with adapters"
            )
            raise ConfigError(f"there is no adapter {name!r}", fix=fix)
        return 1 + self.names.index(name)

    def sight(self, name: str) -> bytes:
        """What tells pictures that are seen with other eyes apart; empty for the model's own."""
        return name.encode() if name in self.eyes else b""


def _dtype(found: list[Adapter], name: str) -> np.dtype:
    return next(a.params[name].dtype for a in found if name in a.params)
