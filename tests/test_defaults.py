"""What the tests set differently from a user: each such setting has a twin on the default, or a reason.

A convenience of a test hides faults: with `data.image_buckets` set to (1,), no test saw that a batch
without images could not be trained.
"""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

from llava_jax.train.names import known_settings
from tests.nondefault import found, in_tree
from tests.reviewed_settings import ANYWHERE, ROWS

TESTS = Path(__file__).resolve().parent


def covers(row, setting: str, file: str) -> bool:
    return fnmatch(setting, row.setting) and any(fnmatch(file, p) for p in row.files.split())


def fnmatch_all(names, pattern: str) -> set[str]:
    return {name for name in names if fnmatch(name, pattern)}


def test_every_changed_setting_is_reviewed():
    new = [
        f"{file}: {setting}"
        for setting, files in found().items()
        for file in sorted(files)
        if not any(covers(row, setting, file) for row in ROWS)
    ]
    assert new == [], "leave the default, or give a twin or a reason in tests/reviewed_settings.py"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.setting}-{row.files.split()[0]}")
def test_a_row_is_still_needed_and_its_twin_is_there(row):
    settings = fnmatch_all(known_settings(), row.setting)
    assert settings
    changed = {file for setting in settings for file in found().get(setting, ())}
    for pattern in row.files.split():
        assert pattern == ANYWHERE or any(fnmatch(file, pattern) for file in changed), pattern
    if "::" not in row.why:
        assert len(row.why.split()) > 4, "a reason is a sentence"
        return
    file, _, name = row.why.partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    assert tests, f"there is no test {row.why}"
    assert not settings & in_tree(tests[0]), f"{row.why} changes {row.setting} itself"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("run('--config.lr=3', '--config.data.pack=true')", {"lr", "data.pack"}),
        ("run('--config.data.pack=false --config.lr=2e-5')", set()),
        ("x = {'remat': 'none', 'data.image_buckets': '(1,)'}", {"remat", "data.image_buckets"}),
        ("x = {'remat': 'full', 'data.image_buckets': '(0,1,2,4,8,16,32,64)'}", set()),
        ("DataSettings.read({'pack': True, 'threads': 4})", {"data.pack"}),
        ("config_of(made, dtype='float32', steps=0)", {"dtype"}),
        ("config.mesh.tensor, other = 2, 3; config.mesh.fsdp = 2", {"mesh.fsdp", "mesh.tensor"}),
        ("f(lr=unknown); config_of(lr=unknown)", {"lr"}),
    ],
)
def test_what_is_found_in_a_test(text, settings):
    assert in_tree(ast.parse(text)) == settings
