"""Packed data are the JSON and its pictures: read back, resumed after any kill, trained to the same batches."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.config import LlavaConfig
from llava_jax.data.bad import TooManyBad
from llava_jax.data.check import open_data
from llava_jax.data.loader import make_loader
from llava_jax.data.stored import MANIFEST, RECORDS
from llava_jax.errors import LlavaError, SampleError
from llava_jax.store import write
from llava_jax.store.write import pack
from llava_jax.text.tokenizer import Tokenizer

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

MODEL = LlavaConfig.tiny()


def make(folder: Path, count: int) -> Path:
    """A JSON of records with one picture, two, none and a missing one."""
    rng = np.random.RandomState(0)
    (folder / "img").mkdir()
    records = []
    for i in range(count):
        name = f"{i}.{'png' if i % 3 else 'jpg'}"
        if i != 5:
            pixels = rng.randint(0, 256, (20 + i % 7, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "img" / name)
        image = [name, "1.png"] if i % 8 == 2 else name
        tags = "<image>" * (2 if i % 8 == 2 else 1)
        turns = [
            {"from": "human", "value": f"{tags}\nwhat größe?" if i % 4 else "what?"},
            {"from": "gpt", "value": "a " * (1 + i % 9)},
        ]
        records.append(
            {"id": str(i), "conversations": turns, **({"image": image} if i % 4 else {})}
        )
    path = folder / "mix.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("source"), 43)


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "mix"
    pack(str(source), str(source.parent / "img"), str(out), per_shard=10)
    return out


def facts(out: Path) -> list:
    manifest = json.loads((out / MANIFEST).read_text())
    texts = (out / RECORDS).read_bytes()
    return [
        [(row["records"], row["content"]) for row in manifest["shards"]],
        texts,
        manifest["missing"],
    ]


READ = """
import json, sys, tensorflow_datasets as tfds
found = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
rows = [[r["id"].decode(), json.loads(r["record"]), [p.hex() for p in r["images"]]] for r in found]
print(json.dumps([rows, "tensorflow" in sys.modules]))
"""


def test_tfds_reads_it_without_tensorflow(source, packed):
    command = [sys.executable, "-c", READ, str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, tensorflow = json.loads(done.stdout)
    assert not tensorflow
    for (name, record, pictures), want in zip(
        rows, json.loads(source.read_text("utf-8")), strict=True
    ):
        paths = np.atleast_1d(want.get("image", [])).tolist()
        files = [source.parent / "img" / p for p in paths]
        assert (name, record) == (want["id"], want)
        assert pictures == [f.read_bytes().hex() if f.exists() else "" for f in files]


def test_its_records_are_checked_as_those_of_the_json(source, packed):
    ours = open_data({"path": str(packed)})
    theirs = open_data({"path": str(source), "image_folder": str(source.parent / "img")})
    assert ours.content == theirs.content
    assert list(ours.records) == list(theirs.records)
    assert (
        [row["id"] for row in ours.bad.rows()] == [row["id"] for row in theirs.bad.rows()] == ["5"]
    )


def test_a_picture_that_was_not_there_to_pack_is_told_as_such(tmp_path, caplog):
    source, out = make(tmp_path, 40), str(tmp_path / "out")
    pack(str(source), str(tmp_path / "img"), out)
    (row,) = open_data({"path": out}).bad.rows()
    assert row["reason"].startswith("5.png: missing when the data were packed (add the picture and")
    assert "1 sample is left out: missing when the data were packed (5): add the" in caplog.text
    caplog.clear()
    open_data({"path": out, "holdout": 0.9, "holdout_seed": 1})
    assert "held-out samples will be left out: missing when the data were packed: 5 (5.png)" in (
        caplog.text
    )
    for file in set((tmp_path / "img").iterdir()) - {tmp_path / "img" / "1.png"}:
        file.unlink()
    pack(str(source), str(tmp_path / "img"), str(tmp_path / "few"))
    with pytest.raises(TooManyBad) as e:
        open_data({"path": str(tmp_path / "few"), "image_folder": str(tmp_path / "img")})
    assert "missing when the data were packed (29: 2, 3, 5, 6, 7, ...)" in e.value.message
    assert "data pack again" in str(e.value.fix)
    assert "image_folder" not in str(e.value)


def batches(data: dict, steps: list[int], hosts: int, threads: int) -> list[list[bytes]]:
    """The arrays of global batches, joined over hosts."""
    tokenizer = Tokenizer.load(Path(llava_jax.__file__).parent / "assets" / "tiny")
    config = {**data, "batch_size": 8, "seed": 3, "threads": threads, "max_length": 128}
    loaders = [
        make_loader(config, MODEL, tokenizer, process_index=i, process_count=hosts, say=False)
        for i in range(hosts)
    ]
    found = []
    for step in steps:
        parts = [loader.load(step)[0] for loader in loaders]
        found.append([np.concatenate([p[k] for p in parts]).tobytes() for k in sorted(parts[0])])
    for loader in loaders:
        first = next(loader)[0]  # what its threads make is what `load` makes
        assert all((first[k] == loader.load(0)[0][k]).all() for k in first)
        loader.close()
    return found


def compare(source: Path, packed: Path, steps: list[int], hosts: list[int], threads: list[int]):
    folder = {"path": str(source), "image_folder": str(source.parent / "img")}
    expected = batches(folder, steps, 1, 0)
    for count in hosts:
        for workers in threads:
            assert batches({"path": str(packed)}, steps, count, workers) == expected, (
                count,
                workers,
            )


def test_batches_are_those_of_json_and_folder(source, packed):
    compare(source, packed, [0, 4, 7, 31], [1, 4], [0, 2])


@pytest.mark.slow
def test_batches_are_those_of_json_and_folder_on_any_hosts_and_workers(source, packed):
    steps = np.random.RandomState(0).randint(0, 10_000, 200).tolist()
    compare(source, packed, steps, [1, 2, 4, 8], [0, 1, 2])


def test_a_build_killed_at_any_write_goes_on(source, packed, tmp_path, monkeypatch):
    replace, left = Path.replace, [0]

    class Killed(BaseException): ...

    def dying(self, target):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    for kill in (1, 2, 3, 8, 12, 13):
        out, kills = tmp_path / str(kill), 0
        while True:
            left[0] = kill
            try:
                pack(str(source), str(source.parent / "img"), str(out), per_shard=10)
                break
            except Killed:
                kills += 1
                with pytest.raises(SampleError, match="this is a folder"):
                    open_data({"path": str(out)})
                if kill < 4:  # else it would never come further
                    left[0] = 10**9
                    pack(str(source), str(source.parent / "img"), str(out), per_shard=10)
                    break
        assert kills
        assert facts(out) == facts(packed)
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in packed.iterdir())


def test_a_torn_shard_is_made_again(source, packed, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", (str(source), str(source.parent / "img"))
    monkeypatch.setattr(write, "_finish", lambda job, source, rows: {})
    pack(*arguments, str(out), per_shard=10)
    torn = sorted(out.glob("llava-train*"))[2]
    torn.write_bytes(torn.read_bytes()[:-9])
    monkeypatch.undo()
    made = []
    monkeypatch.setattr(
        write, "write_shard", lambda job, n, make=write.write_shard: made.append(n) or make(job, n)
    )
    pack(*arguments, str(out), per_shard=10)
    assert made == [2]
    assert facts(out) == facts(packed)


def test_another_build_is_not_mixed_in(source, packed):
    with pytest.raises(LlavaError, match="which is not of this JSON"):
        pack(str(source), "elsewhere", str(packed), per_shard=10)
    before = (packed / MANIFEST).stat().st_mtime_ns
    pack(str(source), str(source.parent / "img"), str(packed), per_shard=10)
    assert (packed / MANIFEST).stat().st_mtime_ns == before


def test_a_wrong_folder_of_images_is_named_before_anything_is_written(source, tmp_path):
    with pytest.raises(
        LlavaError, match=r"holds none of the first \d+ pictures; looked for .*1\.png"
    ):
        pack(str(source), str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_packed_data_at_an_address_are_refused_up_front(source, packed):
    store = fsspec.filesystem("memory")
    store.pipe("/packed/mix/manifest.json", (packed / MANIFEST).read_bytes())
    with pytest.raises(SampleError, match="packed data are read from a disk.*mount the bucket"):
        open_data({"path": "memory://packed/mix"})
    with pytest.raises(LlavaError, match="ArrayRecord writes no address"):
        pack(str(source), str(source.parent / "img"), "memory://packed/new")


@pytest.mark.slow
def test_two_processes_make_the_same(source, packed, tmp_path):
    out = str(tmp_path / "out")
    pack(str(source), str(source.parent / "img"), out, per_shard=10, workers=2)
    assert facts(Path(out)) == facts(packed)


@pytest.mark.slow
def test_200_random_kills_lose_nothing(tmp_path):
    source = make(tmp_path, 400)
    images = str(source.parent / "img")
    pack(str(source), images, str(tmp_path / "whole"), per_shard=2)
    command = [sys.executable, "-m", "llava_jax", "data", "pack", str(source), "--images", images]
    command += ["--out", str(tmp_path / "out"), "--per-shard", "2"]
    rng, kills = np.random.RandomState(0), 0
    while kills < 200:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begun = len(list((tmp_path / "out").glob("shard-*"))) if (tmp_path / "out").exists() else 0
        while process.poll() is None:  # some way into the work, wherever that is
            there = len(list((tmp_path / "out").glob("shard-*")))
            if there > begun or rng.rand() < 0.01:
                time.sleep(rng.rand() * 0.01)
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        if (tmp_path / "out" / MANIFEST).exists():  # done: begin anew
            assert facts(tmp_path / "out") == facts(tmp_path / "whole")
            (tmp_path / "out").rename(tmp_path / f"done-{kills}")
    subprocess.run(command, check=True)
    assert facts(tmp_path / "out") == facts(tmp_path / "whole")


BEAM = os.environ.get("LLAVA_JAX_BEAM_PYTHON", "")


@pytest.mark.slow
@pytest.mark.skipif(not BEAM, reason="LLAVA_JAX_BEAM_PYTHON names no Python with the extra beam")
def test_beam_with_two_processes_makes_the_same(source, packed, tmp_path):
    command = [BEAM, "-m", "llava_jax", "data", "pack", str(source)]
    command += ["--images", str(source.parent / "img"), "--out", str(tmp_path / "out")]
    command += ["--per-shard", "10", "--beam", "runner=DirectRunner", "direct_num_workers=2"]
    command += ["direct_running_mode=multi_processing"]
    home = str(Path(llava_jax.__file__).parents[1])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": home})
    assert facts(tmp_path / "out") == facts(packed)
