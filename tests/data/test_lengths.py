"""Lengths of samples: counted right, in several processes, kept, and counted anew when they must be."""

import dataclasses
import json
import os
from typing import Any

import numpy as np
import pytest

from llava_jax.config import LlavaConfig
from llava_jax.data import lengths
from llava_jax.data.check import open_data
from llava_jax.data.plan import example_maker
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.errors import LlavaError
from llava_jax.text.tokenizer import Tokenizer
from tests.conftest import shared

MODEL = LlavaConfig.tiny()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(shared("golden/model/fullvocab/llava"))


@pytest.fixture
def count(tmp_path, tokenizer, monkeypatch):
    """count(**settings): the lengths of 60 records, kept as those of many records are."""
    monkeypatch.setattr(lengths, "MANY", 10)
    monkeypatch.setattr(lengths, "CHUNK", 25)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = [
        {
            "id": f"{n}",
            "conversations": [
                {"from": "human", "value": "what is " * (1 + 3 * (n % 7))},
                {"from": "gpt", "value": "it is red " * (n % 4 + 1)},
                {"from": "human", "value": "and " * (n % 3 + 1)},
                {"from": "gpt", "value": "yes " * (n % 5 + 1)},
            ],
        }
        for n in range(60)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))

    def get(**changes):
        values = {"path": str(tmp_path / "data.json"), "bad_limit": 1.0, **changes}
        settings = DataSettings.read(values).completed(MODEL.max_length)
        data = open_data(settings)
        make = example_maker(settings, MODEL, tokenizer)
        found = lengths.sample_lengths(data, make, settings, MODEL.image_tokens)
        return found, make, data

    return get


def test_they_are_those_of_the_samples_and_kept(count, tmp_path, monkeypatch):
    found, make, data = count(max_length=60)
    for n, record in enumerate(data.records):
        example = make(record, "x").truncated(60, MODEL.image_tokens)
        if not example.target_count:  # cut away
            assert (found.length[n], found.targets[n], found.cut[n]) == (0, 0, 0)
            continue
        assert found.cut[n] == ("truncated" in example.notes)
        assert found.length[n] == example.length(MODEL.image_tokens)
        assert found.targets[n] == example.target_count
    monkeypatch.setattr(lengths, "_count", None)  # nothing is counted a second time
    again, *_ = count(max_length=60)
    np.testing.assert_array_equal(again.length, found.length)
    assert not list(tmp_path.glob("*.lock"))


def test_another_limit_or_other_data_count_anew_and_a_damaged_file_is_named(
    count, tmp_path, caplog
):
    first, *_ = count(max_length=60)
    other, *_ = count(max_length=80)
    assert first.length.max() == 60 < other.length.max()
    count(version="v0")
    files = list(tmp_path.glob("data.json.lengths-*.npz"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(file.read_bytes()[:-40])
    again, *_ = count(max_length=60)
    np.testing.assert_array_equal(again.length, first.length)
    assert "is damaged: lengths are counted again" in caplog.text


def test_drawn_turns_count_with_the_longest(count):
    whole, *_ = count(turns="independent")
    drawn, *_ = count(turns="independent", turns_per_sample=1)
    good = whole.length > 0
    assert (drawn.length[good] <= whole.length[good]).all()
    assert (drawn.targets[good] < whole.targets[good]).any()
    # Only what is drawn can be cut, not the whole record.
    limit = int(drawn.length.max())
    assert limit < whole.length.max()
    short, *_ = count(turns="independent", turns_per_sample=1, max_length=limit)
    assert not short.cut.any()
    np.testing.assert_array_equal(short.length[good], drawn.length[good])


def test_a_folder_that_cannot_be_written_to_leaves_the_users_cache(count, tmp_path, monkeypatch):
    seen = []
    counted = lengths._count
    monkeypatch.setattr(lengths, "_count", lambda *given: seen.append(0) or counted(*given))
    real = lengths.Path.open

    def refuse(self, mode="r", *rest, **more):
        if self.parent == tmp_path and "a" in mode:
            raise PermissionError(13, "no")
        return real(self, mode, *rest, **more)

    monkeypatch.setattr(lengths.Path, "open", refuse)
    count()
    count()
    assert len(seen) == 1
    assert list((tmp_path / "cache" / "llava_jax" / "lengths").glob("*.npz"))


class Records(list):
    """As much of a Dataset as counting needs."""

    def __init__(self, records):
        super().__init__(records)
        self.records, self.ids = records, [r["id"] for r in records]


class Dying:
    """What ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_counting_process_that_ends_is_an_error_and_no_wait(monkeypatch):
    monkeypatch.setattr(lengths, "CHUNK", 5)
    records = [{"id": str(n)} for n in range(60)]
    data: Any = Records(records)
    rule = lengths.Rule(60, 0, False, 16)
    dying: Any = Dying()
    with pytest.raises(
        LlavaError, match="samples .* were not counted: its process ended with exit code 9"
    ):
        lengths._count(data, dying, rule)


def test_lengths_of_data_at_an_address_are_kept_in_the_users_cache(count, tmp_path, monkeypatch):
    """Not in a folder that is called after the address."""
    _, make, data = count(max_length=60)
    away = dataclasses.replace(data, files=[DataFile("memory://bucket/far.json", "", 1.0)])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = DataSettings(max_length=60).completed(MODEL.max_length)
    lengths.sample_lengths(away, make, settings, MODEL.image_tokens)
    assert not list((tmp_path / "here").iterdir())
    (_kept,) = (tmp_path / "cache" / "llava_jax" / "lengths").glob("far.json.lengths-*.npz")
    monkeypatch.setattr(lengths, "_count", None)
    lengths.sample_lengths(away, make, settings, MODEL.image_tokens)
