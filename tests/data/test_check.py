"""What is found out about the data before a model is loaded."""

import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from llava_jax.data.bad import TooManyBad
from llava_jax.data.check import HELD_SIDE, open_data
from llava_jax.data.image_files import missing_image, missing_images
from llava_jax.data.settings import data_files, split_paths
from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.records import image_paths


def record(name: str, image=None, question: str | None = None, answer: str = "red") -> dict:
    if question is None:
        question = "<image>\nWhat?" if image else "What?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


def write(path: Path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "img" / "coco").mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (8, 8)).save(tmp_path / "img" / "coco" / f"{i}.png")
    return tmp_path


def settings(folder: Path, records: list, **changes) -> dict:
    path = write(folder / "data.json", records)
    return {"path": path, "image_folder": str(folder / "img"), **changes}


GOOD = [record(f"s{i}", f"coco/{i}.png") for i in range(40)]


def test_missing_images_are_known_before_the_first_step(folder, caplog):
    for i in (3, 17):
        (folder / "img" / "coco" / f"{i}.png").unlink()
    (folder / "img" / "coco" / "5.png").rename(folder / "img" / "coco" / "5.PNG")
    report = folder / "run" / "bad.jsonl"
    with caplog.at_level(logging.WARNING):
        data = open_data(settings(folder, GOOD, bad_report=str(report)))
    assert len(data) == 40  # a sample stays one, and another stands in for it
    assert [r["id"] for r in data.bad.rows()] == ["s3", "s5", "s17"]
    (line,) = caplog.messages
    assert line.startswith("3 samples are left out: the image file does not exist (s3, s5, s17)")
    assert len(report.read_text().split("\n")) == 4
    with pytest.raises(TooManyBad, match="3 samples are bad, more than data.bad_limit allows"):
        open_data(settings(folder, GOOD, bad_limit=0.05))
    with pytest.raises(TooManyBad, match="sample s3: .*3.png: the file does not exist"):
        open_data(settings(folder, GOOD, bad_samples="error"))


def test_every_folder_is_listed_once(folder, monkeypatch):
    import os

    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda p: listed.append(p) or scandir(p))
    monkeypatch.setattr(os, "stat", None)
    records = [*GOOD, *GOOD, record("x", ["coco/1.png", "gqa/2.png"]), record("t")]
    images = [image_paths(r) for r in records]
    missing = missing_images(images, [str(folder / "img")] * len(records))
    assert missing == {80: str(folder / "img" / "gqa" / "2.png")}
    assert sorted(listed) == [str(folder / "img" / n) for n in ("coco", "gqa")]


@pytest.mark.parametrize(
    "path",
    [
        "coco",
        "coco/",
        "coco/1.png/x",
        "a\0b",
        "\ud800.png",
        "coco/1.PNG",
        "a" * 300,
        "a" * 300 + "/b",
    ],
)
def test_odd_paths_are_missing(folder, path):
    missing = missing_images([(path,)], [str(folder / "img")])
    assert list(missing) == [0]
    assert " exist" in missing_image(0, "a", missing[0]).kind


def test_links_and_odd_spellings_of_a_path_are_found(folder):
    (folder / "img" / "link.png").symlink_to(folder / "img" / "coco" / "1.png")
    (folder / "img" / "dead.png").symlink_to(folder / "none.png")
    names = ["link.png", "./coco//2.png", "coco/./3.png", "dead.png"]
    assert list(missing_images([(n,) for n in names], [str(folder / "img")] * 4)) == [3]


def test_a_wrong_image_folder_is_one_line_that_names_it(folder, caplog, monkeypatch):
    wrong = settings(folder, GOOD, image_folder=str(folder / "img" / "coco"))
    with caplog.at_level(logging.WARNING), pytest.raises(TooManyBad) as e:
        open_data(wrong)
    assert not caplog.messages
    assert str(folder / "img" / "coco" / "coco" / "0.png") in e.value.message
    assert e.value.message.startswith("data.image_folder ")
    assert e.value.fix == f"set data.image_folder={folder / 'img'}"
    monkeypatch.chdir(folder)
    with pytest.raises(TooManyBad) as e:
        open_data({**wrong, "image_folder": ""})
    assert "data.image_folder is empty" in e.value.message
    assert str(folder / "coco" / "0.png") in e.value.message
    for i in range(2):  # nearly none is as wrong as none
        (folder / "coco").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "coco" / f"{i}.png")
    with pytest.raises(TooManyBad, match="holds only 2 of the images of 40 samples"):
        open_data({**wrong, "image_folder": ""})


def test_a_folder_that_was_not_unpacked_is_named(folder):
    records = [*GOOD, *(record(f"v{i}", f"vg/{i}.png") for i in range(20))]
    with pytest.raises(TooManyBad) as e:
        open_data(settings(folder, records))
    assert f"the folder {folder / 'img' / 'vg'} does not exist (20: v0, v1" in e.value.message


def test_reasons_are_grouped_by_kind(folder):
    odd = [
        {**record(f"k{i}", question="<image>\nWhat?"), "images": ["coco/1.png"]} for i in range(9)
    ]
    odd += [record(f"e{i}", answer=" ") for i in range(4)]
    odd += [record("two", ["coco/1.png", "coco/2.png"], "<image><image><image> What?")]
    with pytest.raises(TooManyBad) as e:
        open_data(settings(folder, [*GOOD, *odd]))
    assert "14 samples are bad, more than data.bad_limit allows (6): " in e.value.message
    assert "the picture is under `images`, not `image` (9: k0, k1, k2, k3, k4, ...)" in str(e.value)
    assert "no turn has an answer to train (4: e0, e1, e2, e3)" in e.value.message
    assert "_ <image> tags for _ images (1: two)" in e.value.message
    assert "rename the key `images` to `image`" in str(e.value.fix)


def test_more_images_than_a_row_has_places_for(folder):
    many = record("many", ["coco/1.png"] * 3, "<image>" * 3)
    data = open_data(settings(folder, [*GOOD, many], image_buckets=(0, 1, 2)))
    (row,) = data.bad.rows()
    assert row["id"] == "many"
    assert row["reason"] == (
        "3 images are more than the largest of data.image_buckets, 2 "
        "(add a larger one to data.image_buckets)"
    )


def test_tags_that_do_not_match_are_said_once_by_kind(folder, caplog):
    odd = [
        record("a", "coco/1.png", "What?"),
        record("b", "coco/1.png", "What?"),
        record("c", question="What is <image>?"),
        record("d", "coco/2.png", "<image> <image> What?"),
    ]
    with caplog.at_level(logging.WARNING):
        open_data(settings(folder, [*GOOD, *odd]))
    assert caplog.messages == [
        "image without tag: 2 of 44 samples (a, b): no <image> in the text, so the image is not shown",
        "tag without image: 1 of 44 samples (c): <image> is trained as text",
        "more tags than images: 1 of 44 samples (d): the image is shown at every <image>",
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_data(settings(folder, [*GOOD, *odd[:2]], version="plain"))
    assert not caplog.messages  # a caption shows its image without a tag too


def test_nothing_left_to_use(folder):
    with pytest.raises(SampleError, match="every sample is bad: addresses are not fetched"):
        open_data(settings(folder, [record("u", "https://a.org/b.jpg")]))
    with pytest.raises(SampleError, match="no sample is held out"):
        open_data(settings(folder, GOOD, holdout_side="held"))


def test_missing_held_out_images_are_named_at_the_start(folder, caplog):
    held = open_data(settings(folder, GOOD, holdout=0.3, holdout_side="held"))
    gone = held.records[1]["image"]
    (folder / "img" / gone).unlink()
    with caplog.at_level(logging.WARNING):
        open_data(settings(folder, GOOD, holdout=0.3))
    (line,) = caplog.messages
    assert line == (
        f"1 of {len(held)} held-out samples will be left out: no such image file: "
        f"{held.ids[1]} ({folder / 'img' / gone})"
    )
    caplog.clear()
    assert len(open_data(settings(folder, GOOD, holdout=0.3, **HELD_SIDE), say=False).bad) == 1
    assert not caplog.messages


def test_malformed_records_do_not_count_against_the_held_side(folder):
    """They belong to no side; the part that is held out is small, and so is its bad_limit."""
    odd = [{"id": f"odd{n}"} for n in range(10)]
    limited = settings(folder, [*GOOD, *odd], holdout=0.1, bad_limit=0.3)
    assert len(open_data(limited).bad) == 10
    assert len(open_data({**limited, **HELD_SIDE})) > 0


def test_the_held_side_is_what_training_leaves(folder):
    sides = {
        side: open_data(settings(folder, GOOD, holdout=0.3, holdout_side=side))
        for side in ("train", "held")
    }
    assert set(sides["train"].ids) | set(sides["held"].ids) == {r["id"] for r in GOOD}
    assert not set(sides["train"].ids) & set(sides["held"].ids)
    assert sides["train"].held_out == len(sides["held"]) > 0


# Several files --------------------------------------------------------------------------------------


def test_ways_to_name_several_files(tmp_path):
    odd = write(tmp_path / "a,b.json", GOOD)
    assert split_paths(odd) == (odd,)
    assert split_paths("a.json, b.json,") == ("a.json", "b.json")
    many = [f"{n:0100}/a.json" for n in range(50)]  # too long for a name, whole or by its parts
    assert split_paths(",".join(many)) == tuple(many)
    assert split_paths(("a.json", odd)) == split_paths(["a.json", odd]) == ("a.json", odd)
    assert split_paths("") == split_paths(None) == ()
    assert split_paths("~/a.json,~/b.json") == tuple(
        str(Path.home() / n) for n in ("a.json", "b.json")
    )
    assert split_paths(2024) == ("2024",)  # a folder of that name, as a command line reads it


def test_each_file_has_its_folder(folder):
    (folder / "other").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "other" / "x.png")
    one = write(folder / "one.json", GOOD)
    two = write(folder / "two.json", [record("x", "x.png")])
    folders = (str(folder / "img"), str(folder / "other"))
    data = open_data({"path": (one, two), "image_folder": folders})
    assert not data.bad.rows()
    assert data.file.tolist() == [0] * 40 + [1]
    with pytest.raises(TooManyBad, match=r"sample x: .*img/x\.png: the file does not exist"):
        open_data({"path": (one, two), "image_folder": folders[0], "bad_samples": "error"})


def test_files_of_weight_0_are_not_opened(folder):
    one = write(folder / "one.json", GOOD)
    both = {"path": f"{one},none.json", "image_folder": str(folder / "img")}
    assert len(open_data({**both, "weights": (1, 0)})) == 40
    with pytest.raises(SampleError, match=r"none\.json: no such data file"):
        open_data(both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"image_folder": "x,y,z"}, "image_folder names 3 folders for 2 files"),
        ({"weights": (1,)}, "weights has 1 number for 2 files"),
        ({"weights": (1, -1)}, "but must be from 0 to 1,000"),
        ({"weights": (1, float("nan"))}, "not a tuple of numbers"),
        ({"weights": (1, "a")}, "not a tuple of numbers"),
        ({"weights": (0, 0)}, "are all 0"),
        ({"holdout": 1.0}, "data.holdout is 1.0, but must be"),
    ],
)
def test_settings_of_files_are_checked(changes, message):
    from llava_jax.data.settings import DataSettings

    with pytest.raises(ConfigError, match=message):
        data_files(DataSettings.read({"path": "a.json,b.json", **changes}))


def test_a_fraction_of_numpy_is_a_number(folder):
    import numpy as np

    plain = open_data(settings(folder, GOOD, holdout=0.3))
    assert open_data(settings(folder, GOOD, holdout=np.float64(0.3))).ids == plain.ids
