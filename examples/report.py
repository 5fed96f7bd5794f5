"""Makes docs/report.png: a run with two validation sets that stops early, from its command lines to the page.

    python -m examples.report WORKDIR docs/report.png

Needs Chromium for the picture. The model is `tiny`, the data are the quickstart's pictures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.util import write_json

SIZE = (1240, 1822)


def run(workdir: Path, picture: Path) -> None:
    """Makes the data in `workdir`/data, trains in `workdir`/run, and draws the report's page."""
    data = make_dataset(workdir / "data", train=240, held_out=40)
    sets = f"seen path={data}/seen.json images={data} ask=8, new path={data}/new.json images={data} ask=8"
    records = json.loads((data / "instruct.json").read_text(encoding="utf-8"))
    for name, part in (("train", records[:-16]), ("seen", records[:16]), ("new", records[-16:])):
        write_json(data / f"{name}.json", part)
    command = ["train", "--config", "common", "--workdir", str(workdir / "run")]
    settings = {
        "name": "colours",
        "model.init": "tiny",
        "data.path": data / "train.json",
        "data.image_folder": data,
        "data.max_length": 208,
        "data.length_buckets": "208,",
        "data.eval": sets,
        "eval_every": 4,
        "early_stop": 2,
        "eval_samples": 2,
        "batch_size": 8,
        "steps": 60,
        "optimizer": "muon",
        "lr": 0.02,
        "dtype": "float32",
    }
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    main([*command, *words])
    main(["report", str(workdir / "run")])
    screenshot(workdir / "run" / "report.html", picture)


def screenshot(page: Path, picture: Path) -> None:
    """The page as a PNG. Raises LlavaError where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        raise LlavaError("there is no Chromium to draw the page with")
    size = ",".join(map(str, SIZE))
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    words += [f"--window-size={size}", "--virtual-time-budget=3000", f"--screenshot={picture}"]
    subprocess.run([chromium, *words, page.absolute().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
