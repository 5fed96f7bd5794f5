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
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError, PromptError, counted, did_you_mean
from llava_jax.settings import SAMPLING, ImageLimits, SamplingSettings, add_options, rows
from llava_jax.util import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.images.decode import Limits
    from llava_jax.model import Conversation, LlavaModel

SHIPPED = "tiny"
YOU, MODEL = "you> ", "model> "
SHIPPED_NOTE = (
    "tiny answers, the small model that comes with llava_jax; it only knows coloured shapes: "
    "give --model FOLDER for another"
)
PASTE_GAP = 0.05  # seconds within which pasted lines follow each other
LIMITS = rows(ImageLimits)
HELP = """  /image FILE ...  show one or more images with the next message
  /system TEXT     set the system prompt and start anew (no TEXT: the template's own)
  /reset           forget everything said and shown
  /help            this list
  /quit            leave (so does Ctrl-D)
  Ctrl-C stops an answer; a second one leaves. Lines that are pasted together are one message.
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
    asking = parser.add_argument_group("how it is asked and answers are chosen")
    add_options(asking, SAMPLING, [name for name in SAMPLING if name != "stop"])
    loading = parser.add_argument_group("how the model is loaded")
    loading.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    loading.add_argument("--base", metavar="MODEL", help="what a LoRA or projector belongs to")
    loading.add_argument(
        "--vision-tower", metavar="MODEL", help="CLIP of a checkpoint that comes without its own"
    )
    loading.add_argument("--allow-pickle", action="store_true", help="read .bin weight files")
    images = parser.add_argument_group("what images may be")
    add_options(images, LIMITS, LIMITS)
    images.add_argument(
        "--no-exif", action="store_true", help="leave photographs as stored, not turned upright"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command. Raises LlavaError for a model, image or setting that cannot be used."""
    prompt: str | None = args.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise PromptError("the prompt is empty", fix="give --prompt TEXT or pipe a question in")
    images = check(args)
    if args.model is None:
        print(SHIPPED_NOTE, file=sys.stderr, flush=True)
    if prompt is None:
        print(f"loading {args.model or SHIPPED} ...", flush=True)
        return Session(load_model(args), args, images).talk()
    return Session(load_model(args), args, images).once(prompt)


def check(args: argparse.Namespace) -> list[Image]:
    """The images of the command line, opened. Raises LlavaError for what cannot be shown or set.

    Before the model is loaded: that takes minutes, and a mistyped name need not wait for it.
    """
    from llava_jax.text.conversation import find_template

    settings = SamplingSettings(**given(args, SAMPLING))
    if settings.template is not None:
        find_template(settings.template)
    limits_of(args)
    return [open_picture(file, args) for file in args.image]


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the settings that the command line has."""
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def limits_of(args: argparse.Namespace) -> Limits:
    """What images may be. Raises ConfigError for a limit that means nothing."""
    from llava_jax.images.decode import Limits

    return Limits(**given(args, LIMITS))


def open_picture(file: str, args: argparse.Namespace) -> Image:
    """The image in a file. Raises ImageError."""
    from llava_jax.images.decode import open_image

    return open_image(file, limits_of(args), exif=not args.no_exif)


def load_model(args: argparse.Namespace) -> LlavaModel:
    """The model that the command line names. Compiled programs are kept for the next time."""
    from llava_jax.generate.compile_cache import use_compile_cache
    from llava_jax.model import load

    use_compile_cache()
    return load(
        args.model or SHIPPED,
        dtype=args.dtype,
        base=args.base,
        vision_tower=args.vision_tower,
        allow_pickle=args.allow_pickle,
        template=getattr(args, "template", None),
    )


class Session:
    """One conversation at a terminal, or one answer in a pipe."""

    # Not cmd.Cmd: it takes one line at a time, so messages of several pasted lines and Ctrl-C within
    # an answer would need its loop written anew, and dispatch is five lines.

    def __init__(self, model: LlavaModel, args: argparse.Namespace, images: list[Image]):
        self.model, self.args, self.settings = model, args, given(args, SAMPLING)
        self.pending = list(images)  # they go with the next message
        self.unread = ""  # what was pasted after a command
        self.commands: dict[str, Callable[[str], None]] = {
            "image": self.show,
            "system": self.set_system,
            "reset": lambda _: self.reset(),
            "help": lambda _: print(HELP),
        }
        self.conversation = self._begin()

    def _begin(self) -> Conversation:
        return self.model.chat(**self.settings)

    def once(self, prompt: str) -> int:
        """Answers one prompt on standard output. Ctrl-C is left to the caller."""
        stream = self.conversation.stream(prompt.strip(), self.pending)
        for piece in stream:
            print(printable(piece), end="", flush=True)
        print()
        if not stream.reply.text:
            print("(no answer)", file=sys.stderr)
        if stream.reply.finish_reason == "length":
            print(f"(cut off after {len(stream.reply.ids)} tokens)", file=sys.stderr)
        return 0

    # A conversation ------------------------------------------------------------------------------

    def talk(self) -> int:
        """Reads messages until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() line editing and a history
        shown = f", {counted(len(self.pending), 'image')} shown" if self.pending else ""
        print(f"ready{shown}. Type a message, or /help.")
        interrupted = False
        while True:
            try:
                text = self._read().strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                print("\n(Ctrl-C once more leaves)")
                continue
            name, rest = command(text)
            if name in ("quit", "exit"):
                return 0
            interrupted = False
            try:
                if name is not None:
                    self._command(name, rest)
                elif text:
                    interrupted = self._ask(text.removeprefix("/"))
            except KeyboardInterrupt:  # the second one within an answer
                break
            except LlavaError as error:
                print(f"\r! {printable(str(error))}")
        print()
        return 0

    def _read(self) -> str:
        """The next message or command. Of pasted lines, one that begins with a command ends there."""
        text, self.unread = self.unread or read_message(), ""
        if command(text.strip())[0] is not None:
            text, _, self.unread = text.strip().partition("\n")
        return text

    def _command(self, name: str, rest: str) -> None:
        if name in self.commands:
            self.commands[name](rest)
            return
        fix = did_you_mean(name, [*self.commands, "quit"], "/{}") or "see /help"
        if os.path.isfile(f"/{name} {rest}".strip()):  # dropped into the terminal, perhaps
            fix = "/image FILE shows a file"
        raise PromptError(f"there is no /{name}", fix=fix)

    def _ask(self, text: str) -> bool:
        """Prints the answer as it comes. Whether Ctrl-C stopped it."""
        with stoppable() as stopped:
            print(MODEL, end="", flush=True)
            stream = self.conversation.stream(text, self.pending)
            stream.cancelled = stopped
            shown, self.pending = self.pending, []
            for piece in stream:
                print(printable(piece), end="", flush=True)
        print()
        reply = stream.reply
        if reply.finish_reason == "length":
            print(f"(cut off after {len(reply.ids)} tokens)")
        if not reply.text:  # such a turn is not remembered
            self.pending = shown
            again = f"; {_waiting(shown)}" if shown else ""
            print(f"(no answer{again})")
        if stopped.is_set():
            print("(stopped)")
        return stopped.is_set()

    def show(self, rest: str) -> None:
        """/image: opens files for the next message; all of them or none."""
        files = file_names(rest)
        if not files:
            raise PromptError("which file?", fix="/image FILE")
        self.pending += [open_picture(file, self.args) for file in files]
        print(f"({_waiting(self.pending)})")

    def set_system(self, text: str) -> None:
        """/system: another system prompt, and a new conversation."""
        self.settings["system"] = text or None
        self.reset()

    def reset(self) -> None:
        """/reset: a new conversation."""
        self.conversation, self.pending = self._begin(), []
        print("(a new conversation)")


def command(text: str) -> tuple[str | None, str]:
    """(name, rest) of "/name rest"; the name of a message is None."""
    if not text.startswith("/") or text.startswith("//"):
        return None, text
    name, _, rest = text[1:].partition(" ")
    return name, rest.strip()


def read_message() -> str:
    """What the user types up to Enter, or pastes: lines that arrive together are one message.

    A command is its line alone. Raises EOFError and KeyboardInterrupt, as input() does.
    """
    # A terminal with bracketed paste hands readline a paste as one line, newlines in it; without,
    # or for a paste made while the model was answering, its lines come one by one, but at once.
    text = input(YOU)
    if command(text.strip())[0] is not None:
        return text
    while more_waits():
        try:
            text += "\n" + input()
        except EOFError:
            break
    return text


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


@contextlib.contextmanager
def stoppable() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, between two steps of the model; the second raises."""
    stopped = threading.Event()

    def interrupt(*_):
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _waiting(images: Sized) -> str:
    return f"{counted(len(images), 'image')} to go with your next message"
