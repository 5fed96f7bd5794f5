"""Settings on the command line and in a config: what is refused, and what the refusal names."""

import dataclasses

import pytest

from llava_jax import cli
from llava_jax.config import LlavaConfig, LoraConfig, PixelConfig
from llava_jax.errors import ConfigError, SampleError, Stopped
from llava_jax.params import linears
from llava_jax.settings import TRAINING
from llava_jax.train.checks import (
    check_data_files,
    check_settings,
    check_stages,
)
from llava_jax.train.config import load_config
from llava_jax.train.model_io import fit_model
from llava_jax.train.stages import split_stages

V15_7B = LlavaConfig.v15_7b()


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
        ("batch_size=0", "batch_size is 0, but must be at least 1"),
        ("steps=-3", "steps is -3"),
        ("epochs=0", "steps and epochs are both 0"),
        ("lr=-1", "lr is -1.0"),
        ("projector_lr=-1", "projector_lr is -1.0"),
        ("warmup_ratio=2", "warmup_ratio is 2.0, but must be from 0 to 1"),
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
        ("data.path=/no/where.json", "/no/where.json: no such data file"),
        ("data.path=/no/a.json,/no/b.json", "/no/a.json: no such data file"),
        ("data.image_folder=/no/where", "there is no folder /no/where"),
        ("lr=inf", "lr is inf, not a number"),
        ("seed=-1", "seed is -1, but must be at least 0"),
        ("data.groups=3", "128 is not a multiple of data.groups 3"),
        ("data.turns=some", "data.turns 'some' is unknown"),
        ("data.augment=flip", "data.augment 'flip' is unknown"),
        ("data.holdout=1", "data.holdout is 1.0, but must be at least 0 and below 1"),
        ("data.length_buckets=8,4", "data.length_buckets (8, 4) must be in rising order"),
        ("trainable=", "trainable is empty"),
        (
            "trainable=projektor",
            "trainable 'projektor' is unknown (one of 'projector', 'language',",
        ),
        ("lora_rank=8", "lora_rank is 8, but 'lora' is not in trainable"),
        ("exact_match=true", "exact_match is set, but data.holdout is 0"),
    ],
)
def test_a_value_that_no_run_could_mean_is_refused(override, says, data):
    with pytest.raises(ConfigError) as info:
        check_settings(load_config("finetune_7b", [*data, f"--config.{override}"]))
    assert says in str(info.value)


def test_show_prints_every_setting_as_it_would_be_used(capsys):
    assert cli.main(["train", "--config", "finetune_7b", "--config.lr=3e-5", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TRAINING)
    shown = dict(line.split(" = ", 1) for line in lines)
    assert shown["lr"].split("  # ")[0].strip() == "3e-05"
    assert shown["lr"].endswith("# peak learning rate [default: 2e-05]")
    assert shown["data.version"].startswith("'v1'")
    assert "[default" not in shown["data.version"]


def test_a_run_that_was_asked_to_stop_has_an_exit_code_of_its_own(monkeypatch, capsys):
    def stop(*_, **__):
        raise Stopped("stopped at step 3 of 9, state saved", fix="run it again to go on")

    monkeypatch.setattr("llava_jax.train.stages.run_stages", stop)
    # Not 0: in `train && convert` the second would take an unfinished run for a finished one.
    assert cli.main(["train", "--config", "finetune_7b"]) == 75
    assert "stopped at step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--scaling=num_workers=2", "--max-failures=1", "--processes=4", "--hang-minutes=5"],
)
def test_options_of_a_launcher_are_refused_without_one(option, capsys):
    assert cli.main(["train", "--config", "finetune_7b", option]) == 2
    assert f"{option.partition('=')[0]} is of --" in capsys.readouterr().err


def test_one_of_both_starts_the_processes(capsys):
    words = ["--supervise", "--launcher", "ray", "--scaling=num_workers=2"]
    assert cli.main(["train", "--config", "finetune_7b", *words]) == 2
    assert "--supervise and --launcher exclude each other" in capsys.readouterr().err


def test_loss_groups_and_packing_exclude_each_other(data):
    words = [*data, "--config.loss_groups=2", "--config.data.pack=true"]
    with pytest.raises(ConfigError, match="loss_groups is 2, but with data.pack"):
        check_settings(load_config("finetune_7b", words))


def test_packing_and_the_average_over_micro_batches_exclude_each_other(data):
    words = [*data, "--config.loss_average=micro", "--config.data.pack=exact"]
    check_settings(load_config("finetune_7b", words))
    with pytest.raises(ConfigError, match="loss_average is 'micro', but data.pack"):
        check_settings(load_config("finetune_7b", [*words, "--config.grad_accum=2"]))


def stages_of(data, *words, stages=None):
    config = load_config("finetune_7b", [*data, *(f"--config.{word}" for word in words)])
    config.stages.update(stages or {})
    return split_stages(config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": -1.0}, "stage two: lr is -1.0"),
        ({"data": {"image_folder": "/no/where"}}, "stage two: data.image_folder: there is no"),
        ({"data": {"version": "v9"}}, "stage two: data.version 'v9'"),
        ({"data": {"groups": 5}}, "stage two: batch_size 128 is not a multiple of data.groups 5"),
    ],
)
def test_a_later_stage_is_checked_by_name(changes, says, data):
    check_stages(stages_of(data, stages={"one": {}, "two": {}}))
    with pytest.raises(ConfigError) as info:
        check_stages(stages_of(data, stages={"one": {}, "two": changes}))
    assert says in str(info.value)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ({"one": {}, "two": {"model": {"init": "x"}}}, r"stages\.two\.model\.init .* model of one"),
        ({"one": {"exact_match": True}, "two": {}}, r"stages\.one\.exact_match .*only the last"),
    ],
)
def test_what_a_stage_s_entry_would_set_in_vain_is_refused(stages, says, data):
    with pytest.raises(ConfigError, match=says):
        stages_of(data, stages=stages)
    reverse = dict(zip(stages, reversed(stages.values()), strict=True))
    stages_of(data, stages=reverse)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/no/where.json", "stage two: /no/where.json: no such data file"),
        ("torn.json", "stage two: torn.json: not JSON at line 1"),
        ("none.json", "stage two: none.json: there are no samples"),
        ("bad.json", "stage two: bad.json: every sample is bad: no list of conversations"),
    ],
)
def test_a_later_stage_s_data_is_read_before_the_first(path, says, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.json").write_text('[{"id": ')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "bad.json").write_text('[{"id": "a", "conversations": 3}]')
    with pytest.raises(SampleError) as info:
        check_data_files(stages_of(data, stages={"two": {"data": {"path": path}}}))
    assert says in str(info.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["vision_lr=1e-5"], "vision_lr = 1e-05 has no effect unless trainable has 'vision'"),
        (["trainable=language", "projector_lr=1e-5"], "projector_lr = 1e-05 has no effect"),
        (["muon_adam_lr_ratio=0.5"], "has no effect unless optimizer is 'muon'"),
        (["lora_alpha=16"], "lora_alpha = 16.0 has no effect unless lora_rank is set"),
        (["data.turns_per_sample=3"], "unless data.turns is 'independent'"),
        (["data.row_multiple=3"], "unless data.pack is 'exact'"),
        (["data.holdout_seed=3"], "unless data.holdout is set"),
    ],
)
def test_a_setting_without_effect_is_named(words, says, data, caplog):
    check_stages(stages_of(data, *words))
    assert says in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ("trainable=projector", "quantize=nf4"),  # frozen kernels are held in 4 bits all the same
        (r"trainable=projector,re:.*\.lora_[ab]", "lora_rank=8", "quantize=nf4"),
        (r"trainable=re:projector\..*", "projector_lr=1e-5"),
        (r"trainable=projector,re:vision\.layers\..*", "vision_lr=1e-5"),
    ],
)
def test_patterns_count_as_what_they_cover(words, data, caplog):
    check_stages(stages_of(data, *words))
    assert not caplog.text


def test_a_setting_that_one_stage_uses_is_not_named(data, caplog):
    stages = {"one": {}, "two": {"trainable": ("projector", "vision")}}
    check_stages(stages_of(data, "vision_lr=1e-5", stages=stages))
    assert not caplog.text


def test_a_model_and_the_settings_that_do_not_fit_it(data):
    lora = LoraConfig(rank=8, alpha=16.0, dropout=0.0)

    def fit(*words, model=V15_7B):
        return fit_model(load_config("finetune_7b", [f"--config.{w}" for w in words]), model)

    assert fit().max_length == 2048
    square = dataclasses.replace(V15_7B, image_aspect_ratio="square")
    assert fit(model=square).image_aspect_ratio == "pad"
    assert fit("data.image_aspect_ratio=", model=square).image_aspect_ratio == "square"
    whole = PixelConfig(resize_to=(336,), crop=False)
    vision = dataclasses.replace(V15_7B.vision, pixels=whole)
    with pytest.raises(ConfigError, match="data.image_aspect_ratio is 'square': do_center_crop"):
        fit("data.image_aspect_ratio=square", model=dataclasses.replace(V15_7B, vision=vision))
    mpt = dataclasses.replace(V15_7B, template="mpt")
    for version, before, after in (
        ("v1", V15_7B, "vicuna_v1"),
        ("v1", mpt, "vicuna_v1"),
        ("v0", mpt, "vicuna_v1"),
        ("mpt", V15_7B, "mpt"),
        ("plain", mpt, "mpt"),
    ):
        assert fit(f"data.version={version}", model=before).template == after
    assert fit("data.max_length=0").max_length == V15_7B.max_length
    with pytest.raises(ConfigError, match="data.max_length is 4097, but the model has 4096 pos"):
        fit("data.max_length=4097")
    with pytest.raises(
        ConfigError, match="param_groups 'vision lr=1e-6': no parameter of 'vision'"
    ):
        fit("param_groups=vision lr=1e-6,projector lr=1e-4")
    with pytest.raises(ConfigError, match="lora_rank is 8, but no word of trainable covers"):
        fit("lora_rank=8")
    adapters = "trainable=projector,lora"
    assert fit(adapters, "lora_rank=8").lora == LoraConfig(8, 256.0, 0.05)
    with pytest.raises(ConfigError, match=r"no adapters \(set lora_rank"):
        fit(adapters)
    words = fit(adapters, "lora_rank=8", r"lora_targets=vision,re:.*\.mlp\.up", "lora_rslora=true")
    assert words.lora
    assert words.lora.targets == (*linears(V15_7B)[:6], "language.layers.mlp.up")
    assert words.lora.scale == 256 / 8**0.5
    with pytest.raises(ConfigError, match=r"lora_targets: 're:q_proj' matches no linear layer"):
        fit(adapters, "lora_rank=8", "lora_targets=re:q_proj")
    adapted = dataclasses.replace(V15_7B, lora=lora)
    assert fit(adapters, model=adapted).lora == lora
    assert fit(adapters, "lora_rank=8", "lora_alpha=16", model=adapted).lora is not None
    with pytest.raises(ConfigError, match="lora_alpha 256 differs from .* holds: 16"):
        fit(adapters, "lora_rank=8", model=adapted)
