"""preprocessor_config.json of an image processor <-> PixelConfig.

Keys and what they do: transformers' CLIPImageProcessor and LlavaImageProcessor (4.37 and 5.24).
Anything we cannot do is refused by file and key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_jax.config import RESAMPLES, LlavaConfig, PixelConfig
from llava_jax.errors import WeightError
from llava_jax.reader import Reader, shown

FILE = "preprocessor_config.json"
_PADS, _CROPS = "LlavaImageProcessor", "CLIPImageProcessor"
_KINDS = (_PADS, _CROPS, "CLIPFeatureExtractor")
_SUFFIXES = ("Fast", "Pil")  # same settings, another backend
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")


def pixel_config(data: Mapping[str, Any] | None, image_size: int, where: str = FILE) -> PixelConfig:
    """How a model's images become the tower's `image_size` x `image_size` pixels.

    A key that is missing means what CLIP does at the tower's size. Raises WeightError for settings
    that we do not have, or whose pixels the tower could not take.
    """
    if not data:
        return PixelConfig()
    r = Reader(data, where)
    kind = r.word("image_processor_type", r.word("feature_extractor_type", _CROPS))
    if _plain(kind) not in _KINDS:
        raise WeightError(
            f"{where}: image_processor_type {shown(kind)} is not supported",
            fix=f"{_CROPS} and {_PADS} are",
        )
    for key, value in data.items():
        if key.startswith(("do_", "use_square")) and value and key not in _FLAGS:
            raise WeightError(f"{where}: {key} is not supported")
    crop = _does(r, "do_center_crop")
    if crop and data.get("crop_size") is not None:
        height, width = _height_width(data["crop_size"], f"{where}: crop_size")
        if (height, width) != (image_size, image_size):
            raise WeightError(
                f"{where}: crop_size is {height}x{width}, the tower takes {image_size}x{image_size}"
            )
    resize = _does(r, "do_resize")
    to = _resize_to(data.get("size"), f"{where}: size") if resize else None
    if not crop and not resize:
        raise WeightError(
            f"{where}: do_resize and do_center_crop are both false: the tower takes only "
            f"{image_size}x{image_size}"
        )
    if not crop and to is not None and set(to) != {image_size}:
        size = "x".join(map(str, to))
        raise WeightError(
            f"{where}: size is {size} without do_center_crop, the tower takes "
            f"{image_size}x{image_size}"
        )
    number = r.integer("resample", 3, low=0, high=len(RESAMPLES) - 1)
    factor = r.number("rescale_factor", PixelConfig().rescale)
    return PixelConfig(
        resize=resize,
        resize_to=None if to == (image_size,) else to,
        crop=crop,
        resample=RESAMPLES[number],
        rescale=factor if _does(r, "do_rescale") else 1.0,
        normalize=_does(r, "do_normalize"),
    )


def _does(r: Reader, key: str) -> bool:
    """A step of the processor: done unless the file says false, or null, as transformers takes it."""
    return r.flag(key, key not in r.data)


def pads(data: Mapping[str, Any] | None) -> bool:
    """Whether images are padded to a square first, which CLIP's own processor cannot do.

    Without any settings the original's padding is assumed.
    """
    if data is None:
        return True
    kind = str(data.get("image_processor_type") or _PADS)
    return data.get("do_pad") is True and _plain(kind) == _PADS


def _plain(kind: str) -> str:
    for suffix in _SUFFIXES:
        kind = kind.removesuffix(suffix)
    return kind


def _resize_to(size: Any, where: str) -> tuple[int, ...] | None:
    """(shortest edge,) or (height, width); None if the file does not say."""
    if size is None:
        return None
    if isinstance(size, Mapping):
        given = {k: v for k, v in size.items() if v is not None}
        if set(given) == {"shortest_edge"}:
            return (Reader(given, where).integer("shortest_edge", high=100_000),)
        if set(given) == {"height", "width"}:
            return _height_width(given, where)
        raise WeightError(
            f"{where} is {shown(size)}", fix="supported are shortest_edge, or height and width"
        )
    return (Reader({"size": size}, where).integer("size", high=100_000),)


def _height_width(size: Any, where: str) -> tuple[int, int]:
    if not isinstance(size, Mapping):  # older files have one number
        size = {"height": size, "width": size}
    r = Reader(size, where)
    if not (r.has("height") and r.has("width")):
        raise WeightError(f"{where} is {shown(dict(size))}, not height and width")
    return r.integer("height", high=100_000), r.integer("width", high=100_000)


def preprocessor_json(config: LlavaConfig, processor: str = _CROPS) -> dict[str, Any]:
    """preprocessor_config.json of a model: the inverse of `pixel_config`, with mean and std."""
    v, p = config.vision, config.vision.pixels
    to = p.resize_to or (v.image_size,)
    size = {"height": to[0], "width": to[-1]} if len(to) > 1 else {"shortest_edge": min(to)}
    out = {
        "image_processor_type": processor,
        "do_convert_rgb": True,
        "do_resize": p.resize,
        "size": size,
        "resample": RESAMPLES.index(p.resample),
        "do_center_crop": p.crop,
        "crop_size": {"height": v.image_size, "width": v.image_size},
        "do_rescale": p.rescale != 1.0,
        "rescale_factor": 1 / 255 if p.rescale == 1.0 else p.rescale,
        "do_normalize": p.normalize,
        "image_mean": list(v.image_mean),
        "image_std": list(v.image_std),
    }
    if processor == _PADS:
        out["do_pad"] = config.image_aspect_ratio == "pad"
    return out
