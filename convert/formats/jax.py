"""Our own format: flat names and whole layer stacks in safetensors shards, and llava_jax.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llava_jax.config import LlavaConfig
from llava_jax.convert import tokenizer_files
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import output
from llava_jax.convert.io.lazy import leaf
from llava_jax.convert.io.output import Progress
from llava_jax.convert.source import Options, Source, Target, read_side, write_side
from llava_jax.digests import sha256, write_sums
from llava_jax.errors import WeightError
from llava_jax.params import check_params, parameter_shapes, same_type
from llava_jax.reader import Reader, config_of

FILE = "llava_jax.json"


def open_jax(folder: Path, options: Options) -> Source:
    """A folder of this format. Raises WeightError unless it holds exactly its model's parameters."""
    data = folders.read_json(folder / FILE, required=True)
    if data.get("format") != "llava_jax" or data.get("version") != 1:
        raise WeightError(f"{folder / FILE} has an unknown format or version")
    described = Reader(data, str(folder / FILE)).object("config")
    with config_of(folder / FILE):
        config = LlavaConfig.from_dict(described)
    state, files = folders.read_folder(folder, allow_pickle=False)
    shapes = parameter_shapes(config)
    check_params(state, shapes, folder, types=same_type)
    leaves = {name: leaf(name, state[name]) for name in shapes}
    return Source(
        "jax", config, leaves, *read_side(folder), files, folders.tokenizer_folder(folder)
    )


def write_jax(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """Writes the format, with configuration and provenance beside the weights."""
    hashes = output.write_safetensors(
        work, source.leaves, shard_size=target.shard_size, progress=progress
    )
    data = {
        "format": "llava_jax",
        "version": 1,
        "config": source.config.to_dict(),
        "provenance": target.provenance or {},
        "files": hashes,
    }
    output.write_json(work / FILE, data)
    tokenizer_files.copy(source.tokenizer, work)
    write_side(source, work)
    write_sums(work, hashes)


def verify(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Raises WeightError when a weight file is not what was written.

    hashes: the SHA-256 of files that were read already, by folder name and file name.
    """
    data = folders.read_json(folder / FILE, required=True)
    written = Reader(data, str(folder / FILE)).object("files")
    for name, digest in written.items():
        path = folder / Path(str(name)).name
        found = (hashes or {}).get(f"{path.parent.name}/{path.name}")
        if not path.is_file() or (found or sha256(path)) != digest:
            raise WeightError(f"{path} is damaged: its SHA-256 is not the one {FILE} records")
