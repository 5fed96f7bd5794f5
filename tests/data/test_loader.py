"""The loader on a small data set made here: exactness, resume, hosts, bad samples, packing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.data.bad import TooManyBad
from llava_jax.data.check import open_data
from llava_jax.data.loader import Loader, short_names
from llava_jax.data.settings import DataSettings
from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.example import Example

MODEL = LlavaConfig.tiny()  # 64 px, 16 features an image


def make_example(record, sample_id: str) -> Example:
    """One token a word; the answers are trained. Stands for llava_jax.text.sample here."""
    if "unusable" in str(record["conversations"]):
        raise SampleError(f"sample {sample_id}: unusable text")
    ids, labels = [1], [-100]
    for turn in record["conversations"]:
        words = turn["value"].split()
        found = [-200 if w == "<image>" else 3 + len(w) for w in words]
        ids += found
        labels += found if turn["from"] == "gpt" else [-100] * len(found)
    image = record.get("image")
    images = () if not image else (image,) if isinstance(image, str) else tuple(image)
    return Example(ids, images, labels, id=sample_id)


def make_data(folder: Path, count: int = 37) -> None:
    rng = np.random.default_rng(5)
    records = []
    for i in range(count):
        question = "<image> " + "what " * (1 + i % 7)
        record = {"id": f"s{i}", "image": f"{i // 2}.png"}
        if i % 5 == 4:
            record, question = {"id": f"s{i}"}, "tell me"
        elif not (folder / f"{i // 2}.png").exists():
            pixels = rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i // 2}.png")
        answer = "yes " * (1 + i % 4)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({**record, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))


@pytest.fixture
def data(tmp_path) -> Path:
    make_data(tmp_path)
    return tmp_path


def loader(
    folder: Path, index: int = 0, count: int = 1, start: int = 0, parts: int = 1, **settings
) -> Loader:
    base = {
        "batch_size": 4,
        "threads": 0,
        "length_buckets": (16, 32, 64),
        "max_length": 0,
        "seed": 3,
    }
    plain = DataSettings.read(
        {"path": str(folder / "data.json"), "image_folder": str(folder), **base, **settings}
    )
    full = plain.completed(64, count, parts)
    data = open_data(full, process_index=index)
    return Loader(data, make_example, full, MODEL, index, count, start)


def digest(batch) -> str:
    parts = [f"{k}{v.dtype}{v.shape}".encode() + v.tobytes() for k, v in sorted(batch.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def take(source: Loader, count: int) -> list[str]:
    return [digest(next(source)[0]) for _ in range(count)]


def epoch_ids(source: Loader) -> list[str]:
    return [i for _ in range(source.steps_per_epoch) for i in next(source)[1]["ids"]]


ALL = sorted(f"s{i}" for i in range(37))


FILL = {"pack": "fill", "pack_length": 128, "pack_rows": 2}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (("a/x.json", "b/y.jsonl"), ("x", "y")),
        (("r/a/x.json", "r/b/x.json", "r/y.json"), ("a/x", "b/x", "r/y")),
        (("/r/b/x.json", "a/x.json"), ("b/x", "a/x")),
        (("gs://r/a/x.json", "a/x.json"), ("r/a/x", "a/x")),
        (("a/x.json", "a/x.jsonl", "y.json"), ("x.json", "x.jsonl", "y.json")),
        (("a/x.json", "y.json", "a/x.json"), ("x", "y", "x (2)")),
        ((".", "x.json"), (".", "x")),
    ],
)
def test_every_data_file_has_a_name_of_its_own(paths, names):
    assert short_names(paths) == names


@pytest.mark.parametrize("extra", [{}, {"group_by_modality": True}, {"pack": "exact"}])
def test_every_sample_once_an_epoch(data, extra):
    source = loader(data, **extra)
    assert (source.samples, source.steps_per_epoch) == (37, 10)
    first, second = epoch_ids(source), epoch_ids(source)
    assert sorted(first) == sorted(second) == ALL
    assert first != second


def test_the_last_batch_is_filled_with_empty_rows(data):
    batch, info = loader(data).load(9)
    assert info["samples"] == len(info["ids"]) == 1
    assert batch["tokens"].shape[0] == 4
    assert batch["segments"].any(axis=1).tolist() == [True, False, False, False]
    assert (batch["targets"][1:] == -100).all()


def test_batches_fit_the_contract(data):
    for batch, info in (loader(data).load(step) for step in range(10)):
        rows, length = batch["tokens"].shape
        slots = batch["images"].shape[1]
        assert length in (16, 32, 64)
        assert slots in (0, 1)
        assert batch["images"].shape[2:] == (64, 64, 3)
        assert ((batch["slots"] >= 0).sum(axis=1) % 16 == 0).all()
        assert batch["slots"].max() < max(slots, 1) * 16
        assert info["tokens"] == (batch["segments"] > 0).sum()
        trained = batch["targets"] != -100
        following = np.take_along_axis(batch["tokens"], batch["target_at"] + 1, axis=1)
        np.testing.assert_array_equal(following[trained], batch["targets"][trained])
        assert rows == 4


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("extra", [{}, {"group_by_modality": True, "pack": "exact"}, FILL])
def test_resume_gives_the_same_bytes(data, threads, extra):
    whole = take(loader(data, augment="flip_shift4", **extra), 35)
    for at in (0, 1, 7, 10, 23):
        source = loader(data, threads=threads, augment="flip_shift4", **extra)
        assert take(source, at) == whole[:at]
        state = json.loads(json.dumps(source.get_state()))
        source.close()
        resumed = loader(data, threads=2 - threads % 3, augment="flip_shift4", **extra)
        resumed.set_state(state)
        assert take(resumed, 12) == whole[at : at + 12]
        resumed.close()


@pytest.mark.slow
def test_two_hundred_resumes_are_exact(data):
    """At 200 random steps, with 0, 1 and 2 threads in turn, the next 50 batches are the same bytes."""
    settings = {"cache_images": True, "pack": True, "augment": "shift4", "batch_size": 3}
    whole = take(loader(data, **settings), 450)
    sources = [loader(data, threads=n, **settings) for n in (0, 1, 2)]
    state = sources[0].get_state()
    for n, at in enumerate(np.random.default_rng(0).integers(0, 400, 200)):
        source = sources[n % 3]
        source.set_state({**state, "step": int(at)})
        assert take(source, 50) == whole[at : at + 50]
    for source in sources:
        source.close()


def test_start_is_the_same_as_going_there(data):
    assert take(loader(data, start=6), 3) == take(loader(data), 9)[6:]


@pytest.mark.parametrize("extra", [{}, {"pack": "exact"}, FILL, {"group_by_modality": True}])
def test_hosts_share_the_global_batch(data, extra):
    whole = loader(data, parts=2, **extra)
    hosts = [loader(data, i, 2, **extra) for i in range(2)]
    for _ in range(12):
        batch, info = next(whole)
        parts = [next(h) for h in hosts]
        for name, value in batch.items():
            joined = np.concatenate([p[0][name] for p in parts])
            np.testing.assert_array_equal(joined, value)
        assert [i for p in parts for i in p[1]["ids"]] == info["ids"]
        assert {p[1]["tokens"] for p in parts} == {info["tokens"]}


def test_grouped_batches_have_one_modality(data):
    source = loader(data, group_by_modality=True)
    kinds = [{bool((row >= 0).any()) for row in source.load(step)[0]["slots"]} for step in range(8)]
    assert all(len(k) == 1 for k in kinds)
    assert source.load(8)[0]["images"].shape[1] in (0, 1)


def test_packing_keeps_the_samples_and_saves_rows(data):
    packed, plain = loader(data, pack=True, batch_size=12), loader(data, batch_size=12)
    for _ in range(3):
        (a, info), (b, other) = next(packed), next(plain)
        assert sorted(info["ids"]) == sorted(other["ids"])
        assert info["tokens"] == other["tokens"] == (a["segments"] > 0).sum()
        assert sorted(a["targets"].ravel()[a["targets"].ravel() != -100]) == sorted(
            b["targets"].ravel()[b["targets"].ravel() != -100]
        )
        assert a["tokens"].shape[0] < b["tokens"].shape[0]


def spoil(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])


def test_bad_images_are_replaced_counted_and_repeatable(data):
    spoil(data, ["3.png", "10.png"])
    (data / "0.png").unlink()
    expected = {"s0", "s1", "s6", "s7", "s20", "s21"}
    runs = []
    for _ in range(2):
        source = loader(data, threads=2, bad_limit=0.5)
        found = [next(source) for _ in range(20)]
        runs.append([digest(b) for b, _ in found])
        for batch, info in found:
            assert (batch["segments"] > 0).any(axis=1).sum() == info["samples"]
            assert not expected & set(info["ids"])
        report = source.report()
        assert {r["id"] for r in report["bad"]} == expected
        assert report["bad_count"] == 6
        first_epoch = {i for _, info in found[:10] for i in info["skipped"]}
        assert first_epoch == expected
        source.close()
    assert runs[0] == runs[1]


def test_a_stand_in_is_of_the_same_modality_and_fits(data):
    spoil(data, ["3.png"])
    source = loader(data, shuffle=False, bad_limit=0.5, batch_size=2)
    batch, info = source.load(3)  # s6 and s7 share the image
    assert info["skipped"] == ["s6", "s7"]
    assert len(info["ids"]) == info["replaced"] == info["image_replaced"] == 2
    assert all(int(i[1:]) % 5 != 4 for i in info["ids"])  # those have no image
    good, _ = source.load(4)
    assert batch["images"].shape == good["images"].shape
    assert loader(data, shuffle=False, bad_limit=0.5, batch_size=2).load(3)[1] == info


def test_bad_text_and_malformed_records(data):
    records = json.loads((data / "data.json").read_text())
    records[2]["conversations"][1]["value"] = "unusable"
    records[8]["conversations"] = []
    records[11]["conversations"][1]["value"] = "yes " * 100  # too long: cut, not bad
    (data / "data.json").write_text(json.dumps(records))
    source = loader(data, bad_limit=0.5)
    assert source.samples == 36  # the malformed one never was a sample
    ids = epoch_ids(source)
    assert sorted(set(ids)) == sorted(set(ALL) - {"s2", "s8"})
    report = source.report()
    assert [(r["index"], r["id"]) for r in report["bad"]] == [(2, "s2"), (8, "s8")]
    assert "unusable text" in report["bad"][0]["reason"]
    assert report["cut"] == 1


def test_strict_and_limit_stop_the_run(data):
    spoil(data, ["3.png"])
    with pytest.raises(SampleError, match=r"sample s[67]: 3\.png: .*damaged"):
        epoch_ids(loader(data, bad_samples="error"))
    with pytest.raises(SampleError, match="1 sample is bad, more than"):
        epoch_ids(loader(data, bad_limit=0.0))


def test_bad_samples_survive_a_resume(data, tmp_path):
    spoil(data, ["3.png"])
    report = tmp_path / "bad.jsonl"
    source = loader(data, bad_limit=0.5, bad_report=str(report))
    epoch_ids(source)
    resumed = loader(data, bad_limit=0.5)
    resumed.set_state(source.get_state())
    assert resumed.report()["bad"] == source.report()["bad"]
    assert [json.loads(line)["id"] for line in report.read_text().splitlines()].count("s6") == 1


def test_a_row_without_a_stand_in_is_empty(tmp_path):
    make_data(tmp_path, 4)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"broken")
    source = loader(tmp_path, bad_limit=1.0, group_by_modality=False)
    batch, info = source.load(0)
    assert info["ids"] == []
    assert not batch["segments"].any()


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_of_nothing_but_bad_samples_stops_whatever_the_limit(tmp_path, broken):
    make_data(tmp_path, 4)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"broken") if broken else path.unlink()
    says = "every sample is bad" if broken else "holds none of the images of 4 samples"
    with pytest.raises(TooManyBad, match=says):
        next(loader(tmp_path, bad_limit=1.0, group_by_modality=False))


def test_state_of_other_data_is_refused(data):
    state = loader(data).get_state()
    with pytest.raises(ConfigError, match="data.seed is 4 but was 3"):
        loader(data, seed=4).set_state(state)
    make_data(data, 36)
    with pytest.raises(ConfigError, match="the records of data.path, or their order"):
        loader(data).set_state(state)


def test_holdout_sides_share_no_image(data):
    sides = [loader(data, holdout=0.3, holdout_side=side) for side in ("train", "held")]
    ids = [set(epoch_ids(s)) for s in sides]
    assert ids[0] | ids[1] == set(ALL)
    assert not ids[0] & ids[1]


def test_cached_pixels_are_the_same(data):
    plain, cached = loader(data), loader(data, cache_images=True)
    assert take(plain, 25) == take(cached, 25)


def test_each_target_knows_its_data_file(data):
    """In rows that hold examples of both, too."""
    one = json.loads((data / "data.json").read_text())
    for name, records in (("a", one[:20]), ("b", one[20:])):
        (data / f"{name}.json").write_text(json.dumps(records))
    both = {"path": f"{data}/a.json,{data}/b.json"}
    found = loader(data, **both, **FILL)
    assert found.files == ("a", "b")
    counts = [0, 0]
    for _ in range(found.steps_per_epoch):
        batch, _ = next(found)
        assert batch["files"].shape == batch["targets"].shape
        for n in (0, 1):
            counts[n] += ((batch["files"] == n) & (batch["targets"] != -100)).sum()
    # Answers have 1 to 4 trained tokens, over and over.
    assert counts == [sum(1 + i % 4 for i in part) for part in (range(20), range(20, 37))]
    assert loader(data).files == ()
    assert "files" not in next(loader(data))[0]


def test_augmentation_changes_images_only(data):
    (plain, _), (moved, _) = next(loader(data)), next(loader(data, augment="shift4"))
    for name in plain:
        assert np.array_equal(plain[name], moved[name]) == (name != "images")


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"data\.bath_size is not.*did you mean data\.batch_size"):
        DataSettings.read({"bath_size": 3})
    with pytest.raises(ConfigError, match=r"data\.turns 'all' is unknown"):
        DataSettings.read({"turns": "all"})
    with pytest.raises(ConfigError, match="rising order"):
        DataSettings.read({"length_buckets": (64, 32)})
    with pytest.raises(ConfigError, match="not a multiple of the 3 hosts"):
        DataSettings(batch_size=4).completed(None, 3)
    read = DataSettings.read({"length_buckets": [4, 8], "max_length": None})
    assert (read.length_buckets, read.max_length) == ((4, 8), None)
    assert DataSettings(max_length=0).completed(None).max_length is None


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="batch_size 4 cannot be cut into 8 equal parts"):
        DataSettings(batch_size=4).completed(None, 1, 8)
    DataSettings(batch_size=4, pack="exact").completed(None, 1, 8)  # empty rows follow
    with pytest.raises(ConfigError, match="batch_size 12 cannot be cut into 8 equal parts"):
        DataSettings(batch_size=12).completed(None, 2, 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_by_modality": True}, r"data\.group_by_modality makes batches"),
        ({"turns": "independent", "turns_per_sample": 2}, r"data\.turns_per_sample draws"),
        ({"pack_length": 1024}, r"data\.pack_length 1024 is below the 2048 positions"),
    ],
)
def test_what_full_rows_cannot_be_made_of_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        DataSettings(batch_size=4, pack="fill", **changes).completed(2048)


def test_buckets_end_at_the_longest_length():
    filled = DataSettings(max_length=300).completed(2048)
    assert filled.length_buckets == (128, 256, 300)
    assert filled.target_buckets == (8, 16, 32, 64, 128, 256, 512)
    assert DataSettings(max_length=1).completed(None).target_buckets == (8,)


@pytest.mark.parametrize("size", [1, 4])
def test_a_bad_held_out_sample_is_replaced_by_none(data, size):
    """Neither one without its image nor one without a text: a loss counts each held-out sample once."""
    records = json.loads((data / "data.json").read_text())
    held = loader(data, holdout=0.4, holdout_side="held", batch_size=size)
    names = held._data.ids
    pictured = [r for r in records if r["id"] in names and "image" in r]
    unusable, missing = pictured[0], pictured[-1]
    unusable["conversations"][1]["value"] = "unusable"
    (data / missing["image"]).unlink()
    (data / "data.json").write_text(json.dumps(records))
    bad = {unusable["id"], *(r["id"] for r in pictured if r["image"] == missing["image"])}
    again = loader(data, holdout=0.4, holdout_side="held", batch_size=size, bad_limit=1.0)
    shown = [name for _ in range(again.steps_per_epoch) for name in next(again)[1]["ids"]]
    assert sorted(shown) == sorted(set(names) - bad)
    report = again.report()
    assert (report["given"], report["replaced"], report["empty"]) == (len(names), 0, len(bad))
