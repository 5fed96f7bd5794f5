"""Seats of an epoch, weights of files, and who stands in for a bad sample."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.data.check import open_data
from llava_jax.data.loader import Loader
from llava_jax.data.settings import DataSettings
from llava_jax.errors import SampleError
from tests.data.test_loader import make_example

MODEL = LlavaConfig.tiny()


def record(name: str, words: int = 3, image: str | list | None = None, answer="yes") -> dict:
    tags = "<image> " * (len(image) if isinstance(image, list) else bool(image))
    turns = [
        {"from": "human", "value": tags + "what " * words},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


def loader(
    folder: Path, *files: list, index: int = 0, count: int = 1, parts: int = 1, **changes
) -> Loader:
    paths = []
    for n, records in enumerate(files):
        paths.append(str(folder / f"{n}.json"))
        Path(paths[-1]).write_text(json.dumps(records))
    base = {
        "batch_size": 8,
        "threads": 0,
        "bad_limit": 1.0,
        "max_length": 0,
        "length_buckets": (16, 64, 128),
    }
    settings = DataSettings.read(
        {"path": tuple(paths), "image_folder": str(folder), **base, **changes}
    ).completed(128, count, parts)
    data = open_data(settings)
    return Loader(data, make_example, settings, MODEL, index, count)


def epoch(source: Loader, number: int = 0) -> list[tuple[dict, dict]]:
    steps = source.steps_per_epoch
    return [source.load(step) for step in range(number * steps, (number + 1) * steps)]


def ids(found) -> list[str]:
    return [name for _, info in found for name in info["ids"]]


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(4):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i}.png")
    return tmp_path


# Stand-ins ------------------------------------------------------------------------------------------


def test_sixty_bad_neighbours_do_not_make_the_next_record_train_more(folder):
    """60 of 160 are bad: 60 draws among the 100 good ones, 0.6 for each on average."""
    bad = [record(f"b{i}", image="none.png") for i in range(60)]
    good = [record(f"g{i}", image=f"{i % 4}.png") for i in range(100)]
    for shuffle in (False, True):
        source = loader(folder, [*good[:50], *bad, *good[50:]], shuffle=shuffle)
        found = epoch(source)
        times = Counter(ids(found))
        assert set(times) == {r["id"] for r in good}
        assert sum(times.values()) == 160
        # The chance that any of 100 is drawn 6 times or more is 1 in 250.
        assert max(times.values()) <= 1 + 5
        assert sum(info["replaced"] for _, info in found) == 60
        assert sum(info["empty"] for _, info in found) == 0
    again = [ids(epoch(source, n)) for n in (0, 1)]
    assert again[0] == ids(found)
    extra = [Counter(e) - Counter(dict.fromkeys(times, 1)) for e in again]
    assert extra[0] != extra[1]  # drawn anew in every epoch


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_stand_in_keeps_modality_and_shape(folder, pack, grouped):
    def batches(broken: bool):
        text = [record(f"t{i}", 3 + i % 5) for i in range(40)]
        one = [record(f"o{i}", 3 + i % 5, f"{i % 4}.png") for i in range(40)]
        many = [record(f"m{i}", 3, ["0.png", "1.png", "2.png"]) for i in range(8)]
        if broken:
            for r in (*text[:12], *one[:12]):
                r["conversations"][1]["value"] = "unusable"
            for r in one[12:20]:
                r["image"] = "none.png"
        source = loader(folder, [*text, *one, *many], pack=pack, group_by_modality=grouped)
        return epoch(source)

    whole, broken = batches(False), batches(True)
    for (a, _), (b, info) in zip(whole, broken):
        assert info["given"] == info["samples"] == 8
        if not pack:
            assert b["images"].shape[1] <= a["images"].shape[1]
            assert b["tokens"].shape[1] <= a["tokens"].shape[1]
            shown = [(x["slots"] >= 0).any(axis=1).sum() for x in (a, b)]
            assert shown[0] == shown[1]
    assert sum(info["replaced"] for _, info in broken) == 32
    assert not any(name in ids(broken) for name in ("t0", "t11", "o0", "o19"))


def test_a_text_batch_stays_without_images(folder):
    """One image in a text batch would cost a tower's worth of rows."""
    text = [record(f"t{i}", answer="unusable" if i % 4 == 0 else "yes") for i in range(32)]
    image = [record(f"o{i}", image=f"{i % 4}.png") for i in range(32)]
    found = epoch(loader(folder, [*text, *image], group_by_modality=True))
    widths = [batch["images"].shape[1] for batch, _ in found]
    assert sorted(widths) == [0] * 4 + [1] * 4
    text_batch = next(batch for batch, _ in found if batch["images"].shape[1] == 0)
    assert text_batch["images"].shape == (8, 0, 64, 64, 3)
    assert (text_batch["slots"] == -1).all()


def test_a_place_stays_empty_where_nothing_fits(folder):
    records = [record("b", image="none.png"), *(record(f"t{i}") for i in range(7))]
    ((batch, info),) = epoch(loader(folder, records))
    assert (info["given"], info["replaced"], info["empty"], info["samples"]) == (8, 0, 1, 8)
    assert info["image_empty"] == 1
    assert (batch["segments"] > 0).any(axis=1).sum() == 7
    records = [record("b", answer="unusable", image="0.png"), *records[1:]]
    ((batch, info),) = epoch(loader(folder, records))
    assert (info["given"], info["empty"], info["samples"]) == (8, 1, 7)


def test_stand_ins_are_the_same_on_every_host(folder):
    records = [
        record(f"r{i}", i % 7, f"{i % 4}.png" if i % 3 else None, "unusable" if i % 5 == 1 else "a")
        for i in range(50)
    ]
    records[7]["image"] = "none.png"
    for extra in ({}, {"pack": "exact"}, {"group_by_modality": True}):
        whole = epoch(loader(folder, records, parts=2, **extra))
        hosts = [epoch(loader(folder, records, index=i, count=2, **extra)) for i in range(2)]
        for (batch, info), a, b in zip(whole, *hosts):
            for name, value in batch.items():
                np.testing.assert_array_equal(np.concatenate([a[0][name], b[0][name]]), value)
            assert a[1]["ids"] + b[1]["ids"] == info["ids"]


# Rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_packed_rows_serve_every_micro_batch_of_an_epoch(folder, grouped):
    """8 devices x 4 micro-batches; the last batch of 82 samples, as the 665K have it."""
    rng = np.random.default_rng(0)
    records = [
        record(f"r{i}", int(rng.integers(1, 80)), f"{i % 4}.png" if rng.random() < 0.8 else None)
        for i in range(6 * 128 + 82)
    ]
    (folder / "0.json").write_text(json.dumps(records))
    settings = DataSettings.read(
        {
            "path": str(folder / "0.json"),
            "image_folder": str(folder),
            "batch_size": 128,
            "pack": True,
            "group_by_modality": grouped,
            "length_buckets": (128,),
            "threads": 0,
        }
    ).completed(128, row_parts=32)
    source = Loader(open_data(settings), make_example, settings, MODEL)
    rows = [source.plan(step).shape.rows for step in range(source.steps_per_epoch)]
    assert len(rows) == 7
    assert all(n % 32 == 0 for n in rows)
    assert len(source.plan(6).given) == 82
    assert sum(len(source.plan(step).given) for step in range(7)) == len(records)


# Weights --------------------------------------------------------------------------------------------


def test_weights_say_how_often_a_file_is_seen(folder):
    files = [
        [record(f"{n}-{i}") for i in range(size)] for n, size in (("a", 10), ("b", 20), ("c", 5))
    ]
    source = loader(folder, *files, weights=(2, 0.25, 1), shuffle=True)
    assert source.samples == 2 * 10 + 5 + 5
    assert source.steps_per_epoch == 4
    drawn = []
    for number in range(12):
        times = Counter(ids(epoch(source, number)))
        assert sum(times.values()) == 30
        assert [times[f"a-{i}"] for i in range(10)] == [2] * 10
        assert [times[f"c-{i}"] for i in range(5)] == [1] * 5
        drawn.append(frozenset(k for k in times if k[0] == "b"))
        assert len(drawn[-1]) == 5
    assert len(set(drawn)) > 8  # a quarter drawn anew in each epoch
    assert len(frozenset.union(*drawn)) == 20
    same = loader(folder, *files, weights=(2, 0.25, 1), shuffle=True, prefetch=2)
    assert ids(epoch(same, 5)) == ids(epoch(source, 5))


def test_weights_of_one_change_nothing(folder):
    files = [[record(f"{n}-{i}", i) for i in range(9)] for n in "ab"]
    for extra in ({}, {"group_by_modality": True}, {"pack": True}):
        plain, ones = (
            loader(folder, *files, **extra),
            loader(folder, *files, weights=(1, 1), **extra),
        )
        joined = loader(folder, [*files[0], *files[1]], **extra)
        assert ids(epoch(plain)) == ids(epoch(ones)) == ids(epoch(joined))
        assert plain.identity() == ones.identity()


def test_weights_are_part_of_a_run(folder):
    from llava_jax.errors import ConfigError

    files = [[record(f"{n}-{i}", i) for i in range(9)] for n in "ab"]
    state = json.loads(json.dumps(loader(folder, *files, weights=(1, 2)).get_state()))
    loader(folder, *files, weights=(1.0, 2.0)).set_state(state)
    with pytest.raises(ConfigError, match=r"data.weights is \[1, 3\] but was \[1, 2\]"):
        loader(folder, *files, weights=(1, 3)).set_state(state)
    with pytest.raises(SampleError, match=r"data.weights leave no sample"):
        loader(folder, *files, weights=(0.01, 0.01))


def test_the_held_side_shows_each_record_once(folder):
    files = [[record(f"{n}-{i}", i) for i in range(30)] for n in "ab"]
    options = {"weights": (3, 0.5), "holdout": 0.4}
    held = ids(epoch(loader(folder, *files, holdout_side="held", **options)))
    assert len(held) == len(set(held)) > 10
    assert not set(held) & set(ids(epoch(loader(folder, *files, **options))))


# Accounting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 3])
def test_every_sample_is_accounted_for(folder, threads):
    records = [record(f"g{i}", image=f"{i % 4}.png") for i in range(30)]
    records += [record("far", image="none.png"), record("sick", answer="unusable"), {"id": "x"}]
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    records.append(record("broken", image="4.png"))
    source = loader(folder, records, threads=threads)
    whole = [next(source) for _ in range(7)]
    report = source.report()
    assert report["records"] == 34
    assert report["samples"] == 33
    assert report["given"] == 33 + 16 == sum(info["given"] for _, info in whole)
    good = sum(name[0] == "g" for name in whose_turn(source))
    assert report["given"] - good == report["replaced"] + report["empty"] >= 3
    assert report["bad_count"] == 4
    assert report["bad_kinds"] == {
        "the image file does not exist": 1,
        "no list of conversations": 1,
        "unusable text": 1,
        "the image data is damaged or cut off": 1,
    }
    source.close()
    resumed = loader(folder, records, threads=threads)
    resumed.set_state(json.loads(json.dumps(source.get_state())))
    assert resumed.report() == report
    assert json.loads(json.dumps(report)) == report


def whose_turn(source: Loader) -> list[str]:
    """Ids that the order gave to the steps so far."""
    steps = range(source.get_state()["step"])
    return [source._data.ids[place] for step in steps for place in source.plan(step).given]


def test_samples_mended_since_do_not_count_after_a_resume(folder):
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    records = [record(f"g{i}", image=f"{i % 4}.png") for i in range(7)]
    records.append(record("broken", image="4.png"))
    source = loader(folder, records)
    next(source)
    state = source.get_state()
    assert [r["id"] for r in state["bad"]] == ["broken"]
    resumed = loader(folder, records)
    resumed.set_state(state)
    assert [r["id"] for r in resumed.report()["bad"]] == ["broken"]
    Image.new("RGB", (9, 9)).save(folder / "4.png")
    resumed = loader(folder, records)
    resumed.set_state(state)
    assert resumed.report()["bad"] == []


def test_a_stop_for_bad_images_can_be_saved(folder):
    (folder / "4.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    records = [record(f"g{i}", image=f"{i % 4}.png") for i in range(24)]
    records += [record(f"b{i}", image="4.png") for i in range(8)]
    from llava_jax.data.bad import TooManyBad

    source = loader(folder, records, shuffle=False, bad_limit=0.1)
    for _ in range(3):
        next(source)
    with pytest.raises(TooManyBad, match="samples are bad, more than data.bad_limit allows"):
        next(source)
    state = source.get_state()
    assert state["step"] == 3
    Image.new("RGB", (9, 9)).save(folder / "4.png")
    resumed = loader(folder, records, shuffle=False, bad_limit=0.1)
    resumed.set_state(state)
    assert next(resumed)[1]["ids"] == [f"b{i}" for i in range(8)]
