"""The command line: quick help, one-line errors, exit codes. The rooms test what commands do."""

import argparse
import errno
import importlib.util
import json
import subprocess
import sys
import time

import pytest

from llava_jax import __version__, cli
from llava_jax.errors import ConfigError, ImageError

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "transformers", "tensorflow"}
HEAVY |= {"numpy", "PIL"}  # a tenth of a second where all the rest is another

PROBE = """
import json, sys, time
from llava_jax.cli import main
code = main({words!r})
told = {{"code": code, "modules": sorted(sys.modules), "seconds": time.process_time()}}
json.dump(told, sys.stderr)
"""


def probe(words):
    """Runs one command line in a fresh interpreter; returns (exit code, stdout, modules, seconds).

    The seconds are the processor's, start of Python included: the clock would also count what else
    the machine is doing.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(words=words)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = json.loads(done.stderr.splitlines()[-1])
    return told["code"], done.stdout, set(told["modules"]), told["seconds"]


def bare_start() -> float:
    """Processor seconds in which Python starts, with what any command line imports."""
    code = "import argparse, dataclasses, json, pathlib, time; print(time.process_time())"
    words = [sys.executable, "-c", code]
    return min(float(subprocess.check_output(words, timeout=60)) for _ in range(3))


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([c, "--help"] for c in cli.COMMANDS)]
)
def test_help_is_quick_and_imports_nothing_heavy(words):
    runs = [probe(words) for _ in range(3)]
    for code, out, modules, _ in runs:
        assert code == 0
        assert out
        assert not HEAVY & modules
    # Half a second of a usual core; what a slow one needs to start Python tells how slow it is.
    assert min(seconds for *_, seconds in runs) < max(0.5, 8 * bare_start())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_command_has_a_room(name):
    command = cli.COMMANDS[name]
    assert importlib.util.find_spec(command.room), command.room
    assert callable(command.function("add_arguments"))
    assert callable(command.function("run"))


@pytest.fixture
def room(monkeypatch):
    """Puts a made-up command `demo` into the table; returns the list of the args its run saw."""
    seen = []

    class Room(cli.Command):
        def function(self, name):
            return {"add_arguments": add_arguments, "run": run, "option_hint": hint}[name]

    def add_arguments(parser: argparse.ArgumentParser):
        parser.add_argument("source")
        parser.add_argument("--to", required=True, choices=["jax", "hf"])
        parser.add_argument("--error")

    def hint(option, value):
        return None

    def run(args):
        seen.append(args)
        if args.error:
            raise ERRORS[args.error]
        return 1 if args.source == "different" else 0

    monkeypatch.setitem(cli.COMMANDS, "demo", Room("made.up", "a demonstration", overrides=True))
    return seen


stale = ConfigError("data.json: cannot be read (Stale file handle)")
stale.__context__ = OSError(errno.ESTALE, "Stale file handle")
ERRORS = {
    "llava": ConfigError("model 'x' is unknown", fix="choose tiny"),
    "image": ImageError("a.png: truncated", code="truncated"),
    "file": FileNotFoundError(2, "No such file or directory", "data.json"),
    "full": OSError(28, "No space left on device", "out/x"),
    "stale": stale,
    "torch": ModuleNotFoundError("No module named 'torch'", name="torch"),
    "module": ModuleNotFoundError("No module named 'nonesuch'", name="nonesuch"),
    "interrupt": KeyboardInterrupt(),
    "memory": MemoryError(),
    "exit": SystemExit(3),
    "exit text": SystemExit("no\nmore"),
    "bug": ValueError("a\nb <x object at 0x7f00aa> \x1b[31m"),
}


def test_runs_the_room_and_returns_its_code(room):
    assert cli.main(["demo", "a", "--to", "jax"]) == 0
    assert cli.main(["demo", "different", "--to", "jax"]) == 1
    assert [a.source for a in room] == ["a", "different"]


def test_overrides_reach_the_room(room):
    assert cli.main(["demo", "a", "--config.lr=2e-5", "--to", "jax", "--config.opt.b2", "0.9"]) == 0
    assert room[0].overrides == ["--config.lr=2e-5", "--config.opt.b2=0.9"]
    assert cli.main(["demo", "a", "--to", "jax", "--config.lr"]) == 2


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("llava", 2, "model 'x' is unknown (choose tiny)"),
        ("image", 2, "a.png: truncated"),
        ("file", 2, "no such file or directory: data.json"),
        ("full", 74, "no space left on device: out/x"),
        ("stale", 74, "data.json: cannot be read (Stale file handle)"),
        ("torch", 2, "this needs the package torch (pip install 'llava_jax[torch]')"),
        ("interrupt", 130, "interrupted"),
        ("memory", 71, "out of memory (use a smaller batch or a smaller model)"),
        ("exit", 3, None),
        ("exit text", 2, "no more"),
        ("bug", 70, r"unexpected ValueError: a b <x object> \x1b[31m (run again with --debug"),
        ("module", 70, "unexpected ModuleNotFoundError: No module named 'nonesuch'"),
    ],
)
def test_errors_are_one_clear_line(room, capsys, error, code, line):
    assert cli.main(["demo", "a", "--to", "jax", "--error", error]) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") == (line is not None)
    assert (line or "") in err


@pytest.mark.parametrize(
    "words", [["--debug", "demo", "a", "--to", "hf"], ["demo", "a", "--debug", "--to", "hf"]]
)
def test_debug_anywhere_shows_the_traceback(room, capsys, words):
    assert cli.main([*words, "--error", "llava"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "model 'x' is unknown (choose tiny)" in err.splitlines()[-1]


def test_debug_after_two_dashes_is_an_argument(room):
    assert cli.main(["demo", "--to", "hf", "--", "--debug"]) == 0
    assert room[0].source == "--debug"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "llava-jax: no command 'trian' (did you mean train?)"),
        (["zzzz"], "llava-jax: no command 'zzzz' (see llava-jax --help)"),
        (["--halp"], "llava-jax: no option --halp (did you mean --help?)"),
        (["-x"], "llava-jax: unrecognized arguments: -x (see llava-jax --help)"),
        (["demo", "--too", "jax"], "llava-jax demo: no option --too (did you mean --to?)"),
        (["demo", "--zzzz=3", "a"], "llava-jax demo: no option --zzzz (see llava-jax demo --help)"),
        (["demo", "a"], "llava-jax demo: the following arguments are required: --to"),
        (["demo", "a", "--to", "tf"], "llava-jax demo: argument --to: invalid choice: 'tf'"),
        (["demo", "a", "b", "--to", "hf"], "llava-jax demo: unrecognized arguments: b"),
    ],
)
def test_usage_errors(room, capsys, words, line):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1


def test_options_of_sub_parsers_are_known():
    parser = cli.Parser(prog="llava-jax eval")
    sub = parser.add_subparsers().add_parser("score")
    sub.add_argument("--answers")
    cli.check_options(parser, ["score", "--answers", "x"])
    with pytest.raises(cli.UsageError, match="did you mean --answers"):
        cli.check_options(parser, ["score", "--answer", "x"])


def test_no_command_prints_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_help_as_a_word(room, capsys):
    assert cli.main(["help"]) == 0
    assert "commands:" in capsys.readouterr().out
    assert cli.main(["help", "demo"]) == 0
    assert "--to" in capsys.readouterr().out


@pytest.mark.parametrize(
    "run", [["-m", "llava_jax"], ["-c", "import llava_jax.cli as c; c.main()"]]
)
def test_version_of_the_process(run):
    done = subprocess.run(
        [sys.executable, *run, "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith(f"llava-jax {__version__} (Python 3.")


LONG_OUTPUT = """
import sys
from llava_jax import cli
cli.dispatch = lambda words, debug: [print("a" * 1000) for _ in range(1000)] and 0
sys.exit(cli.main(["inspect"]))
"""


def test_reader_that_goes_away():
    with subprocess.Popen(
        [sys.executable, "-c", LONG_OUTPUT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == cli.BROKEN_PIPE


@pytest.mark.parametrize(
    ("word", "command"),
    [("finetune", "train"), ("server", "serve"), ("generate", "chat"), ("evaluate", "eval")],
)
def test_another_tool_s_command_leads_to_ours(word, command, capsys):
    assert cli.main([word]) == 2
    assert f"no command {word!r} (did you mean {command}?)" in capsys.readouterr().err


def test_foreign_names_are_no_commands_and_lead_to_commands():
    foreign = [word for command in cli.COMMANDS.values() for word in command.aliases.split()]
    assert len(foreign) == len(set(foreign)) > 20
    assert not set(foreign) & set(cli.COMMANDS)


def test_an_interrupt_within_a_callback_is_not_lost():
    """As one that comes while jax is imported, within its callback of the garbage collector."""

    class Dying:
        def __del__(self):
            raise KeyboardInterrupt

    def work():
        with cli.kept_interrupts():
            Dying()
            while time.monotonic() < end:
                time.sleep(0.01)

    end = time.monotonic() + 20
    with pytest.raises(KeyboardInterrupt):
        work()


def test_names_keep_their_capitals_in_help(capsys):
    for words, says in (
        (["serve"], "Answer over HTTP, as OpenAI's API does."),
        (["convert"], "Move weights between JAX, Hugging Face, original."),
    ):
        assert cli.main(["help", *words]) == 0
        assert says in capsys.readouterr().out


def test_help_documents_exit_codes_and_v_is_version(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for code in (cli.OK, cli.BAD_INPUT, cli.BUG, cli.INTERRUPTED, cli.BROKEN_PIPE):
        assert f"\n  {code:<4} " in out
    assert cli.main(["-V"]) == 0
    assert capsys.readouterr().out.startswith(f"llava-jax {__version__}")


CLOSED_STREAMS = """
import sys
from llava_jax import cli
def talk(words, debug):
    print(f"read {sys.stdin.read()!r}", file=sys.stderr if sys.stderr.isatty() else sys.stdout)
    return 0
cli.dispatch = talk
sys.exit(cli.main(["chat"]))
"""


def test_streams_that_the_shell_closed():
    """`<&-`, `>&-`, `2>&-`: Python has None there."""
    close = 'exec <&- >&- 2>&-; exec "$0" -c "$1"'
    done = subprocess.run(["sh", "-c", close, sys.executable, CLOSED_STREAMS], timeout=60)
    assert done.returncode == 0
