"""`llava-jax data stats FILE`: how long samples are, what they ask, and how much of a batch is padding."""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax.data.json_file import JsonFile
from llava_jax.data.packing import Sizes, fill_rows
from llava_jax.data.records import check_record
from llava_jax.data.stored import records_path
from llava_jax.datasets.prompt import maker_of, prompt_of, workers_of
from llava_jax.datasets.prompts import FREE, kind_of
from llava_jax.datasets.writer import refuse_there
from llava_jax.errors import LlavaError, SampleError
from llava_jax.processes import Lost, in_processes
from llava_jax.progress import progress
from llava_jax.storage import is_address
from llava_jax.text.conversation import ASSISTANT
from llava_jax.text.records import record_id
from llava_jax.text.sample import ExampleMaker
from llava_jax.util import write_json

MEGABYTE = 1_000_000
WIDTHS = (2048, 4096, 8192)
BATCH = 16
"""Samples that are padded to the longest of them, where nothing is packed."""
REPORTS = "stats.json", "stats.png"
JOB = "llava_jax.datasets.stats:job"
CHUNK, SECONDS = 200, 120.0


class Counts(NamedTuple):
    """Of some records: positions, pictures and trained tokens of each; words of answers by kind."""

    length: np.ndarray  # int32[n], as the two below
    images: np.ndarray
    targets: np.ndarray
    words: dict[str, np.ndarray]
    bad: int


def job(make: ExampleMaker) -> Callable[[Sequence[tuple[int, Any]]], Counts]:
    """A job of llava_jax.processes: (index, record) of many to their Counts."""

    def work(chunk: Sequence[tuple[int, Any]]) -> Counts:
        sizes: list[tuple[int, int, int]] = []
        words: defaultdict[str, list[int]] = defaultdict(list)
        for index, record in chunk:
            try:
                turns, _ = check_record(record, "")
                example = make(record, record_id(record, index))
            except LlavaError:
                continue
            length = example.length(make.image_tokens)
            sizes.append((length, len(example.images), example.target_count))
            kind = FREE  # a format prompt stands once, and holds until another comes
            for role, text in turns:
                if role == ASSISTANT:
                    words[kind].append(len(text.split()))
                elif (own := kind_of(text)) != FREE:
                    kind = own
        length, images, targets = np.asarray(sizes, np.int32).reshape(-1, 3).T
        by_kind = {kind: np.asarray(counts, np.int32) for kind, counts in words.items()}
        return Counts(length, images, targets, by_kind, len(chunk) - len(sizes))

    return work


def run(args: argparse.Namespace) -> int:
    """Prints the numbers; --report writes stats.json and stats.png too."""
    for name in REPORTS if args.report else ():  # before hours of work
        refuse_there(Path(args.report) / name, "give another --report")
    args.file = records_path(args.file)
    tokenizer, config = prompt_of(args)
    counts = count(args.file, maker_of(args, tokenizer, config), workers_of(args))
    found = summarise(counts)
    print(in_words(args.file, found))
    if args.report:
        folder = Path(args.report)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / REPORTS[0], {"file": args.file, **found}, indent=1)
        plot(counts, found, folder / REPORTS[1])
    return 0


def count(file: str, make: ExampleMaker, workers: int = 1) -> Counts:
    """The Counts of all records. What training would leave out is counted in `bad` alone.

    Raises SampleError for a file that holds none that training would take.
    """
    records = JsonFile(file)
    rows = enumerate(records.scan())
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    parts: dict[int, Counts] = {}
    size = 0 if is_address(file) else os.path.getsize(file) // MEGABYTE
    read = 0  # megabytes
    with progress(max(1, size), "samples", "MB") as bar:
        for chunk, part in in_processes(JOB, (make,), chunks, workers, SECONDS):
            if isinstance(part, Lost):
                raise LlavaError(f"{file}: records {chunk[0][0]} to {chunk[-1][0]}: {part.why}")
            parts[chunk[0][0]] = part
            if more := records.position() // MEGABYTE - read:
                bar.update(more)
                read += more
    found = _joined([parts[at] for at in sorted(parts)])
    if not len(found.length):
        raise SampleError(f"{file}: there are no samples that training would take")
    return found


def _joined(parts: list[Counts]) -> Counts:
    """The Counts of all in order; about 40 bytes a sample."""
    words: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    for part in parts:
        for kind, counts in part.words.items():
            words[kind].append(counts)
    return Counts(
        _end_to_end([part.length for part in parts]),
        _end_to_end([part.images for part in parts]),
        _end_to_end([part.targets for part in parts]),
        {kind: _end_to_end(counts) for kind, counts in words.items()},
        sum(part.bad for part in parts),
    )


def _end_to_end(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def summarise(counts: Counts) -> dict[str, Any]:
    """The numbers, JSON-ready. "real": the part of positions that are tokens, for each width."""
    sizes = Sizes(counts.length, counts.images, counts.targets)
    return {
        "samples": len(counts.length),
        "left_out": counts.bad,
        "positions": quantiles(sizes.length),
        "trained": quantiles(sizes.targets),
        "pictures": {str(k): n for k, n in sorted(Counter(counts.images.tolist()).items())},
        "answers": {
            kind: {"answers": len(words), "words": quantiles(words)}
            for kind, words in sorted(counts.words.items(), key=lambda item: -len(item[1]))
        },
        "real": {str(width): real(sizes, width) for width in WIDTHS},
    }


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Sum, mean, least, median, 90th and 99th percentile, most."""
    levels = {"least": 0, "median": 50, "p90": 90, "p99": 99, "most": 100}
    found = {name: float(np.percentile(values, level)) for name, level in levels.items()}
    return {"sum": int(values.sum(dtype=np.int64)), "mean": round(float(values.mean()), 1), **found}


def real(sizes: Sizes, width: int) -> dict[str, float]:
    """Which part of the positions are tokens, samples being cut at `width`.

    padded: to `width`. batch: to the longest of 16 samples in random order. packed: several in a row of
    `width`, as data.pack=fill does.
    """
    cut = sizes._replace(length=np.minimum(sizes.length, width))
    rng = np.random.RandomState(0)
    order = rng.permutation(len(cut.length))
    longest = np.maximum.reduceat(cut.length[order], np.arange(0, len(order), BATCH))
    members = np.diff([*range(0, len(order), BATCH), len(order)])
    rows = fill_rows(cut, order, width, 1, rng)
    tokens = int(cut.length.sum(dtype=np.int64))
    return {
        "cut": int((sizes.length > width).sum()),
        "padded": round(tokens / (len(order) * width), 4),
        "batch": round(tokens / int((longest.astype(np.int64) * members).sum()), 4),
        "packed": round(tokens / (len(rows) * width), 4),
    }


def in_words(file: str, found: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = [f"{file}: {found['samples']:,} samples, {found['left_out']:,} left out"]
    for name in ("positions", "trained"):
        q = found[name]
        lines.append(
            f"{name:10} {q['sum']:,} in all; mean {q['mean']:,.0f}, median {q['median']:,.0f}, "
            f"90 % {q['p90']:,.0f}, 99 % {q['p99']:,.0f}, most {q['most']:,.0f}"
        )
    pictures = ", ".join(f"{n:,} samples with {k}" for k, n in found["pictures"].items())
    lines.append(f"pictures   {pictures}")
    for kind, row in found["answers"].items():
        words = row["words"]
        lines.append(
            f"answers    {row['answers']:>9,} {kind}: median {words['median']:,.0f} words, "
            f"most {words['most']:,.0f}"
        )
    lines.append(
        "real tokens of a row of  padded to it  to the longest of 16  packed   cut samples"
    )
    for width, row in found["real"].items():
        lines.append(
            f"{int(width):>23,}  {row['padded']:>12.1%}  {row['batch']:>20.1%}  "
            f"{row['packed']:>6.1%}  {row['cut']:>12,}"
        )
    return "\n".join(lines)


def plot(counts: Counts, found: dict[str, Any], path: Path) -> None:
    """Four panels: positions, pictures, answers by kind, real tokens by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (lengths, pictures), (answers, padding) = figure.subplots(2, 2)
    lengths.hist(counts.length, bins=80)
    lengths.set(title="Positions of a sample", yscale="log")
    pictures.bar(list(found["pictures"]), list(found["pictures"].values()))
    pictures.set(title="Pictures of a sample")
    kinds = found["answers"]
    answers.barh(list(kinds), [row["answers"] for row in kinds.values()])
    answers.set(title="Answers by format prompt", xscale="log")
    for n, name in enumerate(("padded", "batch", "packed")):
        at = np.arange(len(WIDTHS)) + 0.27 * (n - 1)
        padding.bar(at, [found["real"][str(w)][name] for w in WIDTHS], 0.25, label=name)
    padding.set_xticks(range(len(WIDTHS)), [f"{w:,}" for w in WIDTHS])
    padding.set(title="Part of positions that are tokens, by width of a row", ylim=(0, 1))
    padding.legend()
    figure.savefig(path, dpi=110)
