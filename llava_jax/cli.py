"""The `llava-jax` command: finds the command's room, imports only that, and reports its errors.

A room offers `add_arguments(parser)`, which must import nothing heavy (help answers at once), and
`run(args) -> int`, which may. EPILOG has the exit codes; 65 to 75 are those of sysexits.h.
"""

import _thread
import argparse
import errno
import importlib
import io
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llava_jax import __version__
from llava_jax.errors import Diverged, LlavaError, NotSaved, Stopped, did_you_mean, passes
from llava_jax.util import printable, sentence

OK, BAD_INPUT, DIVERGED, BUG, NO_MEMORY, NOT_SAVED, STOPPED = 0, 2, 65, 70, 71, 74, 75
INTERRUPTED, BROKEN_PIPE = 130, 141


@dataclass(frozen=True)
class Command:
    """Where a command lives.

    room: its module. aliases: what other tools call it, for "did you mean".
    overrides: arguments of the form --config.NAME=VALUE are left to `run`, as `args.overrides`; such
    a room also has `option_hint`, for options that are settings.
    """

    room: str
    summary: str
    aliases: str = ""
    overrides: bool = False

    def function(self, name: str) -> Callable:
        """The room's function `name`."""
        return getattr(importlib.import_module(self.room), name)


COMMANDS = {
    "quickstart": Command(
        "llava_jax.quickstart.cli",
        "make, train and question a tiny LLaVA, with no network",
        aliases="download start",
    ),
    "data": Command(
        "llava_jax.datasets.cli",
        "build a training set, check it, count it, look at a sample",
        aliases="dataset datasets prepare stats sample show validate",
    ),
    "train": Command(
        "llava_jax.train.cli",
        "train a stage from a config file; run again to resume",
        aliases="finetune fine-tune pretrain sft lora fit",
        overrides=True,
    ),
    "plan": Command(
        "llava_jax.plan.cli",
        "what a run needs, and how long it takes, on hardware you do not have",
        aliases="estimate memory profile roofline simulate",
        overrides=True,
    ),
    "verify": Command(
        "llava_jax.train.verify",
        "check the files of checkpoints and exports by their digests",
        aliases="check checksum digest fsck sha256sum",
    ),
    "chat": Command(
        "llava_jax.chat.cli",
        "talk with a model about one or more images",
        aliases="ask cli generate infer inference predict run",
    ),
    "serve": Command(
        "llava_jax.serve.cli",
        "answer over HTTP, as OpenAI's API does",
        aliases="server api openai http endpoint",
    ),
    "demo": Command(
        "llava_jax.serve.demo",
        "chat in a browser, with the same server",
        aliases="web ui webui gradio browser",
    ),
    "convert": Command(
        "llava_jax.convert.cli",
        "move weights between JAX, Hugging Face, original",
        aliases="consolidate export import merge quantize",
    ),
    "compare": Command(
        "llava_jax.convert.compare_cli",
        "compare two checkpoints tensor by tensor",
        aliases="diff",
    ),
    "inspect": Command(
        "llava_jax.inspect",
        "show what a checkpoint is",
        aliases="describe info",
    ),
    "report": Command(
        "llava_jax.report.cli",
        "a page of one or more training runs: curves, facts, samples",
        aliases="dashboard plot curves tensorboard monitor",
    ),
    "eval": Command(
        "llava_jax.eval.cli",
        "run benchmarks, or score an answer file",
        aliases="benchmark evaluate score test",
    ),
}

# {package: the extra that brings it}, for those that are imported without llava_jax.util.need.
EXTRAS = {
    "torch": "torch",
    "transformers": "torch",
    "lmms_eval": "lmms",
    "fastapi": "serve",
    "uvicorn": "serve",
}

EPILOG = """\
llava-jax COMMAND --help explains a command.

exit codes:
  0    done
  1    the command ran, and its answer is no: two checkpoints differ, a file is damaged
  2    usage or bad input; the line says what to change
  65   training stopped by itself: too many steps in a row had to be skipped
  69   another process of a run ended; the same command goes on from the last checkpoint
  70   a bug of ours
  71   the system has no memory left for it
  74   a disk or network failed, or training could not write its last state or its model:
       the disk is full, say
  75   a run was stopped by a signal and saved its state; the same command again resumes it
  130  interrupted (143 where SIGTERM came twice, or before the first step); Ctrl-C twice at
       the prompt of chat leaves it with 0
  134  jax ended the process, mostly since another one of the run did; like 69
  141  the reader of the output went away
"""


class UsageError(LlavaError):
    """The command line is wrong. `command` is the part whose --help explains it."""

    def __init__(self, message: str, *, command: str, fix: str | None = None):
        super().__init__(message, fix=fix or f"see {command} --help")


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError instead of exiting, and takes no abbreviated options."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        raise UsageError(message, command=self.prog)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug, words = take_flag(words, "--debug")
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character must not kill a run.
            stream.reconfigure(errors="backslashreplace")
    name = words[0] if words and words[0] in COMMANDS else None
    try:
        with kept_interrupts():
            code = dispatch(words, debug=debug)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except SystemExit as stop:  # argparse's --help and --version
        if isinstance(stop.code, str):
            print(f"llava-jax: {one_line(stop.code)}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else BAD_INPUT if stop.code else OK
    except BaseException as error:
        if debug:
            traceback.print_exc()
        code, line = explain(error)
        print(f"llava-jax{f' {name}' if name else ''}: {line}", file=sys.stderr)
        return code


@contextmanager
def kept_interrupts() -> Iterator[None]:
    """Raises Ctrl-C again where Python dropped it.

    It drops whatever a callback of the garbage collector raises. jax has such a callback, which runs often
    while jax is imported: a Ctrl-C then would do nothing but print "Exception ignored".
    """
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if found.exc_type is not KeyboardInterrupt:
            return before(found)
        # A moment later, as what this hook raises is dropped too.
        timer = threading.Timer(0.05, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def open_closed_streams() -> None:
    """Gives the null device to the standard streams that the shell closed (`>&-`), which are None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def dispatch(words: list[str], *, debug: bool = False) -> int:
    """Finds the command in `words`, parses its arguments and runs it.

    Raises UsageError on an unknown command or option, with the nearest known one.
    """
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words:
        top_parser().print_help(sys.stderr)
        return BAD_INPUT
    name = words[0]
    if name.startswith("-"):
        check_options(top_parser(), words)
        top_parser().parse_args(words)
        raise UsageError("no command given", command="llava-jax")
    if name not in COMMANDS:
        raise UsageError(f"no command {name!r}", command="llava-jax", fix=command_hint(name))
    command = COMMANDS[name]
    args = parse(name, words[1:])
    start_logging(debug)
    return int(command.function("run")(args) or OK)


def parse(name: str, words: list[str]) -> argparse.Namespace:
    """Parses the words after a command's name; imports that command's room and no other."""
    command = COMMANDS[name]
    parser = Parser(prog=f"llava-jax {name}", description=sentence(command.summary))
    command.function("add_arguments")(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    overrides, hint = [], None
    if command.overrides:
        words, overrides = split_overrides(words)
        hint = command.function("option_hint")
    check_options(parser, words, hint)
    return parser.parse_args(words, argparse.Namespace(overrides=overrides))


def top_parser() -> Parser:
    """The parser of `llava-jax` itself, which only has help and version."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:{width}}{c.summary}" for name, c in COMMANDS.items())
    parser = Parser(
        prog="llava-jax",
        usage="llava-jax COMMAND [options]",
        description=f"LLaVA-1.5 in JAX.\n\ncommands:\n{rows}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = "show the versions that matter"
    parser.add_argument("-V", "--version", action=Version, nargs=0, help=shown)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


class Version(argparse.Action):
    """Prints our version and those that a bug report needs, without importing them."""

    def __call__(self, parser, *_):
        from importlib.metadata import PackageNotFoundError, version

        found = [f"Python {sys.version.split()[0]}"]
        for package in ("jax", "flax", "transformers", "torch"):
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                continue
        print(f"llava-jax {__version__} ({', '.join(found)})")
        parser.exit()


def take_flag(words: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether `flag` stands anywhere before a "--", and the words without it."""
    end = words.index("--") if "--" in words else len(words)
    rest = [w for w in words[:end] if w != flag]
    return len(rest) < end, rest + words[end:]


def split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Takes --config.NAME=VALUE and --config.NAME VALUE out of `words`."""
    others, overrides = [], []
    rest = iter(words)
    for word in rest:
        if not word.startswith("--config."):
            others.append(word)
        elif "=" in word:
            overrides.append(word)
        elif (value := next(rest, None)) is not None:
            overrides.append(f"{word}={value}")
        else:
            fix = f"{word}=VALUE"
            raise UsageError(f"{word} has no value", command="llava-jax train", fix=fix)
    return others, overrides


Hint = Callable[[str, str | None], str | None]
"""(unknown option, its value if it has one) -> what the user may have meant."""


def check_options(
    parser: argparse.ArgumentParser, words: list[str], hint: Hint | None = None
) -> None:
    """Raises UsageError for a mistyped option; argparse would first ask for what is missing.

    A near option is suggested first, then what `hint` finds, then a less similar option.
    """
    known = sorted(set(option_strings(parser)))
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        option, has_value, value = word.partition("=")
        if not option.startswith("--") or option in known:
            continue
        if not has_value and i + 1 < end and not words[i + 1].startswith("--"):
            value = words[i + 1]
        fix = did_you_mean(option, known, cutoff=0.75)
        if hint and not fix:
            fix = hint(option, value or None)
        fix = fix or did_you_mean(option, known)
        raise UsageError(f"no option {option}", command=parser.prog, fix=fix)


def command_hint(name: str) -> str | None:
    """The command that a mistyped one, or one of another tool, stands for."""
    for known, command in COMMANDS.items():
        if name.lower() in command.aliases.split():
            return f"did you mean {known}?"
    return did_you_mean(name.lower(), COMMANDS)


def option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All option names of a parser and of its sub-parsers."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from option_strings(sub)


def start_logging(debug: bool) -> None:
    """Sends our log to standard error: from INFO on, or from DEBUG on with --debug."""
    import logging

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("llava_jax").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:  # orbax logs the traceback of what it raises
        logging.getLogger("absl").setLevel(logging.CRITICAL)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that a user sees for an error."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, LlavaError):
        kinds = {Diverged: DIVERGED, NotSaved: NOT_SAVED}
        code = NOT_SAVED if passes(error) else BAD_INPUT
        return kinds.get(type(error), code), one_line(str(error))
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            extra = f"pip install 'llava_jax[{EXTRAS[package]}]'"
            return BAD_INPUT, f"this needs the package {package} ({extra})"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        code = NO_MEMORY if error.errno == errno.ENOMEM else BAD_INPUT
        text = one_line(f"{error.strerror[0].lower()}{error.strerror[1:]}{where}")
        return NOT_SAVED if passes(error) else code, text
    if isinstance(error, MemoryError):
        return NO_MEMORY, "out of memory (use a smaller batch or a smaller model)"
    if "RESOURCE_EXHAUSTED" in str(error) and type(error).__module__.startswith(("jax", "jaxlib")):
        return BAD_INPUT, "out of device memory (use a smaller batch, or more devices)"
    text = one_line(f"{type(error).__name__}: {error}")
    return BUG, f"unexpected {text} (run again with --debug for the traceback, and report it)"


def one_line(text: str) -> str:
    """Makes a message safe to print: one line, no terminal codes, no memory addresses."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
    return printable(text, keep="")
