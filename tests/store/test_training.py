"""A run on packed data is the run on the JSON, to the bit."""

import json
import subprocess
import sys

import pytest

from llava_jax.data.stored import MANIFEST
from llava_jax.errors import ConfigError
from llava_jax.train.checks import check_settings
from llava_jax.train.config import load_config
from tests.conftest import shared

pytest.importorskip("tensorflow_datasets")


def run(*words: object) -> None:
    command = [sys.executable, "-m", "llava_jax", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_accepts_packed_data(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    config = load_config("pretrain_7b", ["data.image_folder=", f"data.path={tmp_path}"])
    check_settings(config)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="no such data file"):
        check_settings(config)


@pytest.mark.slow
def test_easy_vqa_trains_to_the_same_losses(tmp_path):
    data, losses = shared("easy_vqa"), []
    packed = []
    for n, name in enumerate(("captions", "instruct"), 1):
        out = tmp_path / name
        run("data", "pack", data / f"{name}.json", "--images", data, "--out", out)
        packed.append(f"--config.stages.stage{n}.data.path={out}")
    short = [f"--config.stages.stage{n}.steps=12" for n in (1, 2)]
    for name, words in (("json", []), ("packed", packed)):
        config = ("--config", "configs/easy_vqa.py", f"--config.data_folder={data}")
        work = tmp_path / name
        run("train", *config, *short, *words, "--config.exact_match=false", "--workdir", work)
        rows = [
            json.loads(line)
            for stage in ("stage1", "stage2")
            for line in (work / stage / "metrics.jsonl").read_text().splitlines()
        ]
        held = json.loads((work / "heldout.json").read_text())
        losses.append(([(row["step"], row["loss"]) for row in rows if "loss" in row], held["loss"]))
    assert losses[0] == losses[1]
    assert len(losses[0][0]) > 2
