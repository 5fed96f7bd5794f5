"""Every config file loads, is locked, and holds the original recipe's numbers."""

import ast
import contextlib
import re
from pathlib import Path

import pytest

import llava_jax.configs
from llava_jax import cli
from llava_jax.configs import common
from llava_jax.configs.variants import VARIANTS
from llava_jax.data.settings import DataFile, DataSettings, data_files
from llava_jax.settings import TRAINING, flat
from llava_jax.train.checks import check_settings
from llava_jax.train.config import load_config
from llava_jax.train.select import GROUPS
from llava_jax.train.stages import split_stages

NAMES = sorted(
    p.stem
    for p in Path(str(llava_jax.configs.__file__)).parent.glob("*.py")
    if p.stem not in ("__init__", "common", "variants")
)


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_loads_and_every_stage_is_valid(name):
    config = load_config(name, [])
    assert config.is_locked
    assert config.name == name
    for _, stage in split_stages(config):
        assert set(stage.trainable) <= set(GROUPS)
        DataSettings.read({**stage.data, "batch_size": stage.batch_size})
        assert stage.optimizer in ("adamw", "muon")


@pytest.mark.parametrize(
    ("name", "batch", "lr", "trainable", "version"),
    [
        ("pretrain_7b", 256, 1e-3, ("projector",), "plain"),
        ("pretrain_13b", 256, 1e-3, ("projector",), "plain"),
        ("finetune_7b", 128, 2e-5, ("projector", "language"), "v1"),
        ("finetune_13b", 128, 2e-5, ("projector", "language"), "v1"),
        ("finetune_lora_7b", 128, 2e-4, ("projector", "lora"), "v1"),
        ("finetune_task_7b", 128, 2e-5, ("projector", "language"), "v1"),
        ("finetune_task_lora_7b", 128, 2e-4, ("projector", "lora"), "v1"),
    ],
)
def test_the_paper_s_recipes(name, batch, lr, trainable, version):
    c = load_config(name, [])
    assert (c.batch_size, c.lr, c.trainable, c.data.version) == (batch, lr, trainable, version)
    assert (c.warmup_ratio, c.weight_decay, c.clip_norm, c.epochs) == (0.03, 0.0, 0.0, 1.0)
    assert c.data.max_length == 2048


def test_defaults_of_the_data_are_those_of_its_reader():
    ours = common.get_config().data
    assert all(getattr(DataSettings(), name) == value for name, value in ours.items())


def test_the_config_holds_the_whole_table_and_nothing_else():
    assert dict(flat(common.get_config())) == {n: row.default for n, row in TRAINING.items()}


@pytest.mark.parametrize(
    ("override", "paths"),
    [
        ("('a.json','b.json')", ("a.json", "b.json")),
        ("['a.json', 'b.json']", ("a.json", "b.json")),
        ("a.json,b.json", ("a.json", "b.json")),
        ("some folder/a.json, b.json", ("some folder/a.json", "b.json")),
        ("a.json", ("a.json",)),
        ("2024", ("2024",)),
    ],
)
def test_several_data_files_are_settable(tmp_path, override, paths, capsys):
    data = load_config("finetune_7b", [f"--config.data.path={override}"]).data
    assert [f.path for f in data_files(DataSettings.read(data))] == list(paths)
    own = tmp_path / "own.py"
    own.write_text(
        "from llava_jax.configs import finetune_7b\n"
        "def get_config():\n"
        "    c = finetune_7b.get_config()\n"
        f"    c.data.path = {paths!r}\n"
        f"    c.data.image_folder = {list(paths)!r}\n"
        f"    c.data.weights = {[0.5] * len(paths)!r}\n"
        "    return c\n"
    )
    data = load_config(str(own), []).data
    assert data_files(DataSettings.read(data)) == [DataFile(p, p, 0.5) for p in paths]
    weights = ",".join(["2"] * len(paths))
    data = load_config(str(own), [f"--config.data.weights={weights}"]).data
    assert [f.weight for f in data_files(data)] == [2] * len(paths)
    assert cli.main(["train", "--config", str(own), "--show"]) == 0
    assert f"data.path = {paths!r}" in capsys.readouterr().out


def test_a_stage_may_have_several_files_where_the_config_has_one(tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "from llava_jax.configs import common\n"
        "def get_config():\n"
        "    c = common.get_config()\n"
        "    c.name, c.data.path = 'own', 'a.json'\n"
        "    c.stages.one = {'data': {'path': ('b.json', 'c.json')}}\n"
        "    c.stages.two = {'data': {'image_folder': 'x'}}\n"
        "    return c\n"
    )
    (_, one), (_, two) = split_stages(load_config(str(own), []))
    assert (one.data.path, two.data.path) == (("b.json", "c.json"), "a.json")
    assert (one.data.image_folder, two.data.image_folder) == ("", "x")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_only_what_differs_from_the_one_it_starts_from(name):
    tree = ast.parse((Path(str(llava_jax.configs.__file__)).parent / f"{name}.py").read_text())
    (function,) = (n for n in tree.body if getattr(n, "name", "") == "get_config")
    start, *changes = (n for n in function.body if isinstance(n, ast.Assign))
    assert isinstance(start.value, ast.Call)
    before = dict(flat(load_config(ast.unparse(start.value.func).split(".")[0], [])))
    for change in changes:
        setting = ast.unparse(change.targets[0]).removeprefix("c.")
        with contextlib.suppress(ValueError):  # not a literal
            assert before.get(setting) != ast.literal_eval(change.value), setting


def test_overrides_reach_nested_and_optional_fields():
    c = load_config("finetune_7b", ["--config.projector_lr=1e-4", "--config.mesh.tensor=2"])
    assert (c.projector_lr, c.mesh.tensor) == (1e-4, 2)


def documented_line(name):
    """The words after llava-jax of the first command in a config's docstring that trains it."""
    path = Path(str(llava_jax.configs.__file__)).parent / f"{name}.py"
    words = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = re.findall(r"^ *llava-jax (train .*)$", words.replace("\\\n", " "), re.M)
    return lines[0].split()


@pytest.mark.parametrize("name", NAMES)
def test_the_documented_line_is_understood_from_any_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = documented_line(name)
    assert cli.main([*words, "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = dict(line.partition("  # ")[0].rstrip().split(" = ", 1) for line in lines)
    assert shown["name"] == repr(name)
    for word in words:
        if word.startswith("--config."):
            setting, _, value = word.removeprefix("--config.").partition("=")
            assert shown[setting].strip("'").lower() == value
    assert cli.main(["train", "--config", name, "--show"]) == 0


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_every_setting_passes_the_checks_before_a_model(name, tmp_path):
    for file in ("mine", "captions", "instruct"):
        (tmp_path / f"{file}.json").touch()
    words = [f"--config.data.path={tmp_path}/mine.json", f"--config.data.image_folder={tmp_path}"]
    if "data_folder" in load_config(name, []):
        words = [f"--config.data_folder={tmp_path}"]
    for _, stage in split_stages(load_config(name, words)):
        check_settings(stage)


def test_show_sorts_by_group(capsys):
    assert cli.main(["train", "--config", "quickstart", "--show"]) == 0
    names = [line.partition(" = ")[0] for line in capsys.readouterr().out.splitlines()]
    groups = [name.rpartition(".")[0] for name in names]
    assert groups[0] == ""
    assert len(names) == len(set(names))
    assert [g for i, g in enumerate(groups) if g not in groups[:i]] == sorted(set(groups))
