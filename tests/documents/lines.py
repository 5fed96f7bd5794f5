"""Every command line and Python block of the documents, in the order in which a reader meets them."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_jax import cli

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^[ ]*```(\w*)[^\n]*\n(.*?)^[ ]*```[ ]*$", re.M | re.S)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_OUR_PYTHON = re.compile(r"python (-m (llava_jax|(pytest|build|bench)(?![.\w]))|bench/)")
_STARTS = ("llava-jax ", "python ", "pip ")  # of a command in a fence that names no language


@dataclass(frozen=True)
class Line:
    """One command line (kind "bash") or one block of Python ("python") of a document."""

    page: str
    number: int  # of its first line in the file
    kind: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.number}"


def pages() -> list[Path]:
    """The documents that a reader is sent to; a new page is found by itself."""
    folders = ("*.md", "docs/*.md", "examples/**/*.md")
    return [page for folder in folders for page in sorted(ROOT.glob(folder))]


def all_lines() -> list[Line]:
    found = [line for page in pages() for line in of_page(page)]
    return found + [line for path in sorted(ROOT.glob("configs/*.py")) for line in of_config(path)]


def of_page(path: Path) -> list[Line]:
    """Fenced blocks, and whole commands in running text and tables."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    found = []
    for block in _FENCE.finditer(text):
        first, language = text.count("\n", 0, block.start()) + 2, block[1]
        if language == "python":
            found.append(Line(name, first, "python", block[2]))
        for number, command in _logical(block[2]):
            if language in ("bash", "sh", "console") or (
                not language and command.startswith(_STARTS)
            ):
                found.append(Line(name, first + number, "bash", command))
    prose = _FENCE.sub(lambda b: "\n" * b[0].count("\n"), text)
    for piece in _INLINE.finditer(prose):
        command = " ".join(piece[1].split())
        if command := _whole_command(command):
            found.append(Line(name, prose.count("\n", 0, piece.start()) + 1, "bash", command))
    return sorted(found, key=lambda line: line.number)


def of_config(path: Path) -> list[Line]:
    """The command lines in the docstring of a config file."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=True) or ""
    name = path.relative_to(ROOT).as_posix()
    return [
        Line(name, number + 1, "bash", command)
        for number, command in _logical(doc)
        if command.startswith("llava-jax ")
    ]


def _logical(block: str) -> Iterator[tuple[int, str]]:
    """(offset, command) of each line of a block, continued lines joined, comment lines left out."""
    held, start = "", 0
    for number, line in enumerate(block.split("\n")):
        start = number if not held else start
        held += line.strip()
        if held.endswith("\\"):
            held = held[:-1]
        elif held:
            if not held.startswith("#"):
                yield start, held
            held = ""


def _whole_command(text: str) -> str | None:
    """The command that an inline piece of code is, its optional parts taken; None for a mere name."""
    words = text.replace("[", "").replace("]", "").split()
    if len(words) > 2 and words[0] in cli.COMMANDS and any(w.startswith("--") for w in words):
        words.insert(0, "llava-jax")  # as in the table of formats
    if words[:2] == ["pip", "install"]:
        return text
    ours = (words[:1] == ["llava-jax"] and len(words) > 2) or _OUR_PYTHON.match(text)
    return " ".join(words) if ours and "…" not in words else None


def commands(text: str) -> list[list[str]]:
    """The words of each command of a shell line, comments left out."""
    words = shlex.shlex(text, posix=True, punctuation_chars="&;|")
    words.whitespace_split, words.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in words:
        if set(word) <= set("&;|"):
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]
