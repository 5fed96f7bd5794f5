"""The terminal chat: in a pipe, and at a real (pseudo) terminal."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from llava_jax import cli
from llava_jax.chat import session as chat
from llava_jax.errors import ImageError, PromptError
from llava_jax.images.decode import open_image
from llava_jax.model import LlavaModel, load
from llava_jax.util import printable
from tests.conftest import xla_flags
from tests.generate.tiny import model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that talks nonsense, saved, and two pictures beside it."""
    path = tmp_path_factory.mktemp("chat") / "model"
    model().save(path)
    for i, name in enumerate(("a.png", "b c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path.parent / name)
    return path


def test_a_prompt_is_answered_once(folder, capsys):
    picture = folder.parent / "a.png"
    words = ["chat", "--model", str(folder), "--max-new-tokens", "9"]
    code = cli.main([*words, "--image", str(picture), "--prompt", "what is this?"])
    out = capsys.readouterr()
    want = load(folder).generate("what is this?", picture, max_new_tokens=9)
    assert code == 0
    assert out.out == printable(want.text) + "\n"
    assert "cut off after 9 tokens" in out.err


def test_a_question_may_be_piped_in(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n"))
    assert cli.main(["chat", "--model", str(folder), "--max-new-tokens", "4"]) == 0
    want = load(folder).generate("what?", max_new_tokens=4)
    assert capsys.readouterr().out == printable(want.text) + "\n"


def test_what_cannot_be_asked_is_one_line(folder, capsys, monkeypatch):
    words = ["chat", "--model", str(folder)]
    assert cli.main([*words, "--image", "/no/cat.png", "--prompt", "what?"]) == 2
    assert "cat.png: the file does not exist" in capsys.readouterr().err
    assert cli.main([*words, "--temperature", "-1", "--prompt", "what?"]) == 2
    assert "temperature is -1.0" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert cli.main(words) == 2
    assert "prompt is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), "utf-8"))
    assert cli.main(words) == 2
    assert "the piped question is not utf-8 text" in capsys.readouterr().err


def test_who_answers_where_no_model_is_named(tmp_path, capsys):
    assert cli.main(["chat", "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    out = capsys.readouterr()
    assert "Using `tiny`, the small bundled model, which only knows coloured shapes" in out.err
    assert "--model" not in out.out
    assert cli.main(["chat", "--model", "tiny", "--prompt", "hello", "--max-new-tokens", "2"]) == 0
    assert "Using `tiny`" not in capsys.readouterr().err


def test_a_picture_beyond_the_limits_names_the_option(folder, tmp_path, capsys):
    PIL.Image.new("RGB", (9000, 10)).save(tmp_path / "wide.png")
    words = ["chat", "--model", str(folder), "--prompt", "what?", "--max-new-tokens", "2"]
    words += ["--image", str(tmp_path / "wide.png")]
    assert cli.main(words) == 2
    assert (
        "longer on one side than allowed (the limit is max_side 8,192)" in capsys.readouterr().err
    )
    assert cli.main([*words, "--max-side", "9000"]) == 0


def test_file_names_are_read_as_a_shell_does(tmp_path):
    assert chat.file_names("a.png 'b c.png'") == ["a.png", "b c.png"]
    assert chat.file_names("it's.png") == ["it's.png"]
    (tmp_path / "d e.png").touch()
    assert chat.file_names(str(tmp_path / "d e.png")) == [str(tmp_path / "d e.png")]
    assert chat.file_names("") == []
    for text in ("'my talk.md'", "my\\ talk.md", "my talk.md"):
        assert chat.file_name(text) == "my talk.md"
    assert chat.file_name("") == ""


def test_file_names_in_other_forms(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "d e.png").touch()
    uri = (tmp_path / "d e.png").as_uri()
    for text in ("~/d e.png", uri):
        assert chat.file_names(text) == [text]
    assert chat.file_names("~nobody-here/a.png b.png") == ["~nobody-here/a.png", "b.png"]
    assert len(chat.file_names("x" * 5000)) == 1
    with pytest.raises(ImageError, match=r"a.png: addresses are not fetched \(download it first\)"):
        chat.file_names("https://example.org/a.png")


def test_a_vision_tower_that_lies_elsewhere(tmp_path, capsys):
    source = model().save(tmp_path / "model", to="original")
    (source / "vision_tower").rename(tmp_path / "clip")
    config = json.loads((source / "config.json").read_text())
    config["mm_vision_tower"] = "/nowhere/clip"
    (source / "config.json").write_text(json.dumps(config))
    words = ["chat", "--model", str(source), "--prompt", "what?", "--max-new-tokens", "3"]
    assert cli.main(words) == 2
    assert "(give --vision-tower)" in capsys.readouterr().err
    assert cli.main([*words, "--vision-tower", str(tmp_path / "clip")]) == 0
    want = model().generate("what?", max_new_tokens=3).text
    assert capsys.readouterr().out == printable(want) + "\n"


def test_an_empty_answer_is_said_and_its_image_is_not_lost(capsys, monkeypatch):
    """A head of zeros chooses <unk> for ever, which has no text."""
    talker = model()
    params = dict(talker.generator.params())
    params["language.head.kernel"] = np.zeros_like(params["language.head.kernel"])
    silent = LlavaModel(talker.config, params, talker.tokenizer)
    session = chat.Session(
        silent, {"max_new_tokens": 4}, [PIL.Image.new("RGB", (9, 9))], open_image
    )
    session.ask("what is this?")
    said = capsys.readouterr().out
    assert "(no answer)\n(cut off after 4 tokens)\n(1 image to go with your next message)" in said
    assert len(session.pending) == 1
    session.once("what is this?")
    assert capsys.readouterr().err.startswith("(no answer)\n")

    def fails(_):
        raise PromptError("the answer cannot go on")

    monkeypatch.setattr(chat, "print_pieces", fails)
    session.names = ["a.png"]
    with pytest.raises(PromptError):
        session.ask("what is this?")
    assert (len(session.pending), session.names, session.shown) == (1, ["a.png"], [])


def test_commands():
    assert chat.command("/quit now") == ("quit", "now")
    assert chat.command("/image  a.png ") == ("image", "a.png")
    assert chat.command("//etc is a folder") == (None, "//etc is a folder")
    assert chat.command("a / b") == (None, "a / b")


class Terminal:
    """A chat in a process of its own, at the other end of a pseudo terminal."""

    def __init__(self, *words: str, term: str = "dumb"):
        self.master, slave = pty.openpty()
        env = {**os.environ, "TERM": term, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_jax", "chat", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            close_fds=True,
        )
        os.close(slave)
        self.seen = ""

    def until(self, pattern: str, limit: float = 120) -> str:
        """Reads until the pattern comes; returns what came with it, and forgets it."""
        end = time.monotonic() + limit
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not come in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    data = os.read(self.master, 65536)
                except OSError:  # the other end is gone
                    data = b""
                assert data, f"the chat ended: {self.seen!r}"
                self.seen += data.decode("utf-8", "replace")
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def send(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def interrupt(self, at_prompt: bool = False) -> None:
        if not at_prompt:
            os.kill(self.process.pid, signal.SIGINT)
            return
        # readline shows the prompt a moment before a signal can wake it. On a busy machine that
        # moment is long; a signal caught within it acts with the next key, so one is pressed.
        time.sleep(1)
        os.kill(self.process.pid, signal.SIGINT)
        time.sleep(1)
        self.press(b" \x7f")

    def stop_answer(self) -> None:
        """Ctrl-C until an answer stops: one that comes while a library is imported may be lost in it."""
        for _ in range(4):
            self.interrupt()
            with contextlib.suppress(AssertionError):
                self.until(r"\(stopped\)[\s\S]*you> ", 30)
                return
            if re.search(r"tokens/s[\s\S]*you> ", self.seen):  # it ended first
                self.send("what is this?")
                self.until(r"model> ")
        raise AssertionError(f"the answer was not stopped: {self.seen!r}")

    def press(self, keys: bytes) -> None:
        with contextlib.suppress(OSError):  # the chat has left already
            os.write(self.master, keys)

    def code(self) -> int:
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:  # a signal that readline did not see acts after Enter
            self.press(b"\n")
            return self.process.wait(60)
        finally:
            os.close(self.master)


def test_a_conversation_at_a_terminal(folder):
    a, b = folder.parent / "a.png", folder.parent / "b c.png"
    talk = load(folder).chat(max_new_tokens=8, exif=True)
    first = talk.say("what is this?", a).text
    second = talk.say("and this?", b).text
    line = Terminal("--model", str(folder), "--image", str(a), "--max-new-tokens", "8")
    try:
        line.until(r"1 image shown.*\n[^\n]*you> ")
        line.send("what is this?")
        said = line.until(r"\nyou> |\nmodel> [\s\S]*?you> ")
        assert printable(first) in said.replace("\r\n", "\n")
        line.send("/image nothing.png")
        line.until(r"! nothing.png: the file does not exist[\s\S]*you> ")
        line.send(f"/image '{b}'")
        line.until(r"1 image to go with your next message[\s\S]*you> ")
        line.send("and this?")
        said = line.until(r"model> [\s\S]*?you> ")
        assert printable(second) in said.replace("\r\n", "\n")
        assert re.search(
            r"\(8 tokens, first after [\d.]+ s, then [\d.]+ tokens/s; prompt \d+", said
        )
        line.send(f"/save {folder.parent / 'talk.json'}")
        line.until(r"saved to[\s\S]*you> ")
        line.send('/json {"type": "boolean"}')
        line.until(r"answers are JSON[\s\S]*you> ")
        line.send("is it?")
        assert re.search(r"model> (true|false)\r", line.until(r"model> [\s\S]*?you> "))
        line.send("/json")
        line.until(r"answers are words[\s\S]*you> ")
        line.press(b"/ima\t'" + str(folder.parent).encode() + b"/b c\t\n")
        line.until(r"1 image to go with your next message[\s\S]*you> ")
        line.send("/rest")
        line.until(r"did you mean /reset\?[\s\S]*you> ")
        line.send("/help")
        line.until(r"/image FILE[\s\S]*you> ")
        line.send("/reset")
        line.until(r"a new conversation[\s\S]*you> ")
        line.send("/image")
        line.until(r"which file\? \(/image FILE\)[\s\S]*you> ")
        line.send("/image https://example.org/x/a.jpg")
        line.until(r"! a.jpg: addresses are not fetched \(download it first\)[\s\S]*you> ")
        line.send(f"/image {folder.parent}")
        line.until(r"it is a folder: name a file in it[\s\S]*you> ")
        line.send(str(a))
        line.until(r"/image FILE shows a file[\s\S]*you> ")
        line.send("/quit now")
        assert line.code() == 0
        saved = json.loads((folder.parent / "talk.json").read_text())["messages"]
        assert [m["role"] for m in saved] == ["user", "assistant"] * 2
        assert saved[2]["content"][0]["image_url"]["url"] == b.as_uri()
    finally:
        line.process.kill()


PASTE = "\x1b[200~", "\x1b[201~"  # what a terminal puts around a paste where it is asked to


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_pasted_lines_are_one_message(folder, term):
    a = folder.parent / "a.png"
    talk = load(folder).chat(max_new_tokens=8, exif=True)
    first = talk.say("what is this?\n\nIn one word.").text
    second = talk.say("/and\nthis?", a).text
    line = Terminal("--model", str(folder), "--max-new-tokens", "8", term=term)
    start, end = PASTE if term == "xterm" else ("", "")
    try:
        if term == "xterm" and "\x1b[?2004h" not in line.until("you> "):
            pytest.skip("this readline does not ask for bracketed paste")
        line.seen += "" if term == "xterm" else line.until("you> ")
        line.send(f"{start}what is this?\n\nIn one word.{end}")
        said = line.until(r"model> [\s\S]*?you> ").replace("\r\n", "\n")
        assert f"model> {printable(first)}" in said
        line.send(f"{start}/image {a}\n//and\nthis?{end}")  # a command, then a message
        said = line.until(r"go with your next[\s\S]*?model> [\s\S]*?you> ").replace("\r\n", "\n")
        assert f"model> {printable(second)}" in said
        line.send("/quit")
        assert line.code() == 0
    finally:
        line.process.kill()


def test_control_c_stops_an_answer_and_a_second_one_leaves(folder):
    line = Terminal("--model", str(folder), "--max-new-tokens", "450", "--temperature", "2")
    try:
        line.until("you> ")
        line.send("what is this?")
        line.until("model> ")  # the model is read and compiled for a second or more from here on
        line.stop_answer()
        line.send("/help")
        line.until(r"/quit[\s\S]*you> ")
        said = ""
        for _ in range(6):  # readline may lose a signal on a busy machine
            line.interrupt(at_prompt=True)
            with contextlib.suppress(AssertionError):
                said += line.until(r"Press Ctrl-C again to exit[\s\S]*you> ", 5)
            with contextlib.suppress(subprocess.TimeoutExpired):
                line.process.wait(5 if said else 0.1)
                break
        assert "Press Ctrl-C again" in said + line.seen
        assert line.code() == 0
    finally:
        line.process.kill()


def test_the_end_of_input_leaves(folder):
    line = Terminal("--model", str(folder))
    try:
        line.until("you> ")
        os.write(line.master, b"\x04")
        assert line.code() == 0
    finally:
        line.process.kill()


def test_what_cannot_be_asked_is_told_before_the_model_is_loaded(tmp_path, capsys):
    words = ["chat", "--model", str(tmp_path), "--prompt", "what?"]  # no model lies there
    for more, says in (
        (["--image", "/no/cat.png"], "cat.png: the file does not exist"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--template", "nope"], "no template 'nope'"),
        (["--image", "https://example.org/x/a.jpg"], "a.jpg: addresses are not fetched"),
        (["--image", str(tmp_path)], "it is a folder"),
        (["--max-side", "-3"], "max_side is -3, but must be at least 1"),
        (["--prompt-lookup", "7", "--temperature", "1"], "cannot be given with prompt_lookup"),
        (["--json", '{"type": "array", "uniqueItems": true}'], "uniqueItems"),
    ):
        assert cli.main([*words, *more]) == 2
        assert says in capsys.readouterr().err
