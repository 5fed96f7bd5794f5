"""`llava-jax data build`: a recipe's sets, one after the other, into one training file and a manifest."""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_jax import __version__
from llava_jax.data.records import check_record
from llava_jax.datasets.findings import peak_mb
from llava_jax.datasets.recipe import Part, Recipe, read_recipe
from llava_jax.datasets.source import Record, Source
from llava_jax.datasets.writer import Writer, open_writer, refuse_there
from llava_jax.digests import sha256
from llava_jax.errors import LlavaError, SampleError
from llava_jax.progress import progress
from llava_jax.text.records import image_paths
from llava_jax.util import read_object, write_json

MEGABYTE = 1_000_000


def run(args: argparse.Namespace) -> int:
    """`llava-jax data build`: prints the records of each set beside how many LLaVA-1.5 had."""
    recipe = read_recipe(args.recipe, Path(args.raw).expanduser(), tuple(args.only))
    out = Path(args.out).expanduser()
    if args.format == "json":
        if args.images:
            raise LlavaError(
                "--images is of --format arrayrecord, which is not given: a JSON only names pictures",
                fix="add --format arrayrecord, or leave --images out",
            )
        print(report(build(recipe, out)))
        return 0
    from llava_jax.store.write import pack

    if out.suffix == ".json":
        fix = f"name the folder: --out {out.with_suffix('')}"
        raise LlavaError(f"--out {out}: arrayrecord makes a folder, beside OUT.json", fix=fix)
    records = out.with_name(f"{out.name}.json")
    if not _is_built(records, recipe):
        print(report(build(recipe, records)))
    made = pack(str(records), args.images, str(out))
    print(f"{out}: {made['records']:,} records in {len(made['shards']):,} shards")
    return 0


def _is_built(out: Path, recipe: Recipe) -> bool:
    """Whether an earlier call built `out` of this recipe and these files, whose packing then goes on.

    Raises LlavaError, naming what is not as it was, for another file there.
    """
    if not os.path.lexists(out):
        return False
    made = read_object(manifest_of(out)) if manifest_of(out).exists() else {}
    sets = [{"source": p.source.name, "inputs": _inputs(p.source)} for p in recipe.parts]
    rows = made.get("sets")
    rows = rows if isinstance(rows, list) and all(isinstance(r, dict) for r in rows) else []
    then = [{"source": row.get("source"), "inputs": row.get("inputs")} for row in rows]
    changed = [
        f"no {manifest_of(out).name}" if not made else "",
        "another recipe" if made and made.get("recipe") != _told(recipe) else "",
        "other sets or input files" if made and then != sets else "",
        "a file that was changed since" if made and sha256(out) != made.get("sha256") else "",
    ]
    if told := " and ".join(filter(None, changed)):
        fix = "move it away to build it anew, or give another --out"
        raise LlavaError(f"{out} is there already, with {told}, and is not replaced", fix=fix)
    return True


def build(recipe: Recipe, out: str | Path, *, quiet: bool = False) -> dict[str, Any]:
    """Writes the recipe's records to `out`, and a manifest beside it; returns the manifest.

    The same files, recipe and seed give the same bytes. Nothing is at `out` before all of it is.
    Raises SampleError for a file that is missing or not in its owner's form, naming set and row.
    """
    out = Path(out)
    refuse_there(out)
    if manifest_of(out).exists() and not _is_manifest_of(out):
        refuse_there(manifest_of(out))
    for part in recipe.parts:  # before anything is read
        part.source.inputs()
    sets = []
    with open_writer(out) as writer:
        for part in recipe.parts:
            sets.append(_add(part, recipe.seed, writer, quiet))
        manifest: dict[str, Any] = {"version": __version__, "recipe": _told(recipe)}
        manifest |= {"path": out.name, "bytes": 0, "sha256": ""}
        manifest |= {"records": sum(row["records"] for row in sets), "sets": sets}
        manifest["peak_mb"] = peak_mb()

        def tell(
            facts: dict[str, Any],
        ) -> None:  # first: a file is never there without its manifest
            manifest.update(facts)
            write_json(manifest_of(out), manifest, indent=1)

        writer.finish(tell)
    return manifest


def _is_manifest_of(out: Path) -> bool:
    """Whether `out` has a manifest, of a build that was killed before its file appeared."""
    try:
        found = read_object(manifest_of(out))
        return {"recipe", "sets", "sha256"} <= set(found) and found.get("path") == out.name
    except LlavaError:
        return False


def _told(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "seed": recipe.seed, "text": recipe.text}


def manifest_of(out: Path) -> Path:
    """Where the manifest of a built set lies: mix.manifest.json of mix.json, else with the whole name."""
    name = out.stem if out.suffix == ".json" and "." not in out.stem else out.name
    return out.with_name(f"{name}.manifest.json")


def _add(part: Part, seed: int, writer: Writer, quiet: bool) -> dict[str, Any]:
    """Writes one set; its row of the manifest."""
    source, started = part.source, time.monotonic()
    inputs = source.inputs()
    before, facts = _stats(source), _inputs(source)
    passes = 1 if part.weight == 1 and part.count is None else 2
    size = passes * sum(path.stat().st_size for path in inputs)
    counts: Counter[str] = Counter()
    pictures: set[int] = set()
    with progress(max(1, size // MEGABYTE), source.name, "MB", quiet=quiet) as bar:
        source.told = Megabytes(bar.update)
        there = None if passes == 1 else sum(1 for _ in named(source))
        if there == 0:
            raise _nothing_of(source)
        source.skipped.clear()
        for record, times in _chosen(named(source), part, there, seed):
            for _ in range(times):
                writer.write(record)
            counts["records"] += times
            counts["turns"] += times * (len(record["conversations"]) // 2)
            counts["there"] += 1
            pictures.update(hash(path) for path in image_paths(record) if times)
    if not counts["records"]:
        raise _nothing_of(source)
    if _stats(source) != before:
        raise SampleError(f"{source.name}: its files changed while they were read")
    return {
        "source": source.name,
        "records": counts["records"],
        "of": counts["there"],
        "published": source.published,
        "turns": counts["turns"],
        "pictures": len(pictures),
        "skipped": {k: n for k, n in source.skipped.items() if n},
        "weight": part.weight if part.count is None else None,
        "inputs": facts,
        "seconds": round(time.monotonic() - started, 1),
    }


def _nothing_of(source: Source) -> SampleError:
    why = "".join(f": {n:,} left out: {why}" for why, n in source.skipped.items() if n)
    return SampleError(f"{source.name}: no record is taken of it{why}", fix="leave the set out")


def named(source: Source) -> Iterator[Record]:
    """The records of a source, checked. What its owner's files do wrong is a SampleError with the row."""
    made, index = source.records(), 0
    while True:
        try:
            record = next(made)
        except StopIteration:
            return
        except LlavaError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            what = f"no {e.args[0]!r}" if isinstance(e, KeyError) and e.args else str(e)
            raise SampleError(
                f"{source.name}: {source.at or 'its file'} is not in the owner's form: {what}"
            ) from e
        check_record(record, f"{source.name}[{index}]")
        index += 1
        yield record


def _chosen(
    records: Iterable[Record], part: Part, there: int | None, seed: int
) -> Iterator[tuple[Record, int]]:
    """(record, how often it is taken). there: how many there are; None takes each once."""
    if there is None:
        yield from ((record, 1) for record in records)
        return
    name, wanted = part.source.name, part.wanted(there)
    if part.count is not None and wanted > there:
        raise SampleError(
            f"{name}: there are {there:,} records, fewer than count {wanted:,}",
            fix="lower count, or take weight to repeat them",
        )
    whole, rest = divmod(wanted, there)
    more = set(random.Random(f"{seed} {name}").sample(range(there), rest))
    for i, record in enumerate(records):
        yield record, whole + (i in more)


class Megabytes:
    """Adds up bytes and tells whole megabytes."""

    def __init__(self, update: Any):
        self._update, self._bytes = update, 0

    def __call__(self, count: int) -> None:
        before, self._bytes = self._bytes, self._bytes + count
        if more := self._bytes // MEGABYTE - before // MEGABYTE:
            self._update(more)


def _stats(source: Source) -> list[tuple[int, ...]]:
    """What changes when a file of a set does."""
    found = [path.stat() for path in source.inputs()]
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in found]


def _inputs(source: Source) -> list[dict[str, Any]]:
    """The files of a set with their digests."""
    return [
        {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in source.inputs()
    ]


def report(manifest: dict[str, Any]) -> str:
    """The manifest's counts as a table, beside those of LLaVA-1.5's own sets."""
    rows = [("set", "records", "published", "difference", "turns", "pictures", "seconds")]
    for row in manifest["sets"]:
        known = row["published"]
        rows.append(
            (
                row["source"],
                f"{row['records']:,}",
                f"{known:,}" if known else "",
                f"{row['records'] - known:+,}" if known else "",
                f"{row['turns']:,}",
                f"{row['pictures']:,}",
                f"{row['seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    for row in manifest["sets"]:
        lines += [f"{row['source']}: {n:,} left out: {why}" for why, n in row["skipped"].items()]
    lines.append(
        f"{manifest['path']}: {manifest['records']:,} records, {manifest['bytes']:,} bytes"
    )
    return "\n".join(lines)
