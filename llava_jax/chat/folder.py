"""`llava-jax chat --folder DIR --prompt TEXT --out FILE`: one question about each picture of a folder.

A line of FILE is one answer; pictures are answered ROWS at a time, and their lines written then. Run
again, the command asks about those that FILE does not have.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.chat.files import parsed
from llava_jax.errors import ConfigError, LlavaError, PromptError, counted
from llava_jax.progress import progress
from llava_jax.settings import LOADING, SAMPLING
from llava_jax.util import LineFile, json_lines, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.model import LlavaModel

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ROWS = 16
"""Pictures that are answered together."""


def check_folder(args: argparse.Namespace) -> None:
    """Raises an error for options that do not go together, and for folders that are not as needed."""
    if bool(args.folder) != bool(args.out):
        raise ConfigError("--folder and --out go together", fix="--folder DIR --out FILE.jsonl")
    if args.folder:
        if args.prompt is None or args.image:
            raise PromptError("--folder asks --prompt about each image alone", fix="--prompt TEXT")
        if not pictures(args.folder):
            raise ConfigError(f"{args.folder} has no images", fix=f"their names end in {ENDINGS}")
        out = Path(args.out).absolute()
        if not out.parent.is_dir():
            raise ConfigError(f"{args.out}: there is no folder {out.parent}", fix="make it first")
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise ConfigError(f"{args.out} cannot be written", fix="--out another file")


def pictures(folder: str) -> list[str]:
    """Names of the pictures below a folder, in order."""
    found = []
    for top, folders, names in os.walk(folder):
        folders.sort()
        found += [os.path.join(top, n) for n in sorted(names) if n.lower().endswith(ENDINGS)]
    return [os.path.relpath(path, folder) for path in found]


def asked(
    args: argparse.Namespace, settings: Mapping[str, Any], loading: Mapping[str, Any]
) -> dict[str, Any]:
    """What each row says of how it was asked: the prompt, the model, and a digest of what was set.

    Values that are the defaults anyway count as not set.
    """
    table, options = {**SAMPLING, **LOADING}, {**loading, **settings, "no_exif": args.no_exif}
    del options["allow_pickle"]
    told = {
        name: value
        for name, value in options.items()
        if (value != table[name].default if name in table else value)
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    return {"prompt": args.prompt, "model": args.model or "tiny", "settings": digest}


def answered(out: Path, head: Mapping[str, Any]) -> set[str]:
    """The pictures that a file has answers for; a last line that was cut off is taken away.

    head: of `asked`. Raises ConfigError for a file that has answers to another question, of another
    model or with other settings.
    """
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = set()
    for number, line in json_lines(whole.decode("utf-8", "replace")):
        row = parsed(line, f"{out}, line {number}")
        what = f"{out}, line {number}"
        if (
            not isinstance(row, Mapping)
            or "image" not in row
            or row.get("prompt") != head["prompt"]
        ):
            raise ConfigError(f"{what} is no answer to this question", fix="--out another file")
        # Rows of earlier versions have neither model nor settings.
        if (model := row.get("model", head["model"])) != head["model"]:
            raise ConfigError(f"{what} is by the model {model!r}", fix="--out another file")
        if row.get("settings", head["settings"]) != head["settings"]:
            raise ConfigError(f"{what} was made with other settings", fix="--out another file")
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
    head: Mapping[str, Any],
) -> int:
    """Runs it. A picture that cannot be read is named and has no line, so that it is tried again.

    head: of `asked`. Raises LlavaError at the end where there was one, OSError where FILE cannot be written.
    """
    out, every = Path(args.out), pictures(args.folder)
    done = answered(out, head)
    left = [name for name in every if name not in done]
    failed = 0
    with (
        contextlib.closing(LineFile(out)) as file,
        progress(len(every), "answers", "image", initial=len(every) - len(left)) as bar,
    ):
        for start in range(0, len(left), ROWS):
            names = left[start : start + ROWS]
            for row in _rows(model, settings, args, open_file, names):
                failed += "error" in row
                if "error" in row:
                    bar.write(printable(f"{row['image']}: {row['error']}"))
                else:
                    line = {"image": row["image"], **head, **row}
                    file.add(json.dumps(line, ensure_ascii=False))
                bar.update(1)
            file.sync()
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
        row = {"image": name, "answer": reply.text}
        yield {**row, "finish_reason": reply.finish_reason, "tokens": len(reply.ids)}
