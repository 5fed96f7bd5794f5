"""The clients' examples of docs/serving.md, run as they stand but for address, key and model."""

import re
from pathlib import Path

import pytest

from tests.serve.conftest import KEY, NAME, picture

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = [b for b in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL) if b.startswith("import ")]


@pytest.mark.parametrize("block", BLOCKS, ids=["first", "vllm", "sglang"])
def test_an_example_of_the_page(block, server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "dog.png"):
        Path(name).write_bytes(picture("red" if name == "cat.png" else "blue"))
    text = block.replace("http://127.0.0.1:8000", server.url).replace('"export"', f'"{NAME}"')
    exec(compile(text, "docs/serving.md", "exec"), {"KEY": KEY})
    said = capsys.readouterr().out
    assert len(said.split()) >= 1, said
