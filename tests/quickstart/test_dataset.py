"""The data set on disk is what the loader and a person expect."""

import json
import random

import numpy as np
from PIL import Image

from llava_jax.data.records import check_record, image_paths
from llava_jax.quickstart.dataset import DONE, LONG_KINDS, SHORT_KINDS, make_dataset
from llava_jax.quickstart.questions import KINDS, ask_caption
from llava_jax.quickstart.scenes import render, sample
from llava_jax.train.evaluate import questions_of


def test_files(tmp_path):
    folder = make_dataset(tmp_path / "data", train=12, held_out=3, seed=5)
    captions = json.loads((folder / "captions.json").read_text("utf-8"))
    talks = json.loads((folder / "instruct.json").read_text("utf-8"))
    held_out = [json.loads(x) for x in (folder / "heldout.jsonl").open(encoding="utf-8")]
    scenes = [record for record in talks if "turns" not in record]
    assert (len(captions), len(scenes), len(held_out)) == (12, 12, 3 * len(KINDS))
    for i, record in enumerate(captions + scenes):
        check_record(record, f"[{i}]")
        with Image.open(folder / image_paths(record)[0]) as picture:
            assert np.array_equal(np.asarray(picture), render(sample(12, 5))[i % 12])
    for i, record in enumerate(scenes):
        extra = [] if i % 4 else [LONG_KINDS[i // 4 % 2]]
        assert record["kinds"] == [*SHORT_KINDS, *extra]
        asked = questions_of(record, folder)
        assert [q.kind for q in asked] == record["kinds"]
    assert [row["kind"] for row in held_out] == list(KINDS) * 3
    assert len({row["question_id"] for row in held_out}) == len(held_out)


def test_conversations_lie_among_the_questions(tmp_path):
    folder = make_dataset(tmp_path / "data", train=101, held_out=5, seed=5)
    records = json.loads((folder / "instruct.json").read_text("utf-8"))
    objects = dict(zip((f"images/{i:05d}.png" for i in range(101)), sample(101, 5).objects()))
    talks = [record for record in records if record.get("turns")]
    assert [r["id"] for r in talks[:2]] == ["talk-00000", "talk-00002"]
    assert len(talks) == 51 + 6
    long = [record for record in talks if sorted(record["kinds"]) == sorted(KINDS)]
    assert [r["id"] for r in long] == [f"long-talk-{i:05d}" for i in range(0, 101, 20)]
    turns, plain = [], 0
    for record in talks:
        check_record(record, record["id"])
        assert record["turns"] == "conversation"
        said = record["conversations"]
        assert len(record["kinds"]) * 2 == len(said)
        assert "".join(t["value"] for t in said).count("<image>") == 1
        turns.append(len(record["kinds"]))
        plain += sum("\n" not in t["value"].replace("<image>\n", "") for t in said[::2])
        for kind, answer in zip(record["kinds"], said[1::2]):
            if kind == "caption":
                assert answer["value"] == ask_caption(objects[record["image"]], random.Random())[1]
    assert (min(turns), max(turns)) == (2, len(KINDS))
    assert 0.4 < plain / sum(turns) < 0.75
    held_out = json.loads((folder / "heldout_talks.json").read_text("utf-8"))
    assert [r["image"] for r in held_out] == [f"heldout/{i:05d}.png" for i in range(5)]
    assert all(sorted(r["kinds"]) == sorted(KINDS) for r in held_out)


def test_made_once_per_setting(tmp_path):
    folder = make_dataset(tmp_path / "data", train=4, held_out=1, seed=0)
    before = (folder / "images" / "00000.png").stat().st_mtime_ns
    make_dataset(folder, train=4, held_out=1, seed=0)
    assert (folder / "images" / "00000.png").stat().st_mtime_ns == before
    first = (folder / "images" / "00000.png").read_bytes()
    make_dataset(folder, train=4, held_out=1, seed=1)
    assert (folder / "images" / "00000.png").read_bytes() != first
    assert json.loads((folder / DONE).read_text())["seed"] == 1
