"""The key table: every parameter has one place, and nothing is converted without its rule."""

from dataclasses import replace

import pytest

from llava_jax.cli import main
from llava_jax.config import LoraConfig
from llava_jax.convert.table import keys
from llava_jax.errors import WeightError
from llava_jax.params import linears, parameter_shapes
from tests.convert import tiny
from tests.test_params import VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", [keys.ORIGINAL, *keys.HF_LAYOUTS], ids=lambda x: x.name)
def test_every_parameter_has_one_place_in_every_layout(name, layout):
    config = VARIANTS[name]
    if layout.hf and config.projector != "mlp2x_gelu":
        pytest.skip("Hugging Face has only mlp2x_gelu")
    pairings = keys.pairings(layout, config)
    assert sorted(p.ours for p in pairings) == sorted(parameter_shapes(config))
    theirs = [t for p in pairings for t in p.theirs]
    assert len(set(theirs)) == len(theirs)


GROUPS = ("LANGUAGE", "LORA", "VISION", "VISION_LORA")


@pytest.mark.parametrize("group", GROUPS)
def test_every_rule_is_needed(group, monkeypatch):
    biased = replace(tiny.ORIGINAL.language, attention_bias=True)
    lora = LoraConfig(2, 4.0, dora=True, targets=tuple(linears(tiny.ORIGINAL)))
    config = replace(tiny.ORIGINAL, language=biased, lora=lora)
    rules = getattr(keys, group)
    for rule in rules:
        monkeypatch.setattr(keys, group, tuple(r for r in rules if r is not rule))
        with pytest.raises(WeightError, match=f"no rule for {rule.ours}"):
            keys.pairings(keys.ORIGINAL, config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: words that convert it} of a model with an adapter, in every format that is read."""
    made = tmp_path_factory.mktemp("keys")
    config = replace(tiny.TEXT, lora=LoraConfig(3, 6.0))
    tokenizer = tiny.tokenizer(made / "tokenizer")
    base = tiny.save(made / "original", "original", tiny.TEXT, tokenizer=tokenizer)
    tiny.save(made / "hf", "hf", tiny.TEXT, tokenizer=tokenizer)
    tiny.save(made / "jax", "jax", config, tokenizer=tokenizer)
    tiny.save(made / "lora", "lora", config)
    words = {kind: [str(made / kind), "--allow-pickle"] for kind in ("hf", "original", "jax")}
    tower = ["--vision-tower", str(base / "vision_tower")]
    return words | {"lora": [str(made / "lora"), "--base", str(base), "--allow-pickle", *tower]}


CONVERSIONS = {
    "LANGUAGE": [("hf", "jax"), ("original", "jax"), ("jax", "hf"), ("jax", "gguf")],
    "VISION": [("hf", "jax"), ("original", "jax"), ("jax", "original"), ("jax", "gguf")],
    "LORA": [("lora", "jax"), ("lora", "hf"), ("jax", "lora"), ("jax", "peft")],
}


@pytest.mark.parametrize(
    ("group", "kind", "to"), [(g, *pair) for g, pairs in CONVERSIONS.items() for pair in pairs]
)
def test_a_conversion_without_a_group_of_rules_fails(
    group, kind, to, folders, tmp_path, monkeypatch, capsys
):
    """LoRA's and GGUF's names come from this table too, and from nowhere else."""
    if to == "gguf":
        pytest.importorskip("gguf")
    if "lora" in (kind, to):
        pytest.importorskip("torch")
    out = tmp_path / "out"
    words = ["convert", *folders[kind], str(out), "--to", to]
    assert main(words) == 0, capsys.readouterr().err
    monkeypatch.setattr(keys, group, ())
    assert main([*words[:-3], str(tmp_path / "again"), "--to", to]) == 2
    assert not (tmp_path / "again").exists()
