"""`llava-jax chat`: talk with a model about one or more images, in the terminal or in a pipe.

In a terminal it is a conversation with commands; with --prompt, or a question piped in, it answers
once and ends. Nothing heavy is imported before the model is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError, PromptError, counted, did_you_mean
from llava_jax.settings import SAMPLING, ImageLimits, SamplingSettings, add_options, rows
from llava_jax.util import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.model import LlavaModel, Reply, Stream

SHIPPED_NOTE = (
    "Using `tiny`, the small bundled model, which only knows coloured shapes; "
    "--model FOLDER names another"
)
PASTE_GAP = 0.05  # seconds within which pasted lines follow each other
LIMITS = rows(ImageLimits)
HELP = """  /image FILE ...  show one or more images with the next message
  /system TEXT     set the system prompt and start over, without images (no TEXT: the template's)
  /reset           start over: forget everything said and shown
  /help            this list
  /quit            leave (so does Ctrl-D)
  Ctrl-C stops an answer; pressed twice it exits. Lines that are pasted together are one message.
  A message that starts with // is sent with one slash."""


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
    asking = parser.add_argument_group("prompt and sampling")
    add_options(asking, SAMPLING, [name for name in SAMPLING if name != "stop"])
    loading = parser.add_argument_group("model loading")
    loading.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    loading.add_argument("--base", metavar="MODEL", help="what a LoRA or projector belongs to")
    loading.add_argument(
        "--vision-tower", metavar="MODEL", help="CLIP of a checkpoint that comes without its own"
    )
    loading.add_argument("--allow-pickle", action="store_true", help="read .bin weight files")
    loading.add_argument(
        "--quantize", choices=("nf4", "int8"), default="", help="hold the decoder in 4 or 8 bits"
    )
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

    prompt: str | None = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty", fix="give --prompt TEXT or pipe a question in")
    # Fail fast on typos: loading the model takes minutes.
    settings = given(args, SAMPLING)
    if template := SamplingSettings(**settings).template:
        find_template(template)
    open_file = partial(open_image, limits=Limits(**given(args, LIMITS)), exif=not args.no_exif)
    images = [open_file(file) for file in args.image]
    if args.model is None:
        print(SHIPPED_NOTE, file=sys.stderr, flush=True)
    if prompt is None:
        print(f"loading {args.model or 'tiny'} ...", flush=True)

    from llava_jax.generate.compile_cache import use_compile_cache
    from llava_jax.model import load

    use_compile_cache()
    model = load(
        args.model or "tiny",
        dtype=args.dtype,
        base=args.base,
        vision_tower=args.vision_tower,
        allow_pickle=args.allow_pickle,
        quantize=args.quantize,
        template=template,
    )
    session = Session(model, settings, images, open_file)
    session.talk() if prompt is None else session.once(prompt)
    return 0


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that the command line has."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


class Session:
    """One conversation at a terminal, or one answer in a pipe.

    settings: fields of Request. images: go with the next message. open_file: makes an image of a
    file's name.
    """

    # Not cmd.Cmd: it takes one line at a time, so messages of several pasted lines and Ctrl-C within
    # an answer would need its loop rewritten, and dispatch is five lines.

    def __init__(
        self,
        model: LlavaModel,
        settings: dict[str, Any],
        images: Sequence[Image],
        open_file: Callable[[str], Image],
    ):
        self.model, self.settings, self.open_file = model, settings, open_file
        self.pending = list(images)
        self.unread = ""  # what was pasted after a command
        self.interrupted = threading.Event()  # by Ctrl-C; a second one leaves
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self.show,
            "system": self.set_system,
            "reset": lambda _: self.reset(),
            "help": lambda _: print(HELP),
        }
        self.conversation = model.chat(**settings)

    def once(self, prompt: str) -> None:
        """Answers one prompt on standard output. Ctrl-C is left to the caller."""
        reply = print_pieces(self.conversation.stream(prompt.strip(), self.pending))
        for note in notes(reply):
            print(f"({note})", file=sys.stderr)

    # A conversation ------------------------------------------------------------------------------

    def talk(self) -> None:
        """Reads messages until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
        shown = f", {counted(len(self.pending), 'image')} shown" if self.pending else ""
        print(f"ready{shown}. Type a message, or /help.")
        while True:
            try:
                text = self.read().strip()
                name, rest = command(text)
                if name in ("quit", "exit"):
                    return
                self.interrupted.clear()
                if name is not None:
                    self.run_command(name, rest)
                elif text:
                    self.ask(text.removeprefix("/"))
            except LlavaError as error:
                print(f"\r! {printable(str(error))}")
            except EOFError:
                break
            except KeyboardInterrupt:
                if self.interrupted.is_set():
                    break
                self.interrupted.set()
                print("\n(Press Ctrl-C again to exit)")
        print()

    def read(self) -> str:
        """The next command, or the next message: what is typed up to Enter, or pasted.

        Raises EOFError and KeyboardInterrupt, as input() does.
        """
        # A terminal with bracketed paste hands readline a paste as one line, newlines in it; without,
        # or for a paste made while the model was answering, its lines come one by one, but at once.
        text, self.unread = self.unread or input("you> "), ""
        if command(text.strip())[0] is not None:  # it ends with its line
            text, _, self.unread = text.strip().partition("\n")
            return text
        with contextlib.suppress(EOFError):
            while more_waits():
                text += "\n" + input()
        return text

    def run_command(self, name: str, rest: str) -> None:
        """Carries a command out. Raises PromptError for one that does not exist."""
        if name in self.commands:
            return self.commands[name](rest)
        fix = did_you_mean(name, [*self.commands, "quit"], "/{}") or "see /help"
        if os.path.isfile(f"/{name} {rest}".strip()):  # dropped into the terminal, perhaps
            fix = "/image FILE shows a file"
        raise PromptError(f"there is no /{name}", fix=fix)

    def ask(self, text: str) -> None:
        """Prints the answer as it comes. Ctrl-C ends it between two steps of the model."""

        def interrupt(*_):
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            self.interrupted.set()

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            print("model> ", end="", flush=True)
            stream = self.conversation.stream(text, self.pending)
            stream.cancelled = self.interrupted
            shown, self.pending = self.pending, []
            reply = print_pieces(stream)
        finally:
            signal.signal(signal.SIGINT, before)
        self.interrupted.clear()  # at the prompt, Ctrl-C asks once before it leaves
        if not reply.text:  # such a turn is not remembered
            self.pending = shown
        for note in notes(reply):
            print(f"({note})")
        if self.pending:
            print(f"({waiting(self.pending)})")

    def show(self, rest: str) -> None:
        """/image: opens files for the next message; all of them or none."""
        files = file_names(rest)
        if not files:
            raise PromptError("which file?", fix="/image FILE")
        self.pending += [self.open_file(file) for file in files]
        print(f"({waiting(self.pending)})")

    def set_system(self, text: str) -> None:
        """/system: another system prompt, and a new conversation."""
        self.settings["system"] = text or None
        self.reset()

    def reset(self) -> None:
        """/reset: a new conversation, without the images that were shown or were to be."""
        had_images = bool(self.pending or self.conversation.has_images)
        self.conversation, self.pending = self.model.chat(**self.settings), []
        again = "; show the image again with /image" if had_images else ""
        print(f"(a new conversation{again})")


def print_pieces(stream: Stream) -> Reply:
    """Prints an answer as it comes, and returns it."""
    for piece in stream:
        print(printable(piece), end="", flush=True)
    print()
    return stream.reply


def notes(reply: Reply) -> list[str]:
    """What a reader of the answer's text would not see."""
    said = {
        "no answer": not reply.text,
        f"cut off after {len(reply.ids)} tokens": reply.finish_reason == "length",
        "stopped": reply.finish_reason == "cancelled",
    }
    return [note for note, is_so in said.items() if is_so]


def waiting(images: Sequence[Image]) -> str:
    """What /image says of the images that the next message will show."""
    return f"{counted(len(images), 'image')} to go with your next message"


def command(text: str) -> tuple[str | None, str]:
    """(name, rest) of "/name rest"; the name of a message is None."""
    if not text.startswith("/") or text.startswith("//"):
        return None, text
    name, _, rest = text[1:].partition(" ")
    return name, rest.strip()


def more_waits() -> bool:
    """Whether further input arrives within PASTE_GAP."""
    import select

    try:
        return bool(select.select([sys.stdin], [], [], PASTE_GAP)[0])
    except (OSError, ValueError):  # no terminal of a kind that can be asked
        return False


def file_names(text: str) -> list[str]:
    """File names as a shell reads them, so that quoted and dropped ones work; else the whole text."""
    from llava_jax.images.decode import local_path

    if text and os.path.exists(local_path(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe in a name
        return [text]
