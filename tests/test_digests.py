"""SHA256SUMS of a folder: written once, and every change is found."""

import pytest

from llava_jax.digests import SUMS, damages, sha256, size_of, write_sums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.bin").write_bytes(b"abc" * 1000)
    (tmp_path / "in" / "b c.txt").write_text("b")
    (tmp_path / ".hidden").write_text("of the file system")
    write_sums(tmp_path)
    return tmp_path


def test_what_is_as_written_has_no_damage(folder):
    assert damages(folder) == []
    assert size_of(folder) == 3001
    lines = (folder / SUMS).read_text().splitlines()
    assert lines == [f"{sha256(folder / n)}  {n}" for n in ("a.bin", "in/b c.txt")]


def test_a_known_digest_is_not_computed_again(folder):
    write_sums(folder, {"a.bin": "0" * 64})
    assert damages(folder) == ["a.bin is damaged"]


def test_every_bit_of_the_sums_counts(folder):
    good = (folder / SUMS).read_bytes()
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        (folder / SUMS).write_bytes(bad)
        assert damages(folder), at
        (folder / SUMS).write_bytes(good[:at])
        assert damages(folder), at


def test_processes_share_the_reading(folder):
    (folder / "a.bin").write_bytes(b"x")
    (folder / "new").write_text("x")
    (folder / "in" / "b c.txt").unlink()
    parts = [damages(folder, part, 2) for part in (0, 1)]
    assert parts[0] == ["in/b c.txt is missing", "new is not in SHA256SUMS", "a.bin is damaged"]
    assert parts[1] == parts[0][:2]
