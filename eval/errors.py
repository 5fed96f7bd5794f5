"""Errors of the evaluation room. Each is one line that names the file, and the line or id."""

from llava_jax.errors import LlavaError


class AnswerError(LlavaError):
    """An answer file cannot be read or does not belong to the benchmark it was given for."""


class DataError(LlavaError):
    """A benchmark's own files are missing, ambiguous or malformed."""


class NoTruthError(DataError):
    """The truth is not among the files: perhaps only a server has it."""
