"""Tab, pictures in the terminal, schemas and saved conversations."""

import base64
import json
import re

import pytest
from PIL import Image

from llava_jax.chat import terminal
from llava_jax.chat.files import read_schema, write_conversation
from llava_jax.errors import ConfigError

WORDS = ["clear", "image", "quit", "save"]


def test_tab_completes_commands_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "car one.png", "dog.png"):
        (tmp_path / name).touch()
    (tmp_path / "cats").mkdir()
    assert terminal.completions("/i", WORDS) == ["/image "]
    assert terminal.completions("what is", WORDS) == []
    assert terminal.completions("/image ca", WORDS) == [
        "/image 'car one.png'",
        "/image cat.png",
        "/image cats/",
    ]
    assert terminal.completions("/image cat.png do", WORDS) == ["/image cat.png dog.png"]
    assert terminal.completions("/image 'car o", WORDS) == ["/image 'car one.png'"]
    assert terminal.completions("/quit c", WORDS) == []


def test_pictures_where_the_terminal_shows_them(monkeypatch, capsys):
    image = Image.new("RGB", (900, 300), "red")
    terminal.show(image)
    assert capsys.readouterr().out == ""  # no terminal
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for name in ("KITTY_WINDOW_ID", "TMUX", "TERM_PROGRAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-kitty")
    assert terminal.protocol() == "kitty"
    monkeypatch.setenv("TERM", "xterm")
    assert terminal.protocol() == ""
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    assert terminal.protocol() == "iterm"
    png = bytes(range(256)) * 40
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", terminal.escape(png, "kitty"))
    assert base64.b64decode("".join(data for _, data in pieces)) == png
    assert [head for head, _ in pieces] == ["a=T,f=100,m=1", "m=1", "m=1", "m=0"]
    assert terminal.escape(png, "iterm").endswith(base64.b64encode(png).decode() + "\a")


def test_schemas(tmp_path):
    schema = {"type": "object"}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    for text in (json.dumps(schema), str(tmp_path / "s.json")):
        assert read_schema(text)["json_schema"]["schema"] == schema
    for text, says in (("{", "not JSON"), ("/no/s.json", "no schema can be read")):
        with pytest.raises(ConfigError, match=says):
            read_schema(text)


def test_a_conversation_is_saved_and_nothing_is_overwritten(tmp_path):
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": b""}, {"type": "text", "text": "a?"}],
        },
        {"role": "assistant", "content": "b"},
    ]
    path = tmp_path / "talk.json"
    write_conversation(str(path), messages, [["/p/cat 1.png"]], {"system": "S"})
    system, asked, said = json.loads(path.read_text())["messages"]
    assert (system["content"], said["content"]) == ("S", "b")
    assert asked["content"][0]["image_url"]["url"] == "file:///p/cat%201.png"
    write_conversation(str(tmp_path / "talk.md"), messages, [["/p/cat.png"]], {})
    assert (
        (tmp_path / "talk.md")
        .read_text()
        .startswith("## You\n\n![cat.png](<file:///p/cat.png>)\n\na?")
    )
    with pytest.raises(ConfigError, match="is there already"):
        write_conversation(str(path), messages, [], {})
    with pytest.raises(ConfigError, match="which file"):
        write_conversation("", messages, [], {})
