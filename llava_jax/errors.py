"""The errors a user meets. The command line prints them as one line; library callers catch them."""


class LlavaError(Exception):
    """Base of every error that bad input or a bad setting causes (as opposed to a bug).

    The message is one line, names the file, key or sample, and contains no memory address.
    `fix`, if given, says what to do about it and is printed behind the message.
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
    """An image was refused. `code` is one of llava_jax.images.gate.CODES."""

    def __init__(self, message: str, *, code: str, fix: str | None = None):
        super().__init__(message, fix=fix)
        self.code = code


class SampleError(LlavaError):
    """A training sample cannot be used. The message names its id."""


class PromptError(LlavaError):
    """A prompt or message list is malformed (image count, roles, length)."""


class Stopped(LlavaError):
    """Not a failure: a run was asked to stop, saved its state, and goes on with the same command."""


class WeightError(LlavaError):
    """A checkpoint is incomplete, has unknown, doubled or wrongly shaped tensors, or is unsafe to read."""
