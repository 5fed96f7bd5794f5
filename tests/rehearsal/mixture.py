"""Makes the 558K captions and the 665K mixture in small, with their proportions and their faults.

    python -m tests.rehearsal.mixture OUT --records 240 --seed 0

OUT/llava_v1_5_mix665k.json with OUT/data, OUT/blip_laion_cc_sbu_558k.json with OUT/images, and
OUT/manifest.json: which records are bad and why, and what the data report must count. Equal
arguments make equal files.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.rehearsal.odd import BAD, BAD_PICTURES, GOOD_PICTURES, ODD, draw
from tests.rehearsal.sources import SOURCES, phrase, sentence, shares

INSTRUCT, CAPTIONS = "llava_v1_5_mix665k.json", "blip_laion_cc_sbu_558k.json"
FEWEST = 200  # below, the odd and bad ones, one of each kind, would be more than a tenth
ASK = ("Describe the image concisely.", "What is this?", "Write a terse summary of the image.")


def make(out: Path, *, records: int = 240, captions: int = 0, seed: int = 0) -> dict[str, Any]:
    """Writes both sets; the manifest: {"instruct": {...}, "captions": {...}}.

    captions: records of stage 1; 0: as many as 558K is to 665K. Each part of the manifest has
    file, image_folder, records, sources (record indices by source), bad [{index, id, kind, why}],
    notes {name of a counter: count}, long (indices beyond 2,048 positions) and text_only (indices).
    """
    if records < FEWEST:
        raise ValueError(f"at least {FEWEST} records are needed for one bad record of each kind")
    manifest = {
        "instruct": _instruct(out, records, np.random.default_rng(seed)),
        "captions": _captions(
            out, captions or round(records * 558 / 665), np.random.default_rng(seed + 1)
        ),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _instruct(out: Path, total: int, rng: np.random.Generator) -> dict[str, Any]:
    made, source_of = [], []
    for source in SOURCES:
        for i in range(shares(total)[source.name]):
            made.append(source.make(rng, i))
            source_of.append(source.name)
    order = rng.permutation(total)
    made, source_of = [made[i] for i in order], [source_of[i] for i in order]
    long = [i for i, r in enumerate(made) if len(r["conversations"]) > 24 and "image" not in r]
    with_picture = [i for i in rng.permutation(total) if "image" in made[i]]
    text = [i for i in rng.permutation(total) if "image" not in made[i] and i not in long]
    ocr = [i for i in with_picture if source_of[i] == "ocrvqa"]
    # Faults go to records whose picture no other record has, so that nothing else is hit.
    alone = [i for i in with_picture if source_of[i] not in ("aokvqa", "ocrvqa")]

    bad, notes, special = [], {}, {}
    for fault in BAD:
        at = int((alone if fault.pictures else text).pop())
        made[at] = fault.change(made[at], rng)
        bad.append({"index": at, "kind": fault.kind, "why": fault.why})
    for odd in ODD:
        at = int((alone if odd.pictures else text).pop())
        made[at] = odd.change(made[at], rng)
        if odd.note:
            notes[odd.note] = notes.get(odd.note, 0) + 1
    for kind, why in BAD_PICTURES.items():
        at = int((ocr if "ending" in kind else alone).pop())
        special[made[at]["image"]] = kind
        bad.append({"index": at, "kind": f"picture {kind}", "why": why})
    for kind in GOOD_PICTURES:
        special[made[int((ocr if "named" in kind else alone).pop())]["image"]] = kind
    for row in bad:
        row["id"] = _id(made[row["index"]], row["index"])

    spoiled = {row["index"] for row in bad if not row["kind"].startswith("picture")}
    _draw_all(out / "data", [r for i, r in enumerate(made) if i not in spoiled], special, rng)
    _write(out / INSTRUCT, made)
    return {
        "file": INSTRUCT,
        "image_folder": "data",
        "records": total,
        "sources": {
            s.name: [i for i, name in enumerate(source_of) if name == s.name] for s in SOURCES
        },
        "bad": sorted(bad, key=lambda row: row["index"]),
        "notes": notes,
        "long": long,
        "text_only": [i for i, r in enumerate(made) if i not in spoiled and not r.get("image")],
    }


def _captions(out: Path, total: int, rng: np.random.Generator) -> dict[str, Any]:
    made = []
    for i in range(total):
        image = f"{i // 10:05d}/{i // 10:05d}{i % 10:04d}.jpg"
        ask = str(rng.choice(ASK))
        # The tag stands before or after the instruction, which stage 1 discards.
        question = f"{ask}\n<image>" if rng.random() < 0.5 else f"<image>\n{ask}"
        caption = phrase(rng) if rng.random() < 0.7 else sentence(rng)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        made.append({"id": image[6:-4], "image": image, "conversations": turns})
    bad, special = [], {}
    places = [int(i) for i in rng.permutation(total)]
    for kind in ("missing", "cut off", "a web page", "no bytes"):
        at = places.pop()
        special[made[at]["image"]] = kind
        bad.append({"index": at, "kind": f"picture {kind}", "why": BAD_PICTURES[kind]})
    at = places.pop()
    made[at]["conversations"] = made[at]["conversations"][:1]
    bad.append({"index": at, "kind": "no caption", "why": "two turns"})
    for row in bad:
        row["id"] = _id(made[row["index"]], row["index"])
    _draw_all(out / "images", made, special, rng)
    _write(out / CAPTIONS, made)
    return {
        "file": CAPTIONS,
        "image_folder": "images",
        "records": total,
        "sources": {"blip_laion_cc_sbu": list(range(total))},
        "bad": sorted(bad, key=lambda row: row["index"]),
        "notes": {},
        "long": [],
        "text_only": [],
    }


def _id(record: Any, index: int) -> str:
    own = record.get("id") if isinstance(record, dict) else None
    return str(index if own is None else own)


def _draw_all(folder: Path, records: list, special: dict[str, str], rng) -> None:
    for record in records:
        images = record.get("image") or []
        for image in [images] if isinstance(images, str) else images:
            if not (folder / image).exists():
                draw(folder / image, rng, special.get(image, ""))


def _write(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=240)
    parser.add_argument("--captions", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    manifest = make(args.out, records=args.records, captions=args.captions, seed=args.seed)
    for name, part in manifest.items():
        print(
            f"{name:9} {part['records']:6} records, {len(part['bad'])} of them bad, {part['file']}"
        )


if __name__ == "__main__":
    main()
