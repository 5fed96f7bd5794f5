"""The result of the original's stage 1: mm_projector.bin, the projector alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llava_jax.convert import vocabulary
from llava_jax.convert.formats.base import open_base, overlay, strip_peft
from llava_jax.convert.formats.original import write_config
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import torch_file
from llava_jax.convert.io.output import Progress
from llava_jax.convert.source import Options, Source, Target, projector_file
from llava_jax.convert.table import keys
from llava_jax.errors import WeightError


def open_projector(path: Path, options: Options) -> Source:
    """mm_projector.bin, a folder with one, or the file itself, over its base.

    With mm_use_im_start_end the file holds the token embeddings too: all rows, or the new ones.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, projector_file(path))
    if file is None:
        raise WeightError(f"{folder}: there is no projector")
    if options.base is None:
        raise WeightError(
            f"{file} is a projector alone", fix="give --base with the language model it belongs to"
        )
    data = folders.read_json(folder / "config.json")
    state = strip_peft(folders.read_file(file, options.allow_pickle))
    kind = projector_kind(state, file.name)
    if data.get("mm_projector_type", kind) != kind:
        raise WeightError(
            f"{file.name} holds a {kind} projector, config.json says {data['mm_projector_type']}"
        )
    if "mm_hidden_size" not in data:
        data = {**data, "mm_projector_type": kind, "image_aspect_ratio": "pad"}
    base = open_base(folder, data, options, options.base)
    source = overlay(base, state, replace(base.config, projector=kind), file.name, options)
    source.metadata.setdefault("original", {})["projector_file"] = "bin"
    return replace(source, kind="projector", files=[*source.files, file])


def projector_kind(names: Iterable[str], file: str) -> str:
    """The mm_projector_type that the names of a projector's tensors mean."""
    found = {n.removeprefix("model.mm_projector.") for n in names if "mm_projector." in n}
    if found == {"weight", "bias"}:
        return "linear"
    numbers = sorted({int(n.split(".")[0]) for n in found if n.split(".")[0].isdigit()})
    if not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        raise WeightError(f"{file}: its tensors {sorted(found)[:4]} are of no known projector")
    return f"mlp{len(numbers)}x_gelu"


def write_projector(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """mm_projector.bin and config.json (with the token embeddings if they were trained)."""
    source = vocabulary.original_rows(source)
    state = keys.to_theirs(source.leaves, keys.PROJECTOR, source.config)
    if source.config.use_im_start_end:
        language = keys.to_theirs(source.leaves, keys.LLAMA, source.config)
        state |= {n: t for n, t in language.items() if n.startswith("model.embed_tokens.")}
    torch_file.write(work / folders.PROJECTOR_FILE, state)
    write_config(source, work, state.values(), None, {"tune_mm_mlp_adapter": True})
