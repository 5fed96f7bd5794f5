"""quickstart and easy_vqa, by the commands that README and docs give for them, as they stand."""

import json

import pytest

from tests.conftest import shared
from tests.rehearsal.command import ok

pytestmark = pytest.mark.slow


def test_quickstart(tmp_path):
    """README's first command, then its `chat` line on the model and a picture it made."""
    ok("quickstart", cwd=tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    for name in ("sheet.html", "sheet.png", "loss.png"):
        assert (folder / name).stat().st_size > 1000, name
    picture = min(p for p in (folder / "data").rglob("*.png"))
    done = ok(
        *("chat", "--model", "runs/quickstart/export", "--image", picture),
        *("--prompt", "Describe the image concisely."),
        cwd=tmp_path,
    )
    assert done.out.strip()


def test_easy_vqa(tmp_path):
    """Both stages on the public set, then the questions on the held-out pictures."""
    data = shared("easy_vqa")
    ok(
        *("train", "--config", "configs/easy_vqa.py", f"--config.data_folder={data}"),
        *("--workdir", tmp_path / "easy_vqa"),
    )
    scored = json.loads((tmp_path / "easy_vqa" / "exact_match.json").read_text())
    assert scored["n"] > 0
    assert scored["mean"] >= 0.995, scored["kinds"]
