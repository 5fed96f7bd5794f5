"""Which kernel computes attention on a device: `choose`, the one place where that is decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.sharding import alone

_CHUNKED = {"plain_up_to": 1024, "block": 512}  # not measured
_CHUNKED_ON_CPU = {"plain_up_to": 256, "block": 128}
# CPU seconds of forward and backward, plain / chunked, 8 heads of 64 in float32, one example a row
# (jax 0.10.2, 2 cores, 2026-11-26, bench/attention.py): 0.080 / 0.088 for 8 x 256, 0.47 / 0.24 for
# 8 x 512, 1.6 / 0.60 for 2 x 2048, 2.9 / 1.2 for 1 x 4096.


@dataclass(frozen=True)
class Choice:
    """A kernel, with the longest sequence that is still computed by plain attention, and why.

    block: queries and keys of a block of `chunked`. interpret: run Pallas kernels in Python, to test
    them without their device.
    """

    kernel: str = "plain"
    plain_up_to: int = 0
    why: str = ""
    block: int = 128
    interpret: bool = False

    def at(self, length: int) -> str:
        """The kernel for sequences of this length."""
        return self.kernel if length > self.plain_up_to else "plain"

    @property
    def decode(self) -> str:
        """How a new token attends over a slot cache on the same device: "flash", one kernel, or "loop"."""
        return "flash" if self.kernel in ("triton", "cudnn") and alone() else "loop"

    def __str__(self) -> str:
        short = f", plain up to {self.plain_up_to} positions" if self.plain_up_to else ""
        return f"attention: {self.kernel}{short}" + (f" ({self.why})" if self.why else "")


PLAIN = Choice()


@dataclass(frozen=True)
class Need:
    """What attention has to do in a run. dtype: name of the activations' type.

    packed: several examples in a row. turns: independent turns occur. window: Mistral's.
    context: devices that share the queries of a row. heads: the widths of a head that occur.
    """

    dtype: str
    packed: bool = False
    turns: bool = False
    window: bool = False
    context: int = 1
    heads: tuple[int, ...] = ()


def takes(kernel: str, head: int) -> bool:
    """Whether a kernel for GPUs computes with heads of this width.

    Triton multiplies blocks whose sides are powers of two and at least 16 (jax's Pallas lowering); cuDNN's
    heads are multiples of 8 up to 128 (its support matrix of fused attention).
    """
    if kernel == "triton":
        return head >= 16 and head & (head - 1) == 0
    return kernel != "cudnn" or (head % 8 == 0 and head <= 128)


def choose(device: Any, need: Need, asked: str = "") -> Choice:
    """The kernel for `device` (of jax, or of a topology that is compiled for).

    asked: the setting `attention`; "" leaves it to us. Raises ConfigError where the kernel that was
    asked for does not run on the device or cannot do what is needed.
    """
    if asked:
        if asked not in ("plain", "chunked") and (reason := _lacking(asked, device, need)):
            fix = "leave attention empty: the fastest kernel that can is chosen"
            raise ConfigError(f"attention {asked!r} {reason}", fix=fix)
        return Choice(asked, why="as set", block=_chunked(device)["block"])
    reasons: list[str] = []
    for kernel in _preferred(device):
        reason = _lacking(kernel, device, need)
        if not reason:
            return Choice(kernel, why="; ".join(reasons) or f"the fastest on {_kind(device)}")
        reasons.append(f"{kernel} {reason}")
    why = "; ".join(reasons) or f"there is no fused kernel for {_kind(device)}"
    return Choice("chunked", why=why, **_chunked(device))


def _chunked(device: Any) -> dict[str, Any]:
    return _CHUNKED_ON_CPU if device.platform == "cpu" else _CHUNKED


def _preferred(device: Any) -> tuple[str, ...]:
    """The fused kernels of a device, fastest first.

    cuDNN's is 1.7 to 2.3 times as fast as FlashAttention 2 on Hopper, and 0.82 times on A100
    (huggingface/transformers pull request 48163).
    """
    if device.platform == "tpu":
        return ("splash",)
    capability = _capability(device)
    if capability >= 9:
        return ("cudnn", "triton")
    return ("triton", "cudnn") if capability >= 8 else ()


def _lacking(kernel: str, device: Any, need: Need) -> str:
    """Why a kernel cannot serve: "runs on TPU only", ...; "" if it can."""
    nvidia = _capability(device)
    if kernel == "splash" and device.platform != "tpu":
        return f"runs on TPU, not on {_kind(device)}"
    if kernel != "splash" and nvidia < 8:
        return f"runs on NVIDIA GPUs since Ampere, not on {_kind(device)}"
    if need.turns:
        return "does not know independent turns"
    if kernel == "splash":
        return ""
    if need.dtype == "float32":
        return "does not compute in float32"
    if need.context > 1:
        return "does not share a row among devices"
    if kernel == "cudnn" and need.packed:
        return "knows no packed rows"
    if kernel == "triton" and need.window:
        return "knows no sliding window"
    if wrong := [str(head) for head in need.heads if not takes(kernel, head)]:
        return f"takes no heads that are {wrong[0]} wide"
    return ""


def _capability(device: Any) -> float:
    """CUDA compute capability of an NVIDIA GPU: 8.0 of an A100, 9.0 of an H100; else 0."""
    try:
        return float(getattr(device, "compute_capability", "0"))
    except ValueError:  # of an AMD GPU it reads gfx942
        return 0.0


def _kind(device: Any) -> str:
    return "CPU" if device.platform == "cpu" else device.device_kind
