"""adapter_config.json: variants of LoRA that would change the result are right or refused by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_jax.cli import main
from llava_jax.convert import Options, Target, convert, load_checkpoint
from llava_jax.convert.formats import adapter_config
from llava_jax.errors import WeightError
from tests.convert import tiny

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    "value", [None, True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"]
)
def test_beginnings_that_leave_the_base_alone(value):
    lora = adapter_config.lora_config(PLAIN | {"init_lora_weights": value})
    assert (lora.rank, lora.scale) == (4, 2.0)


@pytest.mark.parametrize(
    "value",
    ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "loftq", "new", 3],
)
def test_beginnings_that_change_the_base_are_refused(value):
    with pytest.raises(WeightError, match=r"adapter_config\.json: init_lora_weights") as caught:
        adapter_config.lora_config(PLAIN | {"init_lora_weights": value})
    assert caught.value.fix
    kinds = ("pissa", "olora", "corda", "lora_ga")
    converts = str(value).lower().startswith(kinds)
    assert ("path_initial_model_for_weight_conversion" in caught.value.fix) == converts


REFUSED = {
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "lora_bias": True,
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "use_something_new": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "layers_to_transform": 0,
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": {"num_samples": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "peft_type": "IA3",
}


@pytest.mark.parametrize("key", REFUSED)
def test_variants_are_refused_by_name(key):
    value = REFUSED[key] or {"a": 1}
    with pytest.raises(WeightError, match=rf"adapter_config\.json: {key} "):
        adapter_config.lora_config(PLAIN | {key: value})


def test_what_peft_writes_for_a_plain_adapter_is_read():
    peft = pytest.importorskip("peft")
    for more in ({}, {"use_rslora": True}, {"velora_config": {}}, {"exclude_modules": ["k_proj"]}):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **more)
        settings = json.loads(json.dumps(config.to_dict(), default=list))
        lora = adapter_config.lora_config(settings)
        assert lora.scale == (4.0 if "use_rslora" in more else 2.0)


def test_every_variant_that_peft_knows_is_decided():
    """A field that PEFT marks as a variant is on one of the lists, or only trains."""
    peft = pytest.importorskip("peft")
    import dataclasses

    known = {"velora_config", "use_dora"}  # VeLoRA compresses what is kept for the backward pass
    for field in dataclasses.fields(peft.LoraConfig):
        if field.metadata.get("is_lora_variant") and field.name not in known:
            with pytest.raises(WeightError, match=field.name):
                adapter_config.lora_config(PLAIN | {field.name: {"a": 1}})


# On the command line ----------------------------------------------------------------------------


@pytest.fixture
def peft_adapter(tmp_path):
    """(adapter folder, its Hugging Face base) of PEFT's names."""
    pytest.importorskip("torch")
    base = tiny.save(tmp_path / "base", "hf", tiny.ORIGINAL)
    tiny.save(tmp_path / "jax", "jax", tiny.lora())
    convert(tmp_path / "jax", tmp_path / "adapter", Target("peft"), Options(base=base))
    return tmp_path / "adapter", base


def edit(folder, **more):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


@pytest.mark.parametrize("to", ["hf", "jax", "gguf"])
def test_a_refusal_writes_nothing(to, peft_adapter, tmp_path, capsys):
    folder, _ = peft_adapter
    edit(folder, init_lora_weights="pissa_niter_16")
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", to, "--merge"]) == 2
    error = capsys.readouterr().err
    assert "adapter_config.json: init_lora_weights 'pissa_niter_16'" in error
    assert "path_initial_model_for_weight_conversion" in error
    assert not (tmp_path / "out").exists()


def test_a_pissa_adapter_that_peft_has_converted_is_right(tmp_path):
    """What the refusal advises: PEFT itself answers the same before and after our merge."""
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlavaForConditionalGeneration

    base = tiny.save(tmp_path / "base", "hf", tiny.ORIGINAL)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=targets)
    tuned = peft.get_peft_model(model, config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "initial")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter += 0.01 * torch.sin(torch.arange(parameter.numel()).view_as(parameter))
    tuned.save_pretrained(tmp_path / "raw")
    with pytest.raises(WeightError, match="init_lora_weights"):
        load_checkpoint(tmp_path / "raw", base=base)
    tuned.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    convert(tmp_path / "adapter", tmp_path / "ours", Target("hf"), Options(base=base, merge=True))
    theirs = tuned.merge_and_unload().model.language_model.layers[1].self_attn.v_proj.weight
    got = load_checkpoint(tmp_path / "ours").params["language.layers.attn.v.kernel"][1]
    np.testing.assert_allclose(got, theirs.detach().numpy().T, atol=1e-5)


def test_the_shipped_model_is_named_by_its_folder():
    from llava_jax.convert.io import hub

    assert adapter_config.base_name("tiny") == str(hub.SHIPPED["tiny"].resolve())
    assert adapter_config.base_name("someone/llava") == "someone/llava"


def test_a_module_that_is_listed_but_not_there(peft_adapter):
    folder, base = peft_adapter
    edit(folder, modules_to_save=["multi_modal_projector", "embed_tokens"])
    with pytest.raises(WeightError, match="modules_to_save lists 'embed_tokens'"):
        load_checkpoint(folder, base=base)


def test_the_base_of_a_revision_is_that_revision(peft_adapter, monkeypatch):
    from llava_jax.convert.io import hub

    folder, base = peft_adapter
    edit(folder, base_model_name_or_path="someone/llava", revision="v2")
    asked = []
    resolve = hub.resolve
    monkeypatch.setattr(
        hub, "resolve", lambda n, a=False: base if asked.append(n) or "/llava" in str(n) else resolve(n, a)
    )  # fmt: skip
    load_checkpoint(folder)
    assert "someone/llava@v2" in asked


def test_the_base_is_named_and_peft_loads_both(peft_adapter, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlavaForConditionalGeneration

    folder, base = peft_adapter
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base.resolve())
    assert load_checkpoint(folder).config.lora  # with no --base
    config = peft.PeftConfig.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        config.base_model_name_or_path, dtype=torch.float32
    )
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    theirs = merged.model.language_model.layers[1].mlp.down_proj.weight.detach().numpy().T
    got = load_checkpoint(folder, merge=True).params["language.layers.mlp.down.kernel"][1]
    np.testing.assert_allclose(got, theirs, atol=1e-5)
    # An adapter of PEFT's that is written again keeps its tensors and names the base that was given.
    again = Target("peft")
    convert(folder, tmp_path / "again", again, Options(base=base))
    one, two = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert all(np.array_equal(one[n], two[n]) for n in one.keys() | two.keys())


def test_a_base_that_peft_cannot_load_is_said(tmp_path, caplog):
    pytest.importorskip("torch")
    source = tiny.save(tmp_path / "jax", "jax", tiny.lora())
    bases = {"original": tiny.save(tmp_path / "o", "original"), "language": tiny.language_model(tmp_path / "l")}  # fmt: skip
    for kind, base in bases.items():
        caplog.clear()
        convert(source, tmp_path / f"to_{kind}", Target("peft"), Options(base=base))
        assert "convert the base with --to hf" in caplog.text
        text = (tmp_path / f"to_{kind}" / "adapter_config.json").read_text()
        named = json.loads(text)["base_model_name_or_path"]
        assert named == (None if kind == "language" else str(base.resolve()))
