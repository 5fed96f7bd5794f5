"""The errors a user meets. The command line prints them as one line; library callers catch them."""

import difflib
import errno
from collections.abc import Iterable

_PASSING = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EIO ESTALE EREMOTEIO ETIMEDOUT ECONNRESET ECONNABORTED".split()
    if hasattr(errno, name)  # a None here would stand for every error without a number
}
"""Errors of a disk or network that may be gone the next time; a missing file or a permission is none."""


class LlavaError(Exception):
    """Base of every error that bad input or a bad setting causes (as opposed to a bug).

    The message is one line, names the file, key or sample, and contains no memory address.
    `fix`, if given, says what to do about it and is printed after the message.
    """

    def __init__(self, message: str, *, fix: str | None = None):
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} ({self.fix})" if self.fix else self.message


class ConfigError(LlavaError):
    """A model or training setting is unknown, of the wrong type, or contradicts another."""


class ImageError(LlavaError):
    """An image was refused. `code` is one of llava_jax.images.decode.CODES."""

    def __init__(self, message: str, *, code: str, fix: str | None = None):
        super().__init__(message, fix=fix)
        self.code = code


class SampleError(LlavaError):
    """A training sample cannot be used. The message names its id."""


class PromptError(LlavaError):
    """A prompt or message list is malformed (image count, roles, length)."""


class Stopped(LlavaError):
    """Not a failure: a run was asked to stop, saved its state, and goes on with the same command."""


class NotSaved(LlavaError):
    """A run ends, and its last state is not in a checkpoint; earlier checkpoints are whole."""


class Diverged(LlavaError):
    """A run stopped since too many steps in a row had to be skipped; the state before them is saved."""


class WeightError(LlavaError):
    """A checkpoint is incomplete, has unknown, doubled or wrongly shaped tensors, or is unsafe to read."""


def passes(error: BaseException | None) -> bool:
    """Whether an error is, or was raised while handling, one of a disk or network that may pass."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _PASSING:
            return True
        error = error.__cause__ or error.__context__
    return False


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images", "1,000 images": for messages."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that `word` most likely is a mistyped form of; None if nothing is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def did_you_mean(
    word: str, known: Iterable[str], form: str = "{}", *, cutoff: float = 0.6
) -> str | None:
    """`nearest` as a question, for the `fix` of an error about a mistyped name.

    form: how the word is shown, say "--{}".
    """
    found = nearest(word, known, cutoff=cutoff)
    return f"did you mean {form.format(found)}?" if found else None


def instead_of_file(data: bytes) -> tuple[str, str] | None:
    """(what it is, fix) where something lies in place of a file that was not downloaded; else None.

    data: how the file begins. A `git clone` without Git LFS leaves pointers of three lines
    (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md), a saved address is a web page.
    """
    start = data[:200].lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself", "run git lfs pull in its folder"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself", "download the file again"
    return None
