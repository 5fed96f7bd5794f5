"""How long a step takes at least, what holds it up, and the hours of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava_jax.chips import Chip
from llava_jax.plan.traffic import Flow

MFUS = (0.45, 0.55, 0.65)


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step if each were all there is to do, at the chip's limits.

    The step takes at least the largest: `seconds`, held up by `bottleneck`.
    """

    compute: float
    hbm: float
    link: float
    dcn: float

    @property
    def bottleneck(self) -> str:
        times = {"compute": self.compute, "HBM": self.hbm, "links": self.link, "DCN": self.dcn}
        return max(times, key=lambda name: times[name])

    @property
    def seconds(self) -> float:
        return max(self.compute, self.hbm, self.link, self.dcn)


def roofline(chip: Chip, devices: int, flops: float, hbm: float, flows: Sequence[Flow]) -> Roofline:
    """flops: executed by all devices. hbm: bytes of one device. flows: of one device."""
    return Roofline(
        compute=flops / devices / chip.flops,
        hbm=hbm / chip.hbm,
        link=sum(flow.bytes for flow in flows if not flow.dcn) / chip.link,
        dcn=sum(flow.bytes for flow in flows if flow.dcn) / chip.dcn,
    )


def hours(chip: Chip, devices: int, flops: float, real: float) -> dict[str, float]:
    """{MFU: hours} of a stage whose samples take `flops` model FLOPs.

    Published MFUs are of runs without padding: a step whose positions are not all real loses the rest.
    """
    rate = chip.flops * devices * real
    return {f"{mfu:.2f}": flops / mfu / rate / 3600 for mfu in MFUS}
