"""Options of a conversion that would have no effect are refused, before anything is written."""

import json
import os

import pytest

from llava_jax.cli import main
from llava_jax.config import LlavaConfig
from llava_jax.convert import Options, Target, beside, convert
from llava_jax.errors import ConfigError, WeightError
from tests.convert import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("source") / "a", "jax", tiny.ORIGINAL)


@pytest.mark.parametrize(
    ("to", "option", "said"),
    [
        ("jax", ["--layout", "hf5"], "--layout has no effect with --to jax"),
        ("hf", ["--tower", "none"], "--tower has no effect with --to hf"),
        ("jax", ["--quantize", "f16"], "--quantize has no effect with --to jax"),
        ("gguf", ["--shard-size", "5GB"], "--shard-size has no effect with --to gguf"),
        ("gguf", ["--template", "mpt"], "--template has no effect with --to gguf"),
        ("lora", ["--template", "mpt"], "--template has no effect with --to lora"),
        ("hf", ["--report", "r.json"], "--report has no effect without --check"),
        ("jax", ["--projector", "nope"], "leave out --projector"),
        ("jax", ["--seed", "0"], "leave out --projector and --seed"),
        ("jax", ["--seed", "-1"], "below 0"),
        ("hf", ["--vision-tower", "nope"], "leave out --vision-tower"),
        ("hf", ["--vision-tower", "tiny-clip"], "leave out --vision-tower"),
    ],
)
def test_an_option_without_effect_is_refused(source, tmp_path, capsys, to, option, said):
    assert main(["convert", str(source), str(tmp_path / "b"), "--to", to, *option]) == 2
    assert said in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_tower_that_cannot_be_used_is_refused_wherever_it_is_named(source):
    for command in ("inspect", "compare"):
        words = [command, str(source), *[str(source)] * (command == "compare")]
        assert main([*words, "--vision-tower", "tiny-clip"]) == 2


def test_the_projector_of_a_joined_model_is_the_usual_one(tmp_path):
    lm, clip = tiny.language_model(tmp_path / "lm"), tiny.clip(tmp_path / "clip")
    convert(lm, tmp_path / "a", Target("jax"), Options(vision_tower=clip))
    named = Options(vision_tower=clip, projector="mlp2x_gelu", seed=0)
    convert(lm, tmp_path / "b", Target("jax", shard_size=10**9), named)
    made = json.loads((tmp_path / "b/llava_jax.json").read_text())["provenance"]["command"]
    assert made.endswith("--projector mlp2x_gelu --seed 0 --shard-size 1000000000")
    tiny.same_tensors(tmp_path / "a", tmp_path / "b")
    for seed, kind in ((-1, None), (None, "mlp99999999x_gelu"), (None, "mlp2x_gelu\n")):
        with pytest.raises((WeightError, ConfigError), match="seed|is unknown"):
            convert(
                lm, tmp_path / "c", Target("jax"), Options(None, clip, projector=kind, seed=seed)
            )
    assert LlavaConfig(projector="mlp10x_gelu").projector_depth == 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("tower", "fodler"), ("layout", "hf6"), ("dtype", "fp61"), ("shard_size", "5GB"), ("shard_size", 0)],
)  # fmt: skip
def test_a_mistyped_field_of_a_target_is_refused(field, value):
    with pytest.raises(WeightError, match=str(value)):
        Target("original", **{field: value})


def test_a_base_is_called_by_the_folder_that_it_is(tmp_path, monkeypatch):
    (tmp_path / "Llava@home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "Llava@home")
    monkeypatch.chdir(tmp_path / "Llava@home")
    assert beside._names(".") == {"llava"}
    assert beside._names("../link") == {"llava", "link"}
    assert beside._names("someone/llava-7b@main") == {"llava-7b"}


def test_projector_checkpoints_are_found_by_number(tmp_path):
    from llava_jax.convert.source import projector_file

    (tmp_path / "mm_projector").mkdir()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best1", "checkpoint-²"):
        (tmp_path / "mm_projector" / f"{name}.bin").touch()
    found = projector_file(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-10.bin"


def test_an_adapter_is_checked_over_the_base_it_names(tmp_path):
    """Without --base: what is written is read back over the base of the source."""
    base = tiny.save(tmp_path / "base", "hf", tiny.ORIGINAL)
    whole = tiny.save(tmp_path / "jax", "jax", tiny.lora())
    adapter = tmp_path / "elsewhere/adapter"
    convert(whole, adapter, Target("peft"), Options(base=base))
    words = ["convert", str(adapter), str(tmp_path / "out"), "--to", "peft", "--check"]
    assert main(words) == 0
