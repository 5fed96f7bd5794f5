"""A run and its data: what ends it saves first, and what was mended since does not count."""

import json

import pytest
from PIL import Image

from llava_jax.data.bad import TooManyBad
from llava_jax.train.config import load_config
from llava_jax.train.log import METRICS, read_metrics
from llava_jax.train.stages import run_stages
from tests.train.run import make_data, make_model, overrides


@pytest.mark.slow  # quick, without the save: test_mistakes.py::test_the_first_bad_record_stops_a_strict_run
def test_a_stop_for_bad_images_saves_first(tmp_path):
    data = make_data(tmp_path / "data", 24)
    model = make_model(tmp_path, data)
    records = json.loads(data.read_text())
    for record in records[-6:]:
        record["image"] = "images/broken.png"
        record["conversations"][0]["value"] = "<image>\nWhat color is it?"
    data.write_text(json.dumps(records))
    picture = data.parent / "images" / "broken.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    changes = {"data.shuffle": False, "batch_size": 8, "steps": 3, "save_every": 100}
    config = load_config("common", overrides(model, data, **changes))
    workdir = tmp_path / "run"
    with pytest.raises(TooManyBad, match=r"more than data.bad_limit allows \(3\): the image data"):
        run_stages(config, workdir, quiet=True)
    assert [int(p.name) for p in (workdir / "checkpoints").iterdir()] == [2]
    assert len((workdir / "bad.jsonl").read_text().split("\n")) == 5

    Image.new("RGB", (9, 9)).save(picture)
    run_stages(config, workdir, quiet=True)
    assert [row["step"] for row in read_metrics(workdir / METRICS)] == [1, 2, 3]
    report = json.loads((workdir / "data_report.json").read_text())
    assert (report["given"], report["seen"], report["bad_count"]) == (24, 24, 0)
    assert (workdir / "bad.jsonl").read_text() == ""
