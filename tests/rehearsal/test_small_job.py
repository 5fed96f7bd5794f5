"""5,000 records of one's own: LoRA from a released checkpoint by the documented line, validated."""

import json
import math
from pathlib import Path

import pytest

from tests.rehearsal import own_data
from tests.rehearsal.command import losses, ok, report, train_words

RECORDS = 5000


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return own_data.job(tmp_path_factory.mktemp("own"), RECORDS)


def _settings(data: Path, model) -> dict:
    return {
        "model.init": model("original"),
        "model.vision_tower": model("clip"),
        "data.path": data,
        "data.image_folder": data.parent / "pictures",
        "data.holdout": 0.05,
    }


@pytest.mark.slow
def test_lora_on_ones_own_data(data, model, tmp_path):
    """The recipe as it is: batch 128, one epoch; then the answers on the held-out pictures."""
    workdir = tmp_path / "run"
    done = ok(
        *train_words("finetune_lora_7b", workdir, _settings(data, model) | {"exact_match": True})
    )
    assert len(losses(workdir)) == math.ceil(report(workdir)["samples"] / 128)
    assert sum(losses(workdir)[-5:]) < sum(losses(workdir)[:5])
    told = report(workdir)
    assert told["bad"] == []
    assert 0.93 * RECORDS < told["samples"] < 0.97 * RECORDS
    scored = json.loads((workdir / "exact_match.json").read_text())
    assert scored["n"] + told["samples"] == RECORDS
    assert f"of {scored['n']} questions" in done.out

    base = model("original")
    merged = tmp_path / "merged"
    ok("convert", workdir / "export", merged, "--to", "hf", "--merge", "--check")
    adapter = tmp_path / "adapter"
    ok("convert", workdir / "export", adapter, "--to", "peft", "--base", base)
    picture = data.parent / "pictures" / "shots" / "00000.jpg"
    said = [
        ok("chat", "--model", folder, "--image", picture, "--prompt", "Which colour?").out
        for folder in (workdir / "export", merged)
    ]
    assert said[0] == said[1]


# Quick: test_interrupted.py runs the first on such records, tests/documents README's line of the second,
# tests/train/test_heldout.py the held-out part.
@pytest.mark.slow
@pytest.mark.parametrize("config", ["finetune_lora_7b", "finetune_task_lora_7b"])
def test_its_first_steps(config, data, model, tmp_path):
    """Two steps of the same line."""
    ok(*train_words(config, tmp_path, _settings(data, model) | {"batch_size": 16, "steps": 2}))
    assert all(map(math.isfinite, losses(tmp_path)))
    assert report(tmp_path)["bad"] == []
