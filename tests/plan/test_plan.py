"""Rows of a plan on the simulated devices: memory by kind, steps, and changes that fit."""

import json
import math

import jax
import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.config import LlavaConfig
from llava_jax.configs import common, finetune_7b, pretrain_7b
from llava_jax.errors import ConfigError
from llava_jax.llava import abstract_params
from llava_jax.plan import compile as compiler
from llava_jax.plan import fit, plan
from llava_jax.plan.mixture import FINETUNE, PRETRAIN, mixture_of, step_shape, steps_of
from llava_jax.plan.rows import Kept
from llava_jax.plan.topology import parse_topology

HERE = parse_topology("here")


def question(**changes):
    config = common.get_config()
    config.batch_size, config.data.max_length = 16, 64
    for name, value in changes.items():
        config[name] = value
    return plan.Question("tiny", config, HERE, "tiny")


@pytest.fixture(scope="module")
def setup():
    return plan.set_up(question(), jax.devices())


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


def test_a_row_is_kept_and_not_compiled_again(setup, tmp_path, monkeypatch):
    row = plan.make_row(setup, Kept(tmp_path / "rows.jsonl"))
    arguments = row["compiled"]["arguments"]
    # The step reads neither what is unused nor turns that do not occur; flags are a few bytes.
    read = setup.memory.resident - setup.memory.unused - setup.batch["turns"].size * 4 / 8
    assert arguments == pytest.approx(read, abs=200)
    assert row["memory"]["peak"] >= arguments
    assert row["traffic"]["links"]
    assert row["traffic"]["hbm"] > 0

    monkeypatch.setattr(compiler, "lower", lambda *_: pytest.fail("was made again"))
    assert plan.make_row(setup, Kept(tmp_path / "rows.jsonl")) == json.loads(json.dumps(row))
    other = plan.set_up(question(lr=1.0), jax.devices())
    with pytest.raises(pytest.fail.Exception):
        plan.make_row(other, Kept(tmp_path / "rows.jsonl"))


def test_chips_that_differ_in_memory_share_a_program(setup, tmp_path, monkeypatch):
    kept = Kept(tmp_path / "rows.jsonl")
    small = plan.make_row(setup, kept)
    monkeypatch.setattr(compiler, "compile_step", lambda *_: pytest.fail("was compiled again"))
    twin = plan.set_up(question(name="twin"), jax.devices())
    assert plan.make_row(twin, kept)["compiled"] == small["compiled"]
    assert len(Kept(tmp_path / "rows.jsonl").rows) == 2


def test_here_is_another_machine_where_other_devices_are(tmp_path, monkeypatch):
    asked, kept = question(), Kept(tmp_path / "rows.jsonl")
    all_here, one = (plan.set_up(asked, jax.devices()[:n]) for n in (None, 1))
    many = plan.make_row(all_here, kept)
    alone = plan.make_row(one, kept)
    assert (many["devices"], alone["devices"]) == (8, 1)
    assert many["target"] == "here: 8 x cpu"
    assert many["key"] != alone["key"]

    monkeypatch.setattr(plan, "_here", lambda _: "here: 8 x another chip")
    monkeypatch.setattr(compiler, "compile_step", lambda *_: pytest.fail("was compiled"))
    with pytest.raises(pytest.fail.Exception):  # neither the row nor its program is taken
        plan.make_row(all_here, kept)


def test_another_file_is_not_taken_for_rows(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="something else"):
        Kept(tmp_path / "x.json")


@pytest.mark.parametrize("change", [{"compiled": 3}, {"key": []}, {"memory": {}}])
def test_what_is_no_row_is_named_by_its_line(setup, tmp_path, change):
    row, file = plan.make_row(setup, Kept(None)), tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl: line 2 holds something else"):
        Kept(file)


def test_two_plans_keep_their_rows_in_one_file(setup, tmp_path):
    row, file = plan.make_row(setup, Kept(None)), tmp_path / "rows.jsonl"
    one, two = Kept(file), Kept(file)
    one.add(row | {"key": "1"})
    two.add(row | {"key": "2"})
    assert set(Kept(file).rows) == {"1", "2"}


@pytest.mark.parametrize(
    "words",
    ["--real-tokens=nan", "--real-tokens=1.5", "--samples=0", "--tokens-per-sample=0",
     "--targets-per-sample=-1", "--images-per-sample=inf", "--longest-row=0",
     "--out=/dev/null/x", "--table=/dev/null/x", "--table=/"],
)  # fmt: skip
def test_numbers_and_files_are_checked_first(words, capsys):
    assert main(["plan", "--config", "finetune_7b", "--topology", "here", words]) == 2
    said = capsys.readouterr().err
    assert words.split("=")[0] in said
    assert len(said.splitlines()) == 1


def test_the_first_change_that_fits_is_named(setup, monkeypatch):
    made = []

    def make_row(other, kept):
        made.append(other.question.change)
        return {"change": other.question.change, "fits": len(made) == 2}

    monkeypatch.setattr(fit, "make_row", make_row)
    tried = [{"remat": "none"}, {"grad_accum": 3}, {"lora_rank": 4}, {"grad_accum": 2}]
    tried[2]["trainable"] = ("projector", "lora")
    monkeypatch.setattr(fit, "changes", lambda _: tried)
    row = {"memory": {"peak": setup.peak, "device": setup.peak}}
    found = fit.find_change(setup, row, jax.devices(), Kept(None))
    # The first would take more; 16 rows do not divide into 3 micro-batches.
    assert made == ["lora_rank=4 trainable=projector,lora", "grad_accum=2"]
    assert found == {"change": made[1], "fits": True}
    row["memory"]["device"] = 0
    assert fit.find_change(setup, row, jax.devices(), Kept(None)) is None


def test_changes_cost_more_and_more():
    config = finetune_7b.get_config()
    config.remat = "dots"
    names = [next(iter(settings)) for settings in fit.changes(config)]
    assert names[0] == "remat"
    assert list(dict.fromkeys(names)) == ["remat", "grad_accum", "mesh.tensor", "trainable"]
    config.mesh.data, config.mesh.fsdp = -1, 1
    assert {"mesh.data": 1, "mesh.fsdp": -1} in list(fit.changes(config))


def test_steps_of_the_recipes():
    stage1, stage2 = pretrain_7b.get_config(), finetune_7b.get_config()
    for config, mixture, steps in ((stage1, PRETRAIN, 2181), (stage2, FINETUNE, 5198)):
        assert mixture_of(config) == mixture
        shape = step_shape(config, 2048, mixture, 8)
        assert shape.rows == config.batch_size
        assert steps_of(config, shape, mixture) == steps


def test_packed_rows_hold_a_batch():
    config = finetune_7b.get_config()
    config.data.pack, config.data.max_length = "fill", 4096
    mixture = mixture_of(config, real=0.97)
    shape = step_shape(config, 4096, mixture, 8)
    assert (shape.rows, shape.groups) == (24, 8)  # 27 rows would hold 128 samples
    assert step_shape(config, 4096, mixture, 16).rows == 32
    samples = shape.rows * 4096 * 0.97 / 861
    assert shape.groups * shape.images >= samples * mixture.images
    assert shape.groups * (shape.targets or 0) >= samples * mixture.targets
    assert steps_of(config, shape, mixture) == math.ceil(665_298 / samples)
    config.data.pack = "exact"  # the samples of each step are those of the unpacked run
    assert steps_of(config, shape, mixture) == 5198


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
    assert error.value.fix == f"pip install 'llava_jax[{wheel}]'"


def test_a_refused_tpu_program_says_what_it_wanted():
    said = "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
    assert compiler.over_memory(said) == int(20.5 * 2**30)
    assert compiler.over_memory("something else") is None
