"""`llava-jax chat --folder DIR --prompt TEXT --out FILE`: one question about each picture of a folder.

A line of FILE is one answer, written as soon as it is there. Run again, the command asks about those
that FILE does not have.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.chat.files import parsed
from llava_jax.errors import ConfigError, LlavaError, PromptError, counted
from llava_jax.progress import progress
from llava_jax.util import json_lines

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.model import LlavaModel

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ROWS = 16
"""Pictures that are answered together."""


def check_folder(args: argparse.Namespace) -> None:
    """Raises an error for options that do not go together, and for a folder without pictures."""
    if bool(args.folder) != bool(args.out):
        raise ConfigError("--folder and --out go together", fix="--folder DIR --out FILE.jsonl")
    if args.folder:
        if args.prompt is None or args.image:
            raise PromptError("--folder asks --prompt about each image alone", fix="--prompt TEXT")
        if not pictures(args.folder):
            raise ConfigError(f"{args.folder} has no images", fix=f"their names end in {ENDINGS}")
        answered(Path(args.out), args.prompt)


def pictures(folder: str) -> list[str]:
    """Names of the pictures below a folder, in order."""
    found = []
    for top, folders, names in os.walk(folder):
        folders.sort()
        found += [os.path.join(top, n) for n in sorted(names) if n.lower().endswith(ENDINGS)]
    return [os.path.relpath(path, folder) for path in found]


def answered(out: Path, prompt: str) -> set[str]:
    """The pictures that a file has answers for; a last line that was cut off is taken away.

    Raises ConfigError for a file that is not of this question.
    """
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = set()
    for number, line in json_lines(whole.decode("utf-8", "replace")):
        row = parsed(line, f"{out}, line {number}")
        if not isinstance(row, Mapping) or "image" not in row or row.get("prompt") != prompt:
            what = f"{out}, line {number} is no answer to this question"
            raise ConfigError(what, fix="--out another file")
        found.add(str(row["image"]))
    if len(whole) < len(data):
        with open(out, "r+b") as file:
            file.truncate(len(whole))
    return found


def answer_folder(
    model: LlavaModel,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
    open_file: Callable[[str], Image],
) -> int:
    """Runs it. A picture that cannot be read is named and has no line, so that it is tried again.

    Raises LlavaError at the end where there was one.
    """
    out, every = Path(args.out), pictures(args.folder)
    done = answered(out, args.prompt)
    left = [name for name in every if name not in done]
    failed = 0
    with (
        open(out, "a", encoding="utf-8") as file,
        progress(len(every), "answers", "image", initial=len(every) - len(left)) as bar,
    ):
        for start in range(0, len(left), ROWS):
            names = left[start : start + ROWS]
            for row in _rows(model, settings, args, open_file, names):
                failed += "error" in row
                if "error" in row:
                    bar.write(f"{row['image']}: {row['error']}")
                else:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update(1)
            file.flush()
    if failed:
        raise LlavaError(f"{counted(failed, 'image')} could not be answered", fix="see above")
    return 0


def _rows(
    model: LlavaModel,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
    open_file: Callable[[str], Image],
    names: list[str],
) -> Iterator[dict[str, Any]]:
    from llava_jax.generate.request import Request

    asked, requests = [], []
    for name in names:
        try:
            image = open_file(os.path.join(args.folder, name))
        except LlavaError as error:
            yield {"image": name, "error": str(error)}
            continue
        asked.append(name)
        requests.append(Request(args.prompt, (image,), **settings))
    replies = model.generate_batch(requests, batch_size=ROWS, on_error="reply")
    for name, reply in zip(asked, replies):
        if reply.error:
            yield {"image": name, "error": reply.error}
            continue
        head = {"image": name, "prompt": args.prompt, "answer": reply.text}
        yield {**head, "finish_reason": reply.finish_reason, "tokens": len(reply.ids)}
