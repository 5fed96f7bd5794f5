"""A packed folder is what its manifest says, or it is refused by name, and mended by the same command."""

import json
import os
import shutil
from pathlib import Path

import pytest

from llava_jax.data.check import open_data
from llava_jax.data.json_file import JsonFile
from llava_jax.data.stored import BEGUN, MANIFEST, RECORDS, Packed, records_path
from llava_jax.errors import LlavaError, SampleError
from llava_jax.store import write
from llava_jax.store.folder import Job, hold
from llava_jax.store.write import pack
from tests.store.test_write import facts, make

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with mix.json, img/ and what they are packed to, in three shards."""
    folder = tmp_path_factory.mktemp("damage")
    again(make(folder, 12).parent)
    return folder


@pytest.fixture
def home(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, whose pictures have their times."""
    shutil.copytree(whole, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the shards that are written from now on."""
    numbers: list[int] = []
    real = write.write_shard
    monkeypatch.setattr(
        write, "write_shard", lambda job, number: numbers.append(number) or real(job, number)
    )
    return numbers


def again(home: Path) -> dict:
    os.chdir(home)  # the folder's name is part of what is packed
    return pack("mix.json", "img", "out", per_shard=4)


def shards(home: Path) -> list[Path]:
    return sorted((home / "out").glob("llava-train*"))


def swap(a: Path, b: Path) -> None:
    a.rename(a.with_name("x"))
    b.rename(a)
    a.with_name("x").rename(b)


def lines(home: Path, change) -> None:
    path = home / "out" / RECORDS
    found = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(found)))


DAMAGE = {
    "a line is gone": (lambda h: lines(h, lambda r: r[1:]), RECORDS, []),
    "its end is gone": (lambda h: lines(h, lambda r: r[:-3]), RECORDS, []),
    "two lines swapped": (lambda h: lines(h, lambda r: [r[1], r[0], *r[2:]]), RECORDS, []),
    "a line more": (lambda h: lines(h, lambda r: [*r, r[0]]), RECORDS, []),
    "no records": (lambda h: (h / "out" / RECORDS).unlink(), RECORDS, []),
    "no dataset_info": (lambda h: (h / "out/dataset_info.json").unlink(), "dataset_info", []),
    "bad features": (lambda h: (h / "out/features.json").write_text("{}"), "features", []),
    "a shard is gone": (lambda h: shards(h)[1].unlink(), "00001-of-00003", [1]),
    "an empty shard": (lambda h: shards(h)[1].write_bytes(b""), "00001-of-00003", [1]),
    "a longer shard": (lambda h: shards(h)[2].open("ab").write(b"x"), "00002-of-00003", [2]),
    "two shards swapped": (lambda h: swap(*shards(h)[:2]), "00000-of-00003", [0, 1]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name_and_mended(home, whole, made, name):
    damage, named, remade = DAMAGE[name]
    damage(home)
    with pytest.raises(SampleError, match=f"{named}.*data pack again"):
        open_data({"path": "out"})
    again(home)
    assert made == remade
    assert facts(home / "out") == facts(whole / "out")
    assert open_data({"path": "out"}).total == 12
    assert not (home / "out" / BEGUN).exists()


def test_a_shard_of_the_right_size_is_compared_when_it_is_read(home, made):
    manifest = json.loads((home / "out" / MANIFEST).read_text())
    for row in manifest["shards"]:
        del row["end"]
    (home / "out" / MANIFEST).write_text(json.dumps(manifest))
    first, second = shards(home)[:2]
    assert first.stat().st_size == second.stat().st_size  # ArrayRecord fills blocks
    swap(first, second)
    records_path("out")  # nothing shows
    with pytest.raises(SampleError, match="00000-of-00003: is not the shard that was packed"):
        Packed("out").picture(1, 0)
    swap(first, second)
    data = bytearray(first.read_bytes())
    data[100:400] = bytes(300)
    first.write_bytes(data)
    with pytest.raises(SampleError, match="00000-of-00003: cannot be read"):
        Packed("out").picture(1, 0)
    again(home)
    assert made == [0]


def test_pictures_that_came_or_changed_are_packed_and_gone_ones_stay(home, made):
    assert again(home)["missing"] == [5]
    assert made == []
    shutil.copy("img/4.png" if Path("img/4.png").exists() else "img/1.png", "img/5.png")
    assert again(home)["missing"] == []
    assert made == [1]
    Path("img/9.jpg").write_bytes(Path("img/3.jpg").read_bytes())
    again(home)
    assert made == [1, 2]
    assert Packed("out").picture(9, 0) == Path("img/3.jpg").read_bytes()
    Path("img/9.jpg").unlink()
    assert again(home)["missing"] == []
    assert made == [1, 2]


def test_pictures_pass_the_gate(home):
    Path("img/6.jpg").unlink()
    os.mkfifo("img/6.jpg")
    Path("img/7.png").unlink()
    Path("img/7.png").symlink_to("/dev/zero")
    with Path("img/9.jpg").open("wb") as file:
        file.truncate(2**25 + 1)
    made = again(home)
    assert made["missing"] == [5, 6, 7, 9]
    assert sorted(made["refused"]) == ["6.jpg", "7.png", "9.jpg"]
    os.mkfifo("data.json")
    with pytest.raises(SampleError, match="this is a pipe or a device"):
        JsonFile("data.json")


def test_nothing_of_others_is_written_over(home):
    for name in (RECORDS, "dataset_info.json", ".mine.tmp", "notes.txt", MANIFEST):
        folder = home / "theirs"
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(LlavaError, match=f"theirs holds {name}, which"):
            pack("mix.json", "img", "theirs")
        assert [p.name for p in folder.iterdir()] == [name]
        shutil.rmtree(folder)
    for name in ("mix.lengths-0123.npz", ".mine.tmp"):  # of a run, of somebody
        (home / "out" / name).write_bytes(b"")
    shards(home)[0].unlink()
    again(home)
    assert (home / "out/mix.lengths-0123.npz").exists()
    assert (home / "out/.mine.tmp").exists()


def test_a_json_that_changes_meanwhile_is_told(home, monkeypatch):
    text, real = Path("mix.json").read_text("utf-8"), write.picture

    def editing(folder, path):
        Path("mix.json").write_text(text.replace('"what?"', '"whit?"'), "utf-8")
        return real(folder, path)

    monkeypatch.setattr(write, "picture", editing)
    monkeypatch.setattr(write, "_refuse_wrong_images", lambda *_: None)
    with pytest.raises(SampleError, match=r"mix\.json: the file changed while it was packed"):
        pack("mix.json", "img", "new", per_shard=4)
    assert not list(Path("new").glob("shard-*"))
    assert not list(Path("new").glob(".*"))


def test_one_call_at_a_time(home):
    with (
        hold(Job.of("mix.json", "img", "new", 4, 12, "00")),
        pytest.raises(LlavaError, match="another call packs into new"),
    ):
        pack("mix.json", "img", "new", per_shard=4)
    pack("mix.json", "img/", "new", per_shard=4)
    assert pack("mix.json", "img", "new", per_shard=4)["records"] == 12  # img/ is img


def test_what_is_no_record_is_bad_in_both_forms(home):
    good = json.loads(Path("mix.json").read_text("utf-8"))[1]
    texts = {
        "odd.json": json.dumps([5, None, [], {}, good]).encode(),
        "wide.json": json.dumps([good, {**good, "id": "b"}])
        .replace('"id": "b"', '"image": "1.png", "image": "1.png"')
        .encode("utf-16"),
    }
    for name, text in texts.items():
        Path(name).write_bytes(text)
        pack(name, "img", f"{name}.packed")
        found = [
            open_data({"path": path, "image_folder": folder, "bad_limit": 1.0})
            for path, folder in ((name, "img"), (f"{name}.packed", ""))
        ]
        assert len(found[0]) == len(found[1]) == 1
        reasons = [[r["reason"].replace(".packed", "") for r in d.bad.rows()] for d in found]
        assert reasons[0] == reasons[1]
