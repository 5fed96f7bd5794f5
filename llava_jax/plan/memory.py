"""Where the memory of a device goes: exact for what stays, the compiler's word for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_jax.batch import Shape
from llava_jax.config import LlavaConfig
from llava_jax.params import is_run
from llava_jax.train.placement import bytes_on_a_device


@dataclass(frozen=True)
class Memory:
    """Bytes of one device that stay over the step, by kind.

    unused: parameters that the step does not read (the tower's layers after the feature layer), which
    are kept for the export. gradients: of the trained parameters; the compiler counts them among the
    temporaries.
    """

    trained: int
    frozen: int
    unused: int
    optimizer: int
    batch: int
    gradients: int

    @property
    def resident(self) -> int:
        """All that stays: everything but the gradients."""
        return self.trained + self.frozen + self.unused + self.optimizer + self.batch


def weigh(program: Any, batch: dict[str, Any]) -> Memory:
    """What stays on a device. program: of llava_jax.train.program; batch: its abstract batch."""
    run = {name: leaf for name, leaf in program.frozen.items() if is_run(name)}
    trained = bytes_on_a_device(program.state.params)
    return Memory(
        trained=trained,
        frozen=bytes_on_a_device(run),
        unused=bytes_on_a_device(program.frozen) - bytes_on_a_device(run),
        optimizer=bytes_on_a_device(program.state.opt_state),
        batch=bytes_on_a_device(batch),
        gradients=trained,
    )


KEPT = {"none": (8, 3), "dots": (5, 2), "minimal": (5, 0), "full": (1, 0), "offload": (0, 0)}
"""{remat: (multiples of the width D, of the MLP's F) kept for each position and layer}"""


def estimate(
    config: Any, model: LlavaConfig, program: Any, memory: Memory, shape: Shape, parts: int
) -> float:
    """Bytes at the peak, roughly, to compare settings by before one is compiled.

    Kept activations of all layers, one layer's own in the backward pass, the gathered parameters of two
    layers with a gradient, and two pieces of float32 logits. parts: micro-batches times devices along
    the batch.
    """
    c, wide = model.language, np.dtype(config.dtype).itemsize
    positions = shape.rows * shape.length / parts / program.mesh.shape.get("context", 1)
    across = program.mesh.shape["tensor"]
    kept_d, kept_f = KEPT.get(config.remat, KEPT["full"])
    kept = c.layers * positions * (kept_d * c.width + kept_f * c.mlp_width / across) * wide
    inside = positions * (12 * c.width + 5 * c.mlp_width) / across * wide
    layer = 4 * c.width**2 + 3 * c.width * c.mlp_width
    gathered = 3 * layer / across * wide
    logits = 2 * 4 * min(256, shape.targets or 0) * c.vocab_size
    sums = memory.gradients * (2 if config.grad_accum > 1 else 1)
    return memory.resident + kept + inside + gathered + logits + sums
