"""Settings on the command line and in a config: what is refused, and what the refusal names."""

import json

import pytest

from llava_jax import cli
from llava_jax.errors import ConfigError, Stopped
from llava_jax.train.config_file import load_config
from llava_jax.train.names import flat
from llava_jax.train.settings import changed_settings, check_settings, keep_settings


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[]")
    return [f"--config.data.path={path}", f"--config.data.image_folder={tmp_path}"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.lrr=1", "no setting 'lrr' (did you mean lr?)"),
        ("--config.data.pth=x", "no setting 'data.pth' (did you mean data.path?)"),
        ("--config.path=x", "no setting 'path' (did you mean data.path?)"),
        ("--config.zzzzzz=x", "no setting 'zzzzzz' (--show prints every setting)"),
        ("--config.lr=fast", "lr is 'fast', not a number"),
    ],
)
def test_a_mistyped_setting_is_named_with_its_neighbour(override, says):
    with pytest.raises(ConfigError) as info:
        load_config("finetune_7b", [override])
    assert says in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["pretrain_7b", "finetune_7b", "finetune_lora_7b", "pretrain_13b"])
def test_our_own_settings_pass(name, data):
    check_settings(load_config(name, data))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch_size=0", "batch_size is 0, not at least 1"),
        ("steps=-3", "steps is -3"),
        ("epochs=0", "steps and epochs are both 0"),
        ("lr=-1", "lr is -1.0"),
        ("projector_lr=-1", "projector_lr is -1.0"),
        ("warmup_ratio=2", "warmup_ratio is 2.0, not from 0 to 1"),
        ("grad_accum=3", "128 is not a multiple of grad_accum 3"),
        ("loss_groups=3", "128 rows of a micro-batch are not a multiple of loss_groups 3"),
        ("save_every=0", "save_every is 0"),
        ("dtype=float17", "dtype 'float17' is unknown (one of 'float32', 'bfloat16')"),
        ("remat=some", "remat 'some'"),
        ("attention=flash", "attention 'flash'"),
        ("optimizer=sgd", "optimizer 'sgd'"),
        ("loss_average=sum", "loss_average 'sum'"),
        ("data.threads=-1", "data.threads is -1"),
        ("data.version=v9", "data.version 'v9' is unknown (one of default, v0, v1"),
        ("data.path=", "data.path is empty"),
        ("data.image_folder=/no/where", "there is no folder /no/where"),
    ],
)
def test_a_value_that_no_run_could_mean_is_refused(override, says, data):
    with pytest.raises(ConfigError) as info:
        check_settings(load_config("finetune_7b", [*data, f"--config.{override}"]))
    assert says in str(info.value)


def test_every_limit_and_choice_is_of_a_setting():
    from llava_jax.train.settings import CHOICES, LIMITS

    known = dict(flat(load_config("common", [])))
    assert set(CHOICES) | set(LIMITS) <= set(known)


def test_changed_settings_are_told_by_name(tmp_path):
    path = tmp_path / "config.json"
    config = load_config("finetune_7b", [])
    assert changed_settings(config, path) == []
    keep_settings(config, path)
    assert json.loads(path.read_text())["lr"] == 2e-5
    assert changed_settings(config, path) == []
    changed = load_config("finetune_7b", ["--config.lr=1", "--config.data.pack=true"])
    assert changed_settings(changed, path) == ["data.pack", "lr"]


def test_show_prints_every_setting_as_it_would_be_used(capsys):
    assert cli.main(["train", "--config", "finetune_7b", "--config.lr=3e-5", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "lr = 3e-05" in lines
    assert "data.version = 'v1'" in lines
    assert len(lines) == len(dict(flat(load_config("finetune_7b", []))))


def test_a_run_that_was_asked_to_stop_is_no_failure(monkeypatch, capsys):
    def stop(*_, **__):
        raise Stopped("stopped at step 3 of 9, state saved", fix="run it again to go on")

    monkeypatch.setattr("llava_jax.train.stages.run_stages", stop)
    assert cli.main(["train", "--config", "finetune_7b"]) == 0
    assert "stopped at step 3" in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_reaches_the_making_of_the_first_model(quiet, monkeypatch, tmp_path):
    from llava_jax.quickstart import pretrain
    from llava_jax.train.stages import make_initial_model

    seen = []
    monkeypatch.setattr(pretrain, "make", lambda config, folder, *, quiet: seen.append(quiet))
    make_initial_model(load_config("quickstart", []), tmp_path, quiet=quiet)
    assert seen == [quiet]
