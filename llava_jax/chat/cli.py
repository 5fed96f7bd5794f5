"""The command: its options, and which of its forms is meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from llava_jax.chat.files import read_schema
from llava_jax.chat.folder import answer_folder, answered, asked, check_folder
from llava_jax.chat.session import Session
from llava_jax.errors import PromptError
from llava_jax.settings import (
    SAMPLING,
    ImageLimits,
    SamplingSettings,
    add_loading_options,
    add_options,
    loading_options,
    rows,
)

SHIPPED_NOTE = (
    "Using `tiny`, the small bundled model, which only knows coloured shapes; "
    "--model FOLDER names another"
)
LIMITS = rows(ImageLimits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model",
        help="checkpoint folder, hub id, or tiny: the small one that comes with llava_jax and only "
        "knows coloured shapes (default)",
    )
    parser.add_argument(
        "--image",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="show these first (paths or file:// URIs; nothing is fetched)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer, and end")
    parser.add_argument(
        "--folder", metavar="DIR", help="ask --prompt about every image of a folder, alone"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="with --folder: JSON lines; run again, and it goes on"
    )
    parser.add_argument(
        "--json", metavar="SCHEMA", help="answer in JSON by a schema: a file, or the text itself"
    )
    asking = parser.add_argument_group("prompt and sampling")
    add_options(asking, SAMPLING, [name for name in SAMPLING if name != "stop"])
    add_loading_options(parser)
    images = parser.add_argument_group("image limits")
    add_options(images, LIMITS, LIMITS)
    images.add_argument(
        "--no-exif",
        action="store_true",
        help="ignore EXIF rotation: photographs as they are stored",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises LlavaError for a model, image or setting that cannot be used."""
    from llava_jax.images.decode import Limits, open_image
    from llava_jax.text.conversation import find_template

    check_folder(args)
    loading = loading_options(args)
    prompt: str | None = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = piped()
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty", fix="give --prompt TEXT or pipe a question in")
    # Fail fast on typos: loading the model takes minutes.
    settings = given(args, SAMPLING)
    if args.json:
        settings["response_format"] = read_schema(args.json)
    if loading["adapters"]:
        settings["adapter"] = next(iter(loading["adapters"]))
    if template := SamplingSettings(**given(args, SAMPLING)).template:
        find_template(template)
    open_file = partial(open_image, limits=Limits(**given(args, LIMITS)), exif=not args.no_exif)
    images = [open_file(file) for file in args.image]
    head = asked(args, settings, loading)
    if args.folder:
        answered(Path(args.out), head)
    if args.model is None:
        print(SHIPPED_NOTE, file=sys.stderr, flush=True)
    if prompt is None:
        print(f"loading {args.model or 'tiny'} ...", flush=True)

    from llava_jax.generate.compile_cache import use_compile_cache
    from llava_jax.generate.request import Request
    from llava_jax.model import load

    Request.of("", (), settings)  # for its checks
    use_compile_cache()
    model = load(
        args.model or "tiny",
        **loading,
        template=template,
    )
    if args.folder:
        return answer_folder(model, settings, args, open_file, head)
    session = Session(model, settings, images, open_file)
    session.names = list(args.image)
    session.talk() if prompt is None else session.once(prompt)
    return 0


def piped() -> str:
    """The question on standard input. Raises PromptError for bytes that are no text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        what = f"the piped question is not {sys.stdin.encoding} text"
        raise PromptError(what, fix="iconv -t utf-8 converts it") from None


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that the command line has."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}
