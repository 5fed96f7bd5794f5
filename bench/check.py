"""What `llava-jax data check` takes on many records: two to a picture, hostile files among them.

    python bench/check.py                                  # 100,000 records, 50,000 pictures (4 GB)
    python bench/check.py --records 2000 --bad DIR         # DIR: files that a picture's name may lead to

The pictures are 640x480 cuts of one large field of noise like that of photographs (1/f). Prints what the
command prints, and the processor seconds of all its processes. The pictures stay in --folder for the next run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.data import photograph

WORDS = (
    "what is the color of this thing in picture where are people doing left right red blue".split()
)
SIDE = 4096


def main() -> int:
    """Makes what is missing and runs the command on it; the command's exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("check-100000"))
    parser.add_argument("--bad", type=Path, help="a folder of hostile and odd files")
    args = parser.parse_args()
    images = args.folder / "images"
    names = pictures(images, args.records // 2)
    chosen = random.Random(0)
    records = [record(number, names[number // 2], chosen) for number in range(len(names) * 2)]
    if args.bad:  # by a link: what lies outside of the image folder is refused unread
        (images / "bad").unlink(missing_ok=True)
        (images / "bad").symlink_to(args.bad.absolute())
        bad = sorted(p.relative_to(args.bad) for p in args.bad.rglob("*") if p.is_file())
        for file, instead in zip(bad, records[:: max(1, len(records) // max(1, len(bad)))]):
            instead["image"] = f"bad/{file}"
    path = args.folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    words = ["data", "check", str(path), "--images", str(images)]
    begun = time.monotonic()
    code = subprocess.run([sys.executable, "-m", "llava_jax", *words]).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{time.monotonic() - begun:.0f} s, {used.ru_utime + used.ru_stime:.0f} CPU s")
    return code


def pictures(folder: Path, count: int) -> list[str]:
    """The names of `count` JPEGs below the folder; makes those that are missing."""
    names = [f"{n // 1000:03d}/{n:06d}.jpg" for n in range(count)]
    chosen, field = random.Random(0), None
    for name in names:
        x, y = chosen.randrange(SIDE - 640), chosen.randrange(SIDE - 480)
        quality = chosen.randrange(70, 90)
        if (folder / name).exists():
            continue
        field = field or photograph(np.random.RandomState(0), SIDE, SIDE)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        field.crop((x, y, x + 640, y + 480)).save(folder / name, quality=quality)
    return names


def record(number: int, image: str, chosen: random.Random) -> dict[str, Any]:
    """One conversation of one to eight turns about the picture."""
    turns = []
    for turn in range(chosen.choice((1, 1, 2, 4, 8))):
        asked = " ".join(chosen.choices(WORDS, k=chosen.randrange(5, 14)))
        answer = " ".join(chosen.choices(WORDS, k=chosen.randrange(1, 40)))
        tag = "" if turn else "<image>\n"
        turns.append({"from": "human", "value": f"{tag}{asked} {number}?"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": f"r{number}", "image": image, "conversations": turns}


if __name__ == "__main__":
    sys.exit(main())
