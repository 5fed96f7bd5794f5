"""What a terminal can do besides printing: editing with Tab, dim words, pictures."""

from __future__ import annotations

import base64
import contextlib
import glob
import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 360  # pixels of a picture that is shown


def start_editing(commands: Iterable[str]) -> None:
    """Gives input() line editing, a history and Tab: commands, and names of files after them."""
    try:
        import readline
    except ImportError:  # Windows
        return
    words = sorted({*commands, "quit"})

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_endidx()]
        found = completions(line, words)
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims("")  # a whole line at a time: names have spaces
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(line: str, words: Iterable[str]) -> list[str]:
    """The whole lines that a line may become."""
    if not line.startswith("/"):
        return []
    name, space, rest = line[1:].partition(" ")
    if not space:
        return [f"/{word} " for word in words if word.startswith(name)]
    if name not in ("image", "json", "save"):
        return []
    # The last of several names; a quote that is open belongs to it.
    before, start = _last_name(rest)
    found = sorted(glob.glob(f"{glob.escape(os.path.expanduser(start))}*"))
    return [f"/{name} {before}{_typed(path)}" for path in found]


def _last_name(rest: str) -> tuple[str, str]:
    if (at := rest.rfind("'")) >= 0 and rest.count("'") % 2:
        return rest[:at], rest[at + 1 :]
    at = rest.rfind(" ") + 1
    return rest[:at], rest[at:]


def _typed(path: str) -> str:
    """A name as it is typed: quoted where it has spaces; a folder stays open for what is in it."""
    folder = os.path.isdir(path)
    text = f"{path}/" if folder else path
    return text if " " not in text else f"'{text}" + ("" if folder else "'")


def dim(text: str) -> str:
    """Less bright where the terminal can."""
    plain = not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb"
    return text if plain or "NO_COLOR" in os.environ else f"\x1b[2m{text}\x1b[22m"


def protocol() -> str:
    """How this terminal shows pictures: "kitty", "iterm", or "" for not at all."""
    if not sys.stdout.isatty() or "TMUX" in os.environ:
        return ""
    has = os.environ.get
    if has("KITTY_WINDOW_ID") or has("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    return "iterm" if has("TERM_PROGRAM") in ("iTerm.app", "WezTerm", "mintty") else ""


def show(image: Image) -> None:
    """Shows a picture inline; nothing where the terminal cannot."""
    if kind := protocol():
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        small.save(file, "PNG")
        with contextlib.suppress(OSError):
            print(escape(file.getvalue(), kind), flush=True)


def escape(png: bytes, kind: str) -> str:
    """The codes that show a PNG: iTerm2's inline images, or kitty's graphics in pieces of 4,096."""
    data = base64.b64encode(png).decode()
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(png)}:{data}\a"
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    heads = ["a=T,f=100,"] + [""] * (len(pieces) - 1)
    more = [1] * (len(pieces) - 1) + [0]
    return "".join(f"\x1b_G{h}m={m};{p}\x1b\\" for h, m, p in zip(heads, more, pieces))
