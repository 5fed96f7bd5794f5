"""The data set on disk is what the loader and a person expect."""

import json

import numpy as np
from PIL import Image

from llava_jax.data.records import check_record, image_paths
from llava_jax.quickstart.dataset import DONE, LONG_KINDS, SHORT_KINDS, make_dataset
from llava_jax.quickstart.questions import KINDS
from llava_jax.quickstart.scenes import render, sample
from llava_jax.train.evaluate import questions_of


def test_files(tmp_path):
    folder = make_dataset(tmp_path / "data", train=12, held_out=3, seed=5)
    captions = json.loads((folder / "captions.json").read_text("utf-8"))
    talks = json.loads((folder / "instruct.json").read_text("utf-8"))
    held_out = [json.loads(x) for x in (folder / "heldout.jsonl").open(encoding="utf-8")]
    assert (len(captions), len(talks), len(held_out)) == (12, 12, 3 * len(KINDS))
    for i, record in enumerate(captions + talks):
        check_record(record, f"[{i}]")
        with Image.open(folder / image_paths(record)[0]) as picture:
            assert np.array_equal(np.asarray(picture), render(sample(12, 5))[i % 12])
    for i, record in enumerate(talks):
        extra = [] if i % 4 else [LONG_KINDS[i // 4 % 2]]
        assert record["kinds"] == [*SHORT_KINDS, *extra]
        asked = questions_of(record, folder)
        assert [q.kind for q in asked] == record["kinds"]
    assert [row["kind"] for row in held_out] == list(KINDS) * 3
    assert len({row["question_id"] for row in held_out}) == len(held_out)


def test_made_once_per_setting(tmp_path):
    folder = make_dataset(tmp_path / "data", train=4, held_out=1, seed=0)
    before = (folder / "images" / "00000.png").stat().st_mtime_ns
    make_dataset(folder, train=4, held_out=1, seed=0)
    assert (folder / "images" / "00000.png").stat().st_mtime_ns == before
    first = (folder / "images" / "00000.png").read_bytes()
    make_dataset(folder, train=4, held_out=1, seed=1)
    assert (folder / "images" / "00000.png").read_bytes() != first
    assert json.loads((folder / DONE).read_text())["seed"] == 1
