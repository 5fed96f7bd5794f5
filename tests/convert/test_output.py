"""A conversion that is killed, fails or runs out of room leaves nothing half behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_jax.cli import main
from llava_jax.convert import Target, convert, load_checkpoint
from llava_jax.convert.io import output
from llava_jax.errors import WeightError
from tests.convert import tiny

SLOWLY = """
import sys, time
from llava_jax.convert import convert
from llava_jax.convert import Target
source, dst, to = sys.argv[1:]
print("ready", flush=True)
convert(source, dst, Target(to, overwrite=True), progress=lambda n: time.sleep(0.002))
print("done", flush=True)
"""


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.slow)])
def test_kills(kills, tmp_path):
    source = tiny.save(tmp_path / "a", "jax")
    convert(source, tmp_path / "whole", Target("hf"))
    whole = tiny.files(tmp_path / "whole")
    rng, finished, killed = random.Random(0), 0, 0
    for i in range(kills):
        dst = tmp_path / "b"
        command = [sys.executable, "-c", SLOWLY, str(source), str(dst), "hf"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.45))
        child.send_signal(signal.SIGKILL)
        done = "done" in child.communicate()[0]
        finished, killed = finished + done, killed + (not done)
        if dst.exists():
            assert tiny.files(dst) == whole
        if i % 3 == 2 and dst.exists():
            for name in ("old", "new"):
                convert(source, tmp_path / name, Target("hf", overwrite=True))
    assert killed >= kills // 4
    convert(source, tmp_path / "b", Target("hf", overwrite=True))
    assert tiny.files(tmp_path / "b") == whole
    assert not list(tmp_path.glob(".b.*"))


@pytest.mark.parametrize("there", ["pictures/a.jpg", "pictures/config.json", "a.jpg"])
def test_the_command_replaces_only_checkpoints(tmp_path, capsys, there):
    """--overwrite with the name of a folder of pictures, of a training run, or of a file."""
    source = tiny.save(tmp_path / "a", "jax")
    file = tmp_path / there
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    dst = tmp_path / there.partition("/")[0]
    assert main(["convert", str(source), str(dst), "--to", "hf", "--overwrite"]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", dst.name]


@pytest.mark.parametrize("to", ["jax", "hf", "original", "projector"])
def test_every_export_can_be_replaced(tmp_path, to):
    source = str(tiny.save(tmp_path / "a", "jax", tiny.ORIGINAL))
    for _ in range(2):
        assert main(["convert", source, str(tmp_path / "b"), "--to", to, "--overwrite"]) == 0


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    source = tiny.save(tmp_path / "a", "jax")

    def full(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        convert(source, tmp_path / "b", Target("hf"), progress=full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)])
    if made.returncode:
        pytest.skip("cannot mount")
    try:
        with pytest.raises(OSError, match="No space"):
            convert(tiny.save(tmp_path / "a", "jax"), disk / "b", Target("hf"))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    source = tiny.save(tmp_path / "a", "jax")
    (tiny.save(tmp_path / "b", "hf") / "mine.txt").write_text("keep")
    with pytest.raises(WeightError, match="overwrite"):
        convert(source, tmp_path / "b", Target("hf"))
    assert (tmp_path / "b/mine.txt").read_text() == "keep"
    convert(source, tmp_path / "b", Target("hf", overwrite=True))
    assert not (tmp_path / "b/mine.txt").exists()
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", Target("hf"))


def test_a_mount_point_is_refused_before_the_work():
    """It cannot be renamed, empty or not: a volume of a container."""
    for overwrite in (False, True):
        with pytest.raises(WeightError, match="mount point.*inside it"):
            output.check_free(Path("/"), overwrite)


def test_overwriting_replaces_checkpoints_only(tmp_path):
    """Not only by the command line: `save(..., overwrite=True)` over somebody's folder or file."""
    source = tiny.save(tmp_path / "a", "jax")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis").write_text("keep")
    (tmp_path / "c").write_text("keep")
    for name in ("b", "c", "b/thesis"):
        with pytest.raises(WeightError, match="is not overwritten"):
            convert(source, tmp_path / name, Target("hf", overwrite=True))
    assert (tmp_path / "b/thesis").read_text() == (tmp_path / "c").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_link_is_written_through(tmp_path):
    """What it points to is filled, made or replaced, and the link stays."""
    source = tiny.save(tmp_path / "a", "jax")
    (tmp_path / "big").mkdir()
    for target in ("disk", "none"):
        (tmp_path / "big/disk").mkdir(exist_ok=True)
        link = tmp_path / f"to_{target}"
        link.symlink_to(tmp_path / "big" / target)
        for overwrite in (False, True):
            convert(source, link, Target("hf", overwrite=overwrite))
            assert link.is_symlink()
            assert (tmp_path / "big" / target / "config.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "big", "to_disk", "to_none"]
    assert sorted(p.name for p in (tmp_path / "big").iterdir()) == ["disk", "none"]


def test_an_input_is_not_replaced(tmp_path):
    """The source itself, or a checkpoint that the source lies in."""
    outer = tiny.save(tmp_path / "a", "jax")
    inner = tiny.save(outer / "b", "jax")
    (tmp_path / "link").symlink_to(inner)
    before = tiny.files(tmp_path)
    for dst in (inner, outer, tmp_path / "link"):
        with pytest.raises(WeightError, match="input"):
            convert(inner, dst, Target("hf", overwrite=True))
    config = str(inner / "llava_jax.json")
    assert main(["compare", str(inner), str(outer), "--logits", "no", "--json", config]) == 2
    words = ["convert", str(inner), str(tmp_path / "c"), "--to", "hf", "--check"]
    assert main([*words, "--report", config]) == 2
    assert tiny.files(tmp_path) == before


@pytest.mark.parametrize("name", ["b", "a**b", "~nobody-of-that-name"])
def test_what_killed_runs_left_is_removed(tmp_path, monkeypatch, name):
    """Unless another run is at it, whatever the process ids."""
    monkeypatch.chdir(tmp_path)
    source = tiny.save(tmp_path / "a", "jax")
    left = [f".{name}.tmp-{os.getpid()}", f".{name}.tmp-0a", f".{name}.tmp-photos"]
    for folder in left:
        (tmp_path / folder).mkdir()
    with output.folder(Path(name), overwrite=True) as work:
        (work / "model.safetensors").touch()
        convert(source, Path(name), Target("hf"))  # by another run
        assert (work / "model.safetensors").exists()
    assert sorted(os.listdir()) == sorted(["a", name, left[-1]])
    assert sorted(os.listdir(name)) == ["SHA256SUMS", "model.safetensors"]


def test_an_overwrite_killed_between_its_renames_is_undone(tmp_path):
    source = tiny.save(tmp_path / "a", "jax")
    whole = tiny.files(tiny.save(tmp_path / ".b.old-0a", "hf"))
    with pytest.raises(WeightError, match="already exists"):
        convert(source, tmp_path / "b", Target("hf"))
    assert tiny.files(tmp_path / "b") == whole


def test_a_short_write_says_disk(tmp_path):
    """numpy's tofile raises an OSError without a number."""
    found = pytest.raises(WeightError, match="9 requested and 4 written.*disk")
    with found, output.folder(tmp_path / "b"):
        raise OSError("9 requested and 4 written")
    assert not os.listdir(tmp_path)


def test_shards(tmp_path):
    folder = tiny.save(tmp_path / "a", "hf", shard_size=30_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert all((folder / f).stat().st_size < 60_000 for f in files)
    tiny.same_tensors(folder, tiny.save(tmp_path / "b", "hf"))
    assert load_checkpoint(folder).config == load_checkpoint(tmp_path / "b").config


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 << 30), ("77", 77), (3, 3)],
)
def test_sizes(text, size):
    assert output.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5XB", "9" * 400, "²GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(WeightError):
        output.parse_size(text)
