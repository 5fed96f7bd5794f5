"""A conversation at a terminal, with commands, or one answer in a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llava_jax.chat import terminal
from llava_jax.chat.files import file_name, file_names, read_schema, write_conversation
from llava_jax.errors import LlavaError, PromptError, counted, did_you_mean
from llava_jax.util import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from llava_jax.model import LlavaModel, Reply, Stream

PASTE_GAP = 0.05  # seconds within which pasted lines follow each other
HELP = """  /image FILE ...  show one or more images with the next message (Tab completes names)
  /system TEXT     set the system prompt and start over, without images (no TEXT: the template's)
  /json SCHEMA     answer in JSON by a schema, a file or the text itself (no SCHEMA: in words again)
  /adapter NAME    answer through this adapter from now on (no NAME: the model itself)
  /clear           start over: forget everything said and shown
  /save FILE       write the conversation: FILE.json as OpenAI's messages, FILE.md to read
  /help            this list
  /quit            leave (so does Ctrl-D)
  Ctrl-C stops an answer; pressed twice it exits. Lines that are pasted together are one message.
  A message that starts with // is sent with one slash."""


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
            "json": self.set_json,
            "adapter": self.set_adapter,
            "clear": lambda _: self.reset(),
            "reset": lambda _: self.reset(),
            "save": self.save,
            "help": lambda _: print(HELP),
        }
        self.names: list[str] = []  # of the images in `pending`
        self.shown: list[list[str]] = []  # of those of each message that was answered
        self.conversation = model.chat(**settings)

    def once(self, prompt: str) -> None:
        """Answers one prompt on standard output. Ctrl-C is left to the caller."""
        reply = print_pieces(self.conversation.stream(prompt.strip(), self.pending))
        for note in notes(reply):
            print(f"({note})", file=sys.stderr)

    # A conversation ------------------------------------------------------------------------------

    def talk(self) -> None:
        """Reads messages until the user leaves."""
        terminal.start_editing(self.commands)
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

        Raises EOFError and KeyboardInterrupt, as input() does, and PromptError.
        """
        # A terminal with bracketed paste hands readline a paste as one line, newlines in it; without,
        # or for a paste made while the model was answering, its lines come one by one, but at once.
        text, self.unread = self.unread or typed("you> "), ""
        if command(text.strip())[0] is not None:  # it ends with its line
            text, _, self.unread = text.strip().partition("\n")
            return text
        with contextlib.suppress(EOFError):
            while more_waits():
                text += "\n" + typed()
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
            start = time.monotonic()
            stream = self.conversation.stream(text, self.pending)
            first = time.monotonic()  # its first token is there
            stream.cancelled = self.interrupted
            reply = print_pieces(stream)
            end = time.monotonic()
        finally:
            signal.signal(signal.SIGINT, before)
        self.interrupted.clear()  # at the prompt, Ctrl-C asks once before it leaves
        if reply.text:  # else the turn is not remembered, and its images go with the next message
            self.shown.append(self.names)
            self.pending, self.names = [], []
        for note in notes(reply):
            print(f"({note})")
        if reply.text:
            print(terminal.dim(f"({speed(reply, first - start, end - first)})"))
        if self.pending:
            print(f"({waiting(self.pending)})")

    def show(self, rest: str) -> None:
        """/image: opens files for the next message; all of them or none."""
        files = file_names(rest)
        if not files:
            raise PromptError("which file?", fix="/image FILE")
        opened = [self.open_file(file) for file in files]
        for image in opened:
            terminal.show(image)
        self.pending, self.names = [*self.pending, *opened], [*self.names, *files]
        print(f"({waiting(self.pending)})")

    def set_system(self, text: str) -> None:
        """/system: another system prompt, and a new conversation."""
        self.settings["system"] = text or None
        self.reset()

    def set_json(self, text: str) -> None:
        """/json: the form of answers from here on; the conversation goes on."""
        form = read_schema(text if text.startswith("{") else file_name(text)) if text else None
        settings = {**self.settings, "response_format": form}
        self.model.chat(**settings)  # for its checks
        self.settings = self.conversation.settings = settings
        print("(answers are JSON by this schema)" if form else "(answers are words)")

    def set_adapter(self, name: str) -> None:
        """/adapter: the one that answers from here on; the conversation goes on."""
        self.model.generator.adapters.index(name)  # its check
        self.settings = self.conversation.settings = {**self.settings, "adapter": name}
        print(f"(answers come through {name})" if name else "(the model itself answers)")

    def save(self, text: str) -> None:
        """/save: writes what was said; a file that is there is left as it is."""
        name = file_name(text)
        write_conversation(name, self.conversation.messages, self.shown, self.settings)
        print(f"(saved to {name})")

    def reset(self) -> None:
        """/clear: a new conversation, without the images that were shown or were to be."""
        had_images = bool(self.pending or self.conversation.has_images)
        self.conversation, self.pending = self.model.chat(**self.settings), []
        self.names, self.shown = [], []
        again = "; show the image again with /image" if had_images else ""
        print(f"(a new conversation{again})")


def typed(prompt: str = "") -> str:
    """input(). Raises PromptError for bytes that are no text."""
    try:
        return input(prompt)
    except UnicodeDecodeError:
        raise PromptError(f"what was typed is not {sys.stdin.encoding} text") from None


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


def speed(reply: Reply, first: float, rest: float) -> str:
    """Tokens and times of an answer. first, rest: seconds up to its first token, and from there."""
    reused = f", {reply.cached_tokens} reused" if reply.cached_tokens else ""
    said = f"{counted(len(reply.ids), 'token')}, first after {first:.2f} s"
    if len(reply.ids) > 1 and rest > 0:
        said += f", then {(len(reply.ids) - 1) / rest:.1f} tokens/s"
    return f"{said}; prompt {reply.prompt_tokens}{reused}"


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
