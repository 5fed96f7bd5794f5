"""`llava-jax data show FILE N`: samples as the model sees them, on a terminal or as a page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.data.json_file import JsonFile
from llava_jax.data.records import check_record
from llava_jax.data.stored import records_path
from llava_jax.datasets.prompt import maker_of, prompt_of
from llava_jax.errors import SampleError
from llava_jax.images.decode import open_image
from llava_jax.images.pixels import to_pixels
from llava_jax.text.example import LEFT_OUT, TRUNCATED, Example
from llava_jax.text.records import record_id
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.show import pieces, show_example, summary, wants_colour
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.util import printable, write_text

log = logging.getLogger(__name__)

COLUMNS = 56
"""How wide a picture is on a terminal, in characters."""


def run(args: argparse.Namespace) -> int:
    """Prints the samples, or writes them as a page."""
    tokenizer, config = prompt_of(args)
    make = maker_of(args, tokenizer, config)
    args.file = records_path(args.file)
    records = JsonFile(args.file)
    found = find_records(records, args.samples)
    shown = [_shown(args, *found[wanted], make, config) for wanted in args.samples]
    if args.html:
        write_text(args.html, page(shown, tokenizer, config))
        print(f"{args.html}: {len(shown)} of {len(records):,} samples")
        return 0
    colour = {"always": True, "never": False, "auto": wants_colour()}[args.color]
    for n, sample in enumerate(shown):
        print("\n\n" * bool(n) + in_text(sample, tokenizer, config, colour, args.tokens))
    return 0


class Shown(NamedTuple):
    """A sample with its pictures after preprocessing (uint8[S, S, 3] by path) and remarks."""

    example: Example
    pixels: dict[str, np.ndarray]
    notes: list[str]


def find_records(records: JsonFile, wanted: Sequence[str]) -> dict[str, tuple[int, Any]]:
    """Wanted -> (index, record) of the sample whose id that is, else of the one at that index.

    Ids go first; the heading says which of the two was found. Raises SampleError if neither is.
    """
    ids: dict[str, tuple[int, Any]] = {}
    indices: dict[int, Any] = {}
    alike: Counter[str] = Counter()
    numbers = {int(w) for w in wanted if w.lstrip("-").isdigit()}
    for i, record in enumerate(records.scan()):
        if (name := record_id(record, i)) in wanted:
            ids.setdefault(name, (i, record))
            alike[name] += 1
        if i in numbers:
            indices[i] = record
    count = len(records)
    if not count:
        raise SampleError(f"{records.path}: there are no samples")
    found = {}
    for name in wanted:
        at = int(name) if name.lstrip("-").isdigit() else count
        if name in ids:
            found[name] = ids[name]
            if alike[name] > 1:
                told = f"{alike[name]:,} samples have the id {name!r}"
                log.warning("%s: %s; the first is shown", records.path, told)
        elif -count <= at < count:
            found[name] = at % count, indices[at] if at >= 0 else records[at % count]
        else:
            fix = f"give an id, or an index from 0 to {count - 1}"
            raise SampleError(f"{records.path}: no sample {name!r}", fix=fix)
    return found


def _shown(
    args: argparse.Namespace,
    index: int,
    record: Any,
    make: ExampleMaker,
    config: LlavaConfig,
) -> Shown:
    where = f"{Path(args.file).name}[{index}]"
    check_record(record, where)
    example = make(record, record_id(record, index))
    pixels, notes = {}, []
    for note, count in sorted(example.notes.items()):
        limit = f" at {_limit(args, make, config)}" if note in (TRUNCATED, LEFT_OUT) else ""
        notes.append(f"{note}{limit} ({count})")
    places = [Path(args.images)] if args.images else [Path(args.file).parent, Path()]
    for name in dict.fromkeys(map(str, example.images)):
        found = next((place / name for place in places if os.path.isfile(place / name)), None)
        if found is None and not args.images:
            looked = " or ".join(dict.fromkeys(str(place.absolute()) for place in places))
            notes.append(f"image {name} is no file below {looked}; --images names its folder")
        else:  # a missing one is refused by name
            path = found or places[0] / name
            pixels[name] = to_pixels(open_image(path, name=f"{where}: {path}"), config)
    return Shown(example, pixels, notes)


def _limit(args: argparse.Namespace, make: ExampleMaker, config: LlavaConfig) -> str:
    """Where a sample is cut, in words."""
    if args.max_length:
        return f"{make.max_length} positions (--max-length)"
    return (
        f"{make.max_length} positions, the max_length of the model's config, which has "
        f"{config.language.max_positions:,}; in training data.max_length is the limit"
    )


# Terminal -----------------------------------------------------------------------------------------


def in_text(
    sample: Shown, tokenizer: Tokenizer, config: LlavaConfig, colour: bool, table: bool = False
) -> str:
    """A sample for a terminal; its pictures too where there are colours."""
    pictures = [blocks(pixels) for pixels in sample.pixels.values()] if colour else []
    text = show_example(
        sample.example, tokenizer, image_tokens=config.image_tokens, colour=colour, table=table
    )
    notes = [f"note: {printable(note)}" for note in sample.notes]
    return "\n\n".join([*pictures, text, *notes])


def blocks(pixels: np.ndarray, columns: int = COLUMNS) -> str:
    """A picture as half blocks of two colours each: a line of text is two lines of it."""
    height = 2 * round(columns * pixels.shape[0] / pixels.shape[1] / 2)
    small = np.asarray(Image.fromarray(pixels).resize((columns, height), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(small[::2], small[1::2]):
        cells = (
            f"\033[38;2;{r};{g};{b};48;2;{x};{y};{z}m▀"
            for (r, g, b), (x, y, z) in zip(upper.tolist(), lower.tolist())
        )
        lines.append("".join(cells) + "\033[0m")
    return "\n".join(lines)


# Page ---------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 1100px; padding: 24px; font: 16px/1.5 system-ui, sans-serif }}
h2 {{ font-size: 17px; margin: 36px 0 8px }} .note {{ color: #a33 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: 14px }}
b {{ background: #cdeccb; font-weight: 600 }} i {{ color: #2a6f97 }} img {{ margin-right: 8px }}
</style>
<p>Marked text is trained. Pictures are what the vision tower gets.</p>
{body}
</html>
"""


def page(samples: Sequence[Shown], tokenizer: Tokenizer, config: LlavaConfig) -> str:
    """The samples as one HTML page that needs no other file."""
    parts = []
    for sample in samples:
        parts.append(f"<h2>{_safe(summary(sample.example, config.image_tokens))}</h2>")
        parts += [
            f'<img src="data:image/png;base64,{_png(pixels)}" title="{_safe(name)}" alt="">'
            for name, pixels in sample.pixels.items()
        ]
        parts.append(f"<pre>{''.join(_marked(sample.example, tokenizer))}</pre>")
        parts += [f'<p class="note">{_safe(note)}</p>' for note in sample.notes]
    return _PAGE.format(title="Training samples", body="\n".join(parts))


def _marked(example: Example, tokenizer: Tokenizer) -> Iterator[str]:
    for kind, text in pieces(example, tokenizer):
        match kind:
            case "trained":
                yield f"<b>{_safe(text)}</b>"
            case "image":
                yield f"<i>&lt;image {_safe(text)}&gt;</i>"
            case "turn":
                yield f"\n<i>-- turn {_safe(text)} --</i>\n"
            case _:
                yield _safe(text)


def _safe(text: str) -> str:
    return html.escape(printable(text))


def _png(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
