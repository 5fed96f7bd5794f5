"""The tables of settings: their rows are sound, and everything that is made from them agrees."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import cli
from llava_jax.errors import ConfigError
from llava_jax.settings import SAMPLING, TRAINING, add_options, check, check_all, page, parse
from llava_jax.train.select import GROUPS

ROOT = Path(__file__).resolve().parents[1]
TABLES = {**TRAINING, **SAMPLING}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_is_sound(name):
    row = TABLES[name]
    check(row, row.default)
    assert 4 < len(row.meaning) < 110
    assert "\n" not in row.meaning
    need, _, value = row.needs.partition("=")
    if need:
        assert need in TRAINING
        assert not value or value in TRAINING[need].choices


@pytest.mark.parametrize("name", TABLES)
def test_a_default_survives_the_command_line(name):
    row = TABLES[name]
    text = str(row.default)
    if row.default is None and str in getattr(row.type, "__args__", ()):
        return  # a string of the command line is never None
    assert parse(row, "()" if row.default == () else text) == row.default


def test_the_page_is_what_the_documented_command_prints():
    committed = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    command = re.search(r"`python -m (\S+) > docs/settings.md`", committed)
    assert command
    done = subprocess.run(
        [sys.executable, "-m", command[1]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == committed == page() + "\n"
    assert all(f"`{name}`" in committed for name in TABLES)


def test_parts_that_learn_are_those_that_training_knows():
    assert set(TRAINING["trainable"].choices) == set(GROUPS)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("temperature", -1, "temperature is -1, but must be from 0 to 100"),
        ("temperature", True, "temperature is True, not a number"),
        ("temperature", "0.5", "temperature is '0.5', not a number (without quotes: 0.5)"),
        ("top_p", 0, "top_p is 0, but must be above 0 and at most 1"),
        ("top_p", float("nan"), "top_p is nan, not a number"),
        ("top_k", 2.5, "top_k is 2.5, not a whole number"),
        ("seed", 2**63, "but must be at least"),
        ("max_new_tokens", 0, "max_new_tokens is 0, but must be at least 1"),
        ("stop", ("a", 1), "stop is ('a', 1), not a string or a tuple of strings"),
        ("system", 3, "system is 3, not a string"),
        ("data.length_buckets", (), "data.length_buckets is empty"),
        ("data.length_buckets", (4, 4), "data.length_buckets (4, 4) must be in rising order"),
        ("data.weights", (1.0, -1.0), "data.weights is (1.0, -1.0), but must be from 0 to 1,000"),
        (
            "remat",
            "ful",
            "remat 'ful' is unknown (one of 'none', 'dots', 'minimal', 'full', 'offload')",
        ),
        (
            "attention",
            "none",
            "attention 'none' is unknown (one of '', 'plain', 'chunked', 'splash', 'triton', 'cudnn')",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(name, value, says):
    with pytest.raises(ConfigError) as info:
        check(TABLES[name], value)
    assert says in str(info.value)


def test_settings_of_an_answer_are_checked_together():
    check_all(SAMPLING, {"temperature": 0.7, "seed": None, "stop": "."})
    with pytest.raises(
        ConfigError, match=r"no setting 'temprature' \(did you mean temperature\?\)"
    ):
        check_all(SAMPLING, {"temprature": 0.7})
    with pytest.raises(ConfigError, match="top_k is -1"):
        check_all(SAMPLING, {"top_k": -1})


def test_options_are_made_of_rows(capsys):
    parser = cli.Parser(prog="x")
    add_options(parser, SAMPLING, ["temperature", "max_new_tokens", "seed", "system"])
    assert parser.parse_args([]) == argparse.Namespace()
    found = parser.parse_args(["--max-new-tokens", "3", "--temperature=0.5", "--seed", "1"])
    assert vars(found) == {"max_new_tokens": 3, "temperature": 0.5, "seed": 1}
    text = " ".join(parser.format_help().split())
    assert "--max-new-tokens N longest answer in tokens" in text
    assert "(default: 512)" in text
    assert "None: a new one" in text
