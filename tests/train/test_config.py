"""Config files of one's own and the command line: each mistake is one line with file and line."""

import pytest

from llava_jax import cli
from llava_jax.errors import ConfigError
from llava_jax.settings import flat
from llava_jax.train.config import load_config
from llava_jax.train.names import FOREIGN, HINTS, known_settings
from llava_jax.train.stages import split_stages

OWN = """from llava_jax.configs import finetune_7b


def get_config():
    c = finetune_7b.get_config()
    c.data.path = "mine.json"
    {}
    return c
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a config file whose seventh line is `line`; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(line, text=OWN):
        (tmp_path / "own.py").write_text(text.replace("{}", line))
        return "own.py"

    return write


def test_a_file_of_one_s_own_changes_what_it_names(own):
    config = load_config(own("c.lr = 3e-5; c.projector_lr = 1; c.trainable = ['projector']"), [])
    assert (config.lr, config.projector_lr, config.trainable) == (3e-5, 1.0, ("projector",))
    assert (config.data.path, config.batch_size) == ("mine.json", 128)
    assert config.is_locked


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("c.learning_rate = 3", "no setting 'learning_rate' (did you mean lr?)"),
        ("c.lrr = 3", "no setting 'lrr' (did you mean lr?)"),
        ("c.lr *= c.lrr", "no setting 'lrr' (did you mean lr?)"),
        ("c['num_train_epochs'] = 3", "no setting 'num_train_epochs' (did you mean epochs?)"),
        ("c.data.pth = 'x'", "no setting 'data.pth' (did you mean data.path?)"),
        ("c.path = 'x'", "no setting 'path' (did you mean data.path?)"),
        ("c.image_folder = 'x'", "no setting 'image_folder' (did you mean data.image_folder?)"),
        ("c.lora_r = 8", "no setting 'lora_r' (did you mean lora_rank?)"),
        ("c.model.path = 'x'", "no setting 'model.path' (did you mean model.init?)"),
        ("c.output_dir = 'x'", "no setting 'output_dir' (--workdir is where results are written)"),
        ("c.zzzzzz = 3", "no setting 'zzzzzz' (--show prints every setting)"),
        ("c.update({'bf16': True})", "no setting 'bf16' (did you mean dtype?)"),
        ("c.unlock(); c.learning_rate = 3", "no setting 'learning_rate' (did you mean lr?)"),
        ("c.lr = '2e-5'", "lr is '2e-5', not a number (without quotes: 2e-5)"),
        ("c.lr = float('nan')", "lr is nan, not a number"),
        ("c.lr = None", "lr is None, not a number"),
        ("c.batch_size = 16.0", "batch_size is 16.0, not a whole number (write 16)"),
        ("c.batch_size = '16'", "batch_size is '16', not a whole number (without quotes: 16)"),
        ("c.batch_size = None", "batch_size is None, not a whole number"),
        ("c.batch_size = True", "batch_size is True, not a whole number"),
        ("c.data.pack = 1", "data.pack is 1, not a string"),
        ("c.data.pack = 'tight'", "data.pack 'tight' is unknown"),
        ("c.dtype = None", "dtype is None, not a string"),
        ("c.model.init = 3", "model.init is 3, not a string"),
        (
            "c.trainable = ('lora')",
            "trainable is 'lora', not a tuple of strings (a tuple of one ends",
        ),
        ("c.trainable = ('lora', 3)", "trainable is ('lora', 3), not a tuple of strings"),
        ("c.data.length_buckets = ('64',)", "data.length_buckets is ('64',), not a tuple of whole"),
        ("c.stages.one = {'learning_rate': 3}", "stages.one: no setting 'learning_rate' (did you"),
        ("c.stages.one = {'data': {'pth': 3}}", "stages.one: no setting 'data.pth' (did you mean"),
        ("c.stages.one = {'lr': '3'}", "stages.one.lr is '3', not a number"),
        ("c.stages.one = 3", "stages.one is 3, not a group of settings"),
        ("import no_such_module", "no module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_mistake_in_it_is_one_line_with_file_and_line(line, says, own, capsys):
    name = own(line)
    assert cli.main(["train", "--config", name, "--show"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    where = "own.py: " if "not a group" in says else "own.py:7: "
    assert err.startswith(f"llava-jax train: {where}"), err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "own.py: there is no function get_config"),
        ("x = 1\ndef get_config(:\n", "own.py:2: not Python: "),
        (
            "\ndef get_config():\n    pass\n",
            "own.py:2: get_config returns nothing, not a ConfigDict",
        ),
        (
            "def get_config():\n    return 3\n",
            "own.py:1: get_config returns a int, not a ConfigDict",
        ),
        ("import nowhere_to_be_found\n", "own.py:1: no module named 'nowhere_to_be_found'"),
        ("from llava_jax.configs import fintune_7b\n", "own.py:1: cannot import name 'fintune_7b'"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n",
            "own.py: the config has no ",
        ),
        ("def get_config(x):\n    return x\n", "own.py: TypeError: get_config() missing 1"),
    ],
)
def test_a_file_that_is_no_config_is_named(text, says, own, capsys):
    assert cli.main(["train", "--config", own("", text), "--show"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"llava-jax train: {says}"), err


def test_a_mistake_in_the_file_that_it_starts_from_is_named_there(own, tmp_path, capsys):
    own("c.learning_rate = 3")
    (tmp_path / "next.py").write_text(
        "import sys; sys.path.insert(0, '.')\nimport own\n\ndef get_config():\n"
        "    return own.get_config()\n"
    )
    assert cli.main(["train", "--config", "next.py", "--show"]) == 2
    assert "own.py:7: no setting 'learning_rate' (did you mean lr?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config.learning_rate=3"], "no setting 'learning_rate' (did you mean lr?)"),
        (["--config.data=x"], "'data' is a group of settings (data."),
        (["--config.lr", "2e-5x"], "lr is '2e-5x', not a number"),
        (["--config.batch_size=16.0"], "batch_size is 16.0, not a whole number (write 16)"),
        (["--config.batch_size=None"], "batch_size is None, not a whole number"),
        (["--config.data.pack=maybe"], "data.pack 'maybe' is unknown"),
        (["--config.data.length_buckets=a,b"], "not a tuple of whole numbers"),
        (["--lr", "3"], "no option --lr (did you mean --config.lr=3?)"),
        (["--lr=3"], "no option --lr (did you mean --config.lr=3?)"),
        (["--learning_rate=3"], "(did you mean --config.lr=3?)"),
        (["--learning-rate", "3"], "(did you mean --config.lr=3?)"),
        (["--batch-size", "4"], "(did you mean --config.batch_size=4?)"),
        (["--bach_size", "4"], "(did you mean --config.batch_size=4?)"),
        (["--data_path", "a.json"], "(did you mean --config.data.path=a.json?)"),
        (["--bf16"], "(did you mean --config.dtype?)"),
        (["--output_dir", "x"], "(--workdir is where results are written)"),
        (["--quite"], "(did you mean --quiet?)"),
        (["finetune_7b"], "'finetune_7b' is not an option (settings are --config.NAME=VALUE)"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words, says, capsys):
    assert cli.main(["train", "--config", "finetune_7b", *words, "--show"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_without_config_the_configs_are_named(capsys):
    assert cli.main(["train"]) == 2
    assert "finetune_lora_7b" in capsys.readouterr().err
    assert cli.main(["train", "finetune_7b"]) == 2
    assert "(--config finetune_7b)" in capsys.readouterr().err
    assert cli.main(["train", "--config", "finetune7b"]) == 2
    assert "(did you mean 'finetune_7b'?)" in capsys.readouterr().err


def test_a_path_that_is_not_there_is_no_other_config(own, tmp_path, capsys):
    own("")
    (tmp_path / "v1.py").write_text(OWN.replace("{}", ""))
    (tmp_path / "v1.5.py").write_text(OWN.replace("{}", "c.lr = 5.0"))
    assert load_config("v1.5", []).lr == 5
    assert load_config("configs/finetune_7b.py", []) == load_config("finetune_7b", [])
    for name in (
        "typo/finetune_7b.py",
        "typo/finetune_7b",
        str(tmp_path / "finetune_7b.py"),
        "",
        ".",
    ):
        assert cli.main(["train", "--config", name, "--show"]) == 2
        assert f"no config file {name!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("trainable=('projector','lora')", "trainable", ("projector", "lora")),
        ("trainable=projector,lora", "trainable", ("projector", "lora")),
        ("trainable=lora", "trainable", ("lora",)),
        ("data.image_buckets=(0,1)", "data.image_buckets", (0, 1)),
        ("data.image_buckets=1", "data.image_buckets", (1,)),
        ("data.target_buckets=", "data.target_buckets", ()),
        ("data.pack=true", "data.pack", "exact"),
        ("data.pack=0", "data.pack", ""),
        ("lr=3", "lr", 3.0),
        ("projector_lr=1e-3", "projector_lr", 1e-3),
        ("projector_lr=None", "projector_lr", None),
        ("mesh.fsdp=-1", "mesh.fsdp", -1),
        ("name=1", "name", "1"),
        ("model.init=a=b", "model.init", "a=b"),
    ],
)
def test_a_value_on_the_command_line(override, name, value):
    config = load_config("finetune_7b", [f"--config.{override}"])
    for part in name.split("."):
        config = config[part]
    assert config == value
    assert type(config) is type(value)


def test_a_stage_s_own_setting_is_changed_and_added():
    config = load_config(
        "quickstart",
        ["--config.stages.stage1.lr=0.5", "--config.stages.stage1.data.threads=7"],
    )
    (_, first), (_, second) = split_stages(config)
    assert (first.lr, first.data.threads) == (0.5, 7)
    assert (second.lr, second.data.threads) == (0.01, 2)
    with pytest.raises(ConfigError, match=r"no stage 'stage3' .*did you mean stages\.stage"):
        load_config("quickstart", ["--config.stages.stage3.lr=1"])
    with pytest.raises(ConfigError, match=r"stages.stage1: no setting 'lrr' \(did you mean lr"):
        load_config("quickstart", ["--config.stages.stage1.lrr=1"])


def test_a_stage_s_whole_number_may_become_a_fraction(own):
    name = own("c.stages.one = {'lr': 1, 'trainable': ['projector']}")
    ((_, one),) = split_stages(load_config(name, ["--config.stages.one.lr=0.5"]))
    assert (one.lr, one.trainable) == (0.5, ("projector",))


def test_what_depends_on_another_setting_follows_it():
    config = load_config("quickstart", ["--config.data_folder=here"])
    assert config.data.path == "here/instruct.json"
    assert config.stages.stage1.data.path == "here/captions.json"


def test_a_path_of_one_s_own_changes_nothing_else(own):
    text = OWN.replace("finetune_7b", "quickstart").replace("c.data.path", "c.data.image_folder")
    config = load_config(own('c.data.image_folder = "images"', text), [])
    assert (config.data.image_folder, config.data_folder) == ("images", "runs/quickstart/data")
    assert config.data.path == "runs/quickstart/data/instruct.json"
    assert config.stages.stage1.data.path == "runs/quickstart/data/captions.json"
    assert "{data_folder}" not in str(dict(flat(config)))


def test_what_cannot_follow_another_setting_is_an_error(own, capsys):
    text = OWN.replace("finetune_7b", "quickstart").replace("c.data.path", "c.data_folder")
    assert cli.main(["train", "--config", own("c.data_folder = 3", text), "--show"]) == 2
    assert "own.py" in capsys.readouterr().err


def test_every_foreign_name_leads_to_a_setting():
    assert len(FOREIGN) > 60
    assert set(FOREIGN.values()) <= set(known_settings())
    assert not set(FOREIGN) & set(HINTS)
    assert not set(FOREIGN) & set(known_settings())


def test_help_shows_overrides_configs_and_an_example(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config.NAME=VALUE" in out
    assert "finetune_lora_7b" in out
    assert "LoRA fine-tuning of LLaVA-1.5-7B" in out
    assert "llava-jax train --config finetune_7b" in out
    assert "-q, --quiet" in out


def test_a_file_of_one_s_own_is_called_by_its_name_unless_it_says_another(own):
    assert load_config(own(""), []).name == "own"
    assert load_config(own('c.name = "mine"'), []).name == "mine"
    assert load_config(own("", OWN.replace("finetune_7b", "common")), []).name == "own"
    assert load_config(own(""), ["name=other"]).name == "other"
    assert load_config("finetune_7b", []).name == "finetune_7b"
