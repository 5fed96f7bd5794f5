"""What packing LLaVA-1.5's data costs and gives, on lengths and records like its own.

    python bench/packing.py            # plans, on lengths alone: 665K and 558K samples
    python bench/packing.py --count    # and the time to count the lengths of 665K records

No data is needed: lengths are drawn as in llava_jax/plan/lengths.py, records are made of words.
Prints processor seconds, peak memory and the part of positions that are tokens.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llava_jax
from llava_jax.data import lengths
from llava_jax.data.layout import Exact, Fill
from llava_jax.data.packing import Sizes
from llava_jax.data.sampler import Epochs
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.plan.lengths import CAPTIONS_558K, MIX_665K, draw_sizes
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.tokenizer import Tokenizer


def layout(pack: str, sizes: Sizes, batch_size: int, length: int) -> Any:
    """The plan of an epoch, for 8 devices."""
    settings = DataSettings(batch_size=batch_size, pack=pack, pack_length=length)
    data: Any = SimpleNamespace(
        with_image=sizes.images > 0,
        file=np.zeros(len(sizes.length), np.int64),
        files=[DataFile("", "", 1.0)],
    )
    settings = settings.completed(2048, 1, 8)
    kind = {"exact": Exact, "fill": Fill}[pack]
    return kind(Epochs(data, settings), settings, sizes, 1)


def show_plans() -> None:
    """A line for each plan."""
    for name, source, batch_size, at in (
        ("665K", MIX_665K, 128, (4096, 8192)),
        ("558K", CAPTIONS_558K, 256, (4096, 4224, 8192)),
    ):
        sizes = draw_sizes(source)
        for length in at:
            for pack in ("exact", "fill"):
                begun = time.process_time()
                found = layout(pack, sizes, batch_size, length)
                seconds = time.process_time() - begun
                print(
                    f"{name}: {seconds:.0f} s of processor, {_peak()}; {found.summary}", flush=True
                )


def count_lengths(count: int, tokenizer: Path) -> None:
    """Times counting `count` conversations of about 285 words, as the 665K have."""
    records = _Records(count)
    make = ExampleMaker(Tokenizer.load(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        data: Any = _Data(records, [DataFile(f"{folder}/data.json", "", 1.0)])
        settings = DataSettings().completed(2048)
        for title in ("counted", "read from the file"):
            begun, used = time.monotonic(), _processor()
            sizes = lengths.sample_lengths(data, make, settings, 576)
            print(
                f"{count:,} lengths {title}: {time.monotonic() - begun:.0f} s, "
                f"{_processor() - used:.0f} s of processor on {os.cpu_count()} cores, {_peak()}; "
                f"mean {sizes.length.mean():.0f}"
            )


class _Records(Sequence):
    """Records that are made when their turn comes, of 4,096 conversations of random words."""

    def __init__(self, count: int):
        rng, self._count = np.random.RandomState(0), count
        letters = list("etaoinshrdlu")
        words = ["".join(rng.choice(letters, rng.randint(2, 9))) for _ in range(5000)]
        self._talks = []
        for _ in range(4096):
            talk = []
            for turn in range(4):
                question, answer = (
                    " ".join(words[i] for i in rng.randint(0, 5000, k)) for k in (9, 26)
                )
                tag = "" if turn else "<image>\n"
                talk.append({"from": "human", "value": tag + question})
                talk.append({"from": "gpt", "value": answer})
            self._talks.append(talk)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(self._count))]
        talk = self._talks[at % len(self._talks)]
        return {"id": str(at), "image": f"{at}.jpg", "conversations": talk}


class _Data:
    """As much of a Dataset as counting needs."""

    def __init__(self, records: _Records, files: list[DataFile]):
        self.records, self.ids = records, [str(n) for n in range(len(records))]
        self.files, self.content = files, "bench"

    def __len__(self) -> int:
        return len(self.records)


def _processor() -> float:
    usage = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _peak() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB at most"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What packing costs and gives.")
    parser.add_argument("--count", action="store_true", help="also time counting lengths")
    parser.add_argument("--records", type=int, default=665_298, help="how many to count")
    parser.add_argument(
        "--tokenizer",
        default=Path(llava_jax.__file__).parent / "assets/tiny-vicuna",
        type=Path,
        help="folder with tokenizer.model (default: the shipped model's)",
    )
    arguments = parser.parse_args()
    show_plans()
    if arguments.count:
        count_lengths(arguments.records, arguments.tokenizer)
