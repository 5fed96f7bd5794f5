"""Opening any supported checkpoint, told apart by what is in it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from llava_jax.convert import compose, detect, hub, lora, templates
from llava_jax.convert import source as sources
from llava_jax.convert.lazy import cast_all
from llava_jax.convert.source import Options, Source
from llava_jax.errors import WeightError

log = logging.getLogger(__name__)


def open_source(path: str | Path, options: Options | None = None) -> Source:
    """Opens any supported checkpoint, told apart by what is in it.

    Raises WeightError, in one line that names the file or tensor, for everything that is wrong.
    """
    options, name = options or Options(), str(path)
    path = hub.resolve(path, options.allow_pickle)
    kind = detect.identify(path)
    if kind in ("hf", "jax") and options.base is not None:
        log.warning("%s is complete: its base %s is not used", path, options.base)
    if kind == "jax":
        source = sources.open_jax(path)
    elif kind == "hf":
        source = sources.open_hf(path, options)
    elif kind == "original":
        source = sources.open_original(path, options)
        source = compose.apply_delta(source, options)
    elif kind == "projector":
        source = compose.open_projector(path, options)
    elif kind == "lora":
        source = lora.open_adapter(path, options)
    elif kind == "llama":
        source = compose.join(path, options)
    elif kind == "clip":
        raise WeightError(
            f"{path} is a vision tower alone",
            fix="open the language model, with --vision-tower for this folder",
        )
    else:
        raise WeightError(f"{path}: no kind of checkpoint that is known")
    template = options.template or _template(source, path, kind, name)
    source.config = replace(source.config, template=template)
    if options.merge and source.config.lora:
        source = lora.merge(source, options.type)
    source.leaves = cast_all(source.leaves, options.type)
    sources.check(source)
    return source


def _template(source: Source, path: Path, kind: str, name: str) -> str:
    """The conversation template: what an export of ours recorded, else what the files say.

    Under an adapter of the original's lies a base that says nothing, so the adapter's name counts.
    """
    recorded = (source.kept.get("ours") or {}).get("template")
    if kind in ("hf", "original"):
        return str(recorded or templates.of_folder(path, kind, name))
    if kind == "lora":
        return templates.by_name(path, name) or source.config.template
    return source.config.template
