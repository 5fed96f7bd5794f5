"""Rows of a plan on the simulated devices: memory by kind, steps, and changes that fit."""

import json
import math
import os

import jax
import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.config import LlavaConfig
from llava_jax.configs import common, finetune_7b, pretrain_7b
from llava_jax.data.settings import DataSettings
from llava_jax.errors import ConfigError
from llava_jax.llava import abstract_params
from llava_jax.plan import compile as compiler
from llava_jax.plan import fit, plan
from llava_jax.plan.lengths import UNKNOWN, Means, draw_sizes
from llava_jax.plan.mixture import lay_out
from llava_jax.plan.rows import Kept
from llava_jax.plan.table import describe
from llava_jax.plan.topology import parse_topology
from llava_jax.train.config import load_config
from tests.data.test_packing import layout

HERE = parse_topology("here")
FEW = Means(samples=2000)


def question(**changes):
    config = common.get_config()
    config.batch_size, config.data.max_length = 16, 64
    for name, value in changes.items():
        config[name] = value
    return plan.Question("tiny", config, HERE, "tiny", means=FEW)


@pytest.fixture(scope="module")
def setup():
    return plan.set_up(question(), jax.devices())


@pytest.fixture(scope="module")
def row():
    """The row of `setup`."""
    return plan.make_row(question(), jax.devices(), Kept(None))


def never(monkeypatch, name):
    monkeypatch.setattr(compiler, name, lambda *_: pytest.fail("was made again"))


@pytest.fixture
def lowered(setup, row, monkeypatch):
    """Every question has the program of `setup`, which is not compiled again."""
    monkeypatch.setattr(plan, "set_up", lambda *_: setup)
    monkeypatch.setattr(compiler, "lower", lambda *_: (None, row["compiled"]["digest"]))
    never(monkeypatch, "compile_step")


def test_what_stays_is_what_the_parameters_take(setup):
    params = abstract_params(LlavaConfig.tiny())
    bytes_of = {
        name: math.prod(p.shape) * (2 if name.startswith("vision.") else 4)
        for name, p in params.items()
    }
    memory = setup.memory
    held = memory.trained + memory.frozen + memory.unused
    assert sum(bytes_of.values()) / 8 <= held <= 1.1 * sum(bytes_of.values()) / 8  # norms are whole
    assert memory.optimizer == pytest.approx(2 * memory.trained, abs=100)
    assert memory.gradients == memory.trained
    arrays = sum(np.prod(b.shape) * b.dtype.itemsize for b in setup.batch.values())
    assert memory.batch == arrays / 8


def test_what_the_program_takes_is_what_was_weighed(setup, row):
    arguments = row["compiled"]["arguments"]
    # The step reads neither what is unused nor turns that do not occur; flags are a few bytes.
    read = setup.memory.resident - setup.memory.unused - setup.batch["turns"].size * 4 / 8
    assert arguments == pytest.approx(read, abs=200)
    assert row["memory"]["peak"] >= arguments
    assert row["traffic"]["links"]
    assert row["traffic"]["hbm"] > 0


def test_a_row_is_kept_and_not_made_again(row, tmp_path, monkeypatch):
    kept = Kept(tmp_path / "rows.jsonl")
    kept.add(row)
    never(monkeypatch, "lower")
    again = plan.make_row(question(), jax.devices(), Kept(tmp_path / "rows.jsonl"))
    assert again == json.loads(json.dumps(row))
    for other in (question(lr=1.0), question(name="twin")):
        with pytest.raises(pytest.fail.Exception):
            plan.make_row(other, jax.devices(), kept)


@pytest.mark.usefixtures("lowered")
def test_the_same_program_is_not_compiled_again(row):
    kept = Kept(None)
    kept.add(row)
    twin = plan.make_row(question(name="twin"), jax.devices(), kept)
    assert twin["compiled"] == row["compiled"]
    assert len(kept.rows) == 2


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", ["code", "reader", "versions"])
def test_a_row_that_something_else_made_is_made_again(name, row):
    """Of other code, its program may serve; of another compiler or reader, not even that."""
    kept = Kept(None)
    kept.add(row | {name: {"jax": "0.1"} if name == "versions" else "other"})
    if name == "code":
        assert plan.make_row(question(), jax.devices(), kept) == row
        assert kept.rows == {row["key"]: row}
        return
    with pytest.raises(pytest.fail.Exception):
        plan.make_row(question(), jax.devices(), kept)


def test_flags_of_the_compiler_belong_to_its_version(monkeypatch):
    before = compiler.versions(HERE)
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    assert compiler.versions(HERE) != before


def test_here_may_be_any_accelerator(monkeypatch):
    monkeypatch.setattr(compiler, "installed_versions", lambda names: dict.fromkeys(names, "1"))
    assert {"libtpu", "jax-cuda13-plugin", "jaxlib"} <= set(compiler.versions(HERE))


def test_machines_of_other_links_share_no_program():
    devices = jax.devices()
    one, two = (plan._target(parse_topology(n), devices) for n in ("v5e-8", "2xv5e-4"))
    assert (one, two) == ("v5e: 8 in 1 slice", "v5e: 8 in 2 slices")
    small, large = (plan._target(parse_topology(n), devices) for n in ("8xA100-40", "8xA100-80"))
    assert small == large


@pytest.mark.usefixtures("lowered")
def test_here_is_another_machine_where_other_devices_are(row):
    kept = Kept(None)
    kept.add(row)
    assert (row["devices"], row["target"]) == (8, "here: 8 x cpu")
    assert row["memory"]["peak"] > row["memory"]["temporary"]
    with pytest.raises(pytest.fail.Exception):  # neither the row nor its program is taken
        plan.make_row(question(), jax.devices()[:1], kept)


def test_what_cannot_fit_is_not_compiled(monkeypatch):
    """Parameters and optimizer of the 13B are over 17 GiB a device on eight."""
    never(monkeypatch, "lower")
    config = load_config("finetune_13b", [])
    asked = plan.Question("13b", config, parse_topology("v5e-8"), "", means=FEW)
    found = plan.make_row(asked, jax.devices(), Kept(None))
    assert not found["fits"]
    assert 17 < found["memory"]["peak"] / 2**30 < 20
    assert "does not fit, more than" in describe(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.pack=fill"], "data.group_by_modality makes batches of similar samples"),
        (["data.pack=exact", "data.pack_length=64"], "positions at which samples are cut"),
        (["quantize=nf4"], "'language' is in trainable"),
        (["loss_average=micro", "data.pack=exact", "grad_accum=2"], "deals a step's samples"),
        (["lora_rank=4"], "'lora' is not in trainable"),
        (["batch_size=12"], "12 rows of a batch do not divide"),
        (["mesh.fsdp=3"], "does not fit 8 devices"),
        (["mesh.context=8", "data.max_length=100"], "cannot be split over mesh.context=8"),
    ],
)
def test_what_train_refuses_is_refused(words, said, capsys):
    """By the checks of `train`, before anything is compiled."""
    given = [f"--config.{word}" for word in ["data.max_length=128", *words]]
    few = ["--config", "finetune_7b", "--model", "tiny", "--topology", "here", "--samples=100"]
    assert main(["plan", *few, *given]) == 2
    assert said in capsys.readouterr().err


def test_another_file_is_not_taken_for_rows(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="something else"):
        Kept(tmp_path / "x.json")


@pytest.mark.parametrize("change", [{"compiled": 3}, {"key": []}, {"memory": {}}])
def test_what_is_no_row_is_named_by_its_line(row, tmp_path, change):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl: line 2 holds something else"):
        Kept(file)


def test_two_plans_keep_their_rows_in_one_file(row, tmp_path):
    file = tmp_path / "rows.jsonl"
    one, two = Kept(file), Kept(file)
    one.add(row | {"key": "1"})
    two.add(row | {"key": "2"})
    assert set(Kept(file).rows) == {"1", "2"}


@pytest.mark.parametrize(
    "words",
    ["--tokens-per-sample=nan", "--samples=0", "--tokens-per-sample=0",
     "--targets-per-sample=-1", "--images-per-sample=inf",
     "--out=/dev/null/x", "--table=/dev/null/x", "--table=/"],
)  # fmt: skip
def test_numbers_and_files_are_checked_first(words, capsys):
    assert main(["plan", "--config", "finetune_7b", "--topology", "here", words]) == 2
    said = capsys.readouterr().err
    assert words.split("=")[0] in said
    assert len(said.splitlines()) == 1


def test_the_first_change_that_fits_is_named(setup, monkeypatch):
    made = []

    def make_row(other, devices, kept):
        made.append(other.change)
        return {"change": other.change, "fits": len(made) == 2}

    monkeypatch.setattr(fit, "make_row", make_row)
    tried = [{"remat": "none"}, {"grad_accum": 3}, {"lora_rank": 4}, {"grad_accum": 2}]
    tried[2]["trainable"] = ("projector", "lora")
    monkeypatch.setattr(fit, "changes", lambda _: tried)
    row = {"memory": {"peak": setup.peak, "device": setup.peak}, "compiled": {"fits": True}}
    found = fit.find_change(question(), row, jax.devices(), Kept(None))
    # The first would take more; 16 rows do not divide into 3 micro-batches.
    assert made == ["lora_rank=4 trainable=projector,lora", "grad_accum=2"]
    assert found == {"change": made[1], "fits": True}
    row["memory"]["device"] = 0
    assert fit.find_change(question(), row, jax.devices(), Kept(None)) is None


def test_changes_cost_more_and_more():
    config = finetune_7b.get_config()
    config.remat = "dots"
    names = [next(iter(settings)) for settings in fit.changes(config)]
    assert names[0] == "remat"
    assert list(dict.fromkeys(names)) == ["remat", "grad_accum", "mesh.tensor", "trainable"]
    config.mesh.data, config.mesh.fsdp = -1, 1
    assert {"mesh.data": 1, "mesh.fsdp": -1} in list(fit.changes(config))


def steps_of(config, parts=8, means=UNKNOWN):
    data = {**config.data, "batch_size": config.batch_size, "seed": config.seed}
    settings = DataSettings.read(data).completed(2048, 1, parts)
    return lay_out(settings, LlavaConfig.v15_7b().image_tokens, means)


def test_steps_of_the_recipes():
    for config, means, steps in (
        (pretrain_7b.get_config(), UNKNOWN, 2181),
        (finetune_7b.get_config(), Means(samples=665_298 // 50), 104),
    ):
        found = steps_of(config, means=means)
        assert found.shape.rows == config.batch_size
        assert found.of_run(config) == steps


def test_packed_steps_are_those_of_a_run():
    """As its loader lays the same samples out; nearly full, of a batch's samples."""
    config = finetune_7b.get_config()
    config.data.group_by_modality = False
    config.data.pack, config.data.pack_length = "fill", 4096
    found = steps_of(config, means=Means(samples=20_000))
    sizes = draw_sizes(means=Means(samples=20_000))
    run = layout(sizes, 8, pack="fill", pack_length=4096, batch_size=128, seed=config.seed)
    assert found.shape == run.rows(0, 0, [], [])[1]
    assert (found.real, found.epoch) == (pytest.approx(run.share), run.steps(1))
    assert (found.shape.rows, found.shape.groups) == (24, 8)  # 27 rows would hold 128 samples
    assert found.real > 0.97
    assert steps_of(config, 16, Means(samples=20_000)).shape.rows == 32
    config.data.pack = "exact"  # the samples of each step are those of the unpacked run
    assert steps_of(config, means=Means(samples=12_800)).epoch == 100


def test_what_is_known_of_the_data_replaces_the_mixture():
    config = finetune_7b.get_config()
    known = Means(samples=1000, tokens=300.0, targets=50.0, images=0.0)
    mixture = steps_of(config, means=known).mixture
    assert (mixture.samples, mixture.images) == (1000, 0)
    assert mixture.tokens == pytest.approx(300, rel=0.1)  # a few are cut
    assert mixture.targets == pytest.approx(50, rel=0.1)
    assert mixture.keys > mixture.tokens / 2  # long samples have more


def test_small_buckets_mean_small_samples():
    """Whose config has them, has no sample as long as the mixture's."""
    config = finetune_7b.get_config()
    config.data.length_buckets, config.data.max_length = (256, 1024), 1024
    config.data.target_buckets = (8, 16)
    assert steps_of(config, means=Means(samples=2000)).shape.targets == 16


@pytest.mark.parametrize(
    ("init", "layers"),
    [
        ("lmsys/vicuna-13b-v1.5", 40),
        ("runs/pretrain_7b/export", 32),
        ("llava-hf/llava-1.5-7b-hf", 32),
    ],
)
def test_sizes_come_from_a_name(init, layers):
    config = common.get_config()
    config.model.init = init
    assert plan.sizes_of(plan.Question("", config, HERE)).language.layers == layers


def test_unknown_sizes_are_an_error():
    config = common.get_config()
    config.model.init = "someone/qwen-17b"
    with pytest.raises(ConfigError, match="sizes of 'someone/qwen-17b' are unknown"):
        plan.sizes_of(plan.Question("", config, HERE))


def test_sizes_come_from_a_model_that_is_here_and_from_the_stage_before():
    from llava_jax.configs import quickstart
    from llava_jax.train.stages import split_stages

    (_, first), (_, second) = split_stages(quickstart.get_config())
    model = plan.sizes_of(plan.Question("", first, HERE))
    assert model.language.layers == LlavaConfig.tiny().language.layers
    assert plan.sizes_of(plan.Question("", second, HERE, before=model)) == model


def test_the_command(tmp_path, capsys):
    words = ["plan", "--config", "finetune_7b", "--model", "tiny", "--topology", "here"]
    words += ["--config.batch_size=8", "--config.data.max_length=64", "--samples=80"]
    files = ["--out", str(tmp_path / "rows.jsonl"), "--table", str(tmp_path / "table.md")]
    assert main([*words, *files]) == 0
    text = capsys.readouterr().out
    assert text.startswith("finetune_7b on here: ")
    assert "10 steps for 80 samples" in text
    assert "| finetune_7b | here | 8 x 64, 1 |" in (tmp_path / "table.md").read_text()
    assert main([*words, *files, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["devices"], row["steps"]) == (8, 10)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "here"], "no --config is given"),
        (["--config", "finetune_7b"], "no --topology is given"),
        (["--config", "finetune_7b", "--topology", "here", "v5e-8"], "in a command of its own"),
        (["--config", "finetune_7b", "--topology", "v5e-9"], "no topology 'v5e-9'"),
    ],
)
def test_a_command_that_cannot_be_answered(words, said, capsys):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "wheel"), [("v5e-8", "tpu"), ("8xH100", "cuda12")])
def test_a_missing_compiler_is_named(name, wheel, monkeypatch):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="needs the package") as error:
        compiler.prepare([parse_topology(name)])
    assert f"pip install 'llava_jax[{wheel}]'" in error.value.fix


@pytest.mark.parametrize("version", ["cuda12", "cuda13"])
def test_either_cuda_plug_in_compiles_for_gpus(version, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    here = f"jax_{version}_plugin"
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name == here or None)
    compiler.prepare([parse_topology("8xH100")])


def test_a_refused_tpu_program_says_what_it_wanted():
    said = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert compiler.over_memory(said, 7) == int(20.5 * 2**30)
    said = "the total memory required for HLO temporaries (48.00G) exceeds available HBM (15.75G)."
    assert compiler.over_memory(said, 7) == 48 * 2**30 + 7
    assert compiler.over_memory("something else", 7) is None
