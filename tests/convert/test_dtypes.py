"""Types: config.json says that of the weights, and a sum is rounded once."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.cli import main
from llava_jax.convert import Checkpoint, Options, Target, convert, load_checkpoint, save_checkpoint
from llava_jax.convert.io.lazy import float_dtype
from llava_jax.errors import WeightError
from llava_jax.params import is_run
from tests.convert import tiny

NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def said(folder) -> set:
    """Every dtype that the config.json files below `folder` (but not in our side folder) name."""
    found = set()

    def visit(data):
        for key, value in data.items():
            if key in ("dtype", "torch_dtype"):
                found.add(value)
            elif isinstance(value, dict):
                visit(value)

    for path in folder.rglob("config.json"):
        visit(json.loads(path.read_text()))
    return found


def respelled(folder, spelling):
    """The config.json with its dtype under another name, or without one."""
    path = folder / "config.json"

    def visit(data):
        out = {k: visit(v) if isinstance(v, dict) else v for k, v in data.items()}
        value = out.pop("torch_dtype", None)
        return out | ({spelling: value} if spelling and value else {})

    path.write_text(json.dumps(visit(json.loads(path.read_text()))))
    return folder


# What config.json says --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("spelling", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("kind", ["hf", "original", "jax"])
@pytest.mark.parametrize("to", ["hf", "original"])
def test_a_cast_shows_in_config_json(dtype, spelling, kind, to, tmp_path):
    config = tiny.ORIGINAL
    source = tiny.save(tmp_path / "a", kind, config, dtype="float16")
    if kind != "jax":
        respelled(source, spelling)
    words = ["convert", str(source), str(tmp_path / "b"), "--to", to, "--dtype", dtype]
    assert main(words) == 0
    assert said(tmp_path / "b") == {NAMES[dtype]}
    assert {v.dtype.name for v in load_checkpoint(tmp_path / "b").params.values()} == {NAMES[dtype]}
    # And on, without --dtype: the words of the first source no longer hold.
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "jax"]) == 0
    assert main(["convert", str(tmp_path / "c"), str(tmp_path / "d"), "--to", to]) == 0
    assert said(tmp_path / "d") == {NAMES[dtype]}


@pytest.mark.parametrize("to", ["hf", "original"])
def test_trained_parameters_in_float32(to, tmp_path):
    """A training's export: masters in float32 over what was read in float16."""
    source = load_checkpoint(tiny.save(tmp_path / "a", to, tiny.ORIGINAL, dtype="float16"))
    params = {n: p.astype(np.float32) for n, p in source.params.items()}
    save_checkpoint(replace(source, params=params), tmp_path / "export")
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "b"), "--to", to]) == 0
    assert said(tmp_path / "b") == {"float32"}


def test_a_part_trained_in_float32_is_not_rounded_by_transformers(tmp_path, caplog):
    """Stage 1: a projector in float32 over a frozen model in bfloat16."""
    transformers = pytest.importorskip("transformers")
    params = tiny.random_params(tiny.ORIGINAL)
    bf16 = float_dtype("bf16")
    mixed = {n: p if n.startswith("projector") else p.astype(bf16) for n, p in params.items()}
    save_checkpoint(Checkpoint(tiny.ORIGINAL, mixed), tmp_path / "export")
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "b"), "--to", "hf"]) == 0
    assert "bfloat16 and float32" in caplog.text
    assert said(tmp_path / "b") == {"float32"}
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "b", dtype="auto")
    loaded = model.model.multi_modal_projector.linear_1.weight.detach().numpy()
    assert np.array_equal(loaded, params["projector.linear_0.kernel"].T)
    words = [str(tmp_path / "export"), str(tmp_path / "c"), "--to", "hf", "--dtype", "bf16"]
    assert main(["convert", *words]) == 0
    assert said(tmp_path / "c") == {"bfloat16"}


@pytest.mark.parametrize("dtype", NAMES)
def test_transformers_loads_the_type_of_the_file(dtype, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = tiny.save(tmp_path / "a", "hf", dtype="float16")
    assert main(["convert", str(source), str(tmp_path / "b"), "--to", "hf", "--dtype", dtype]) == 0
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "b", dtype="auto")
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{NAMES[dtype]}"}


def test_what_a_source_says_stays_unless_it_would_round(tmp_path):
    source = tiny.save(tmp_path / "a", "hf", dtype="float16")
    path = source / "config.json"
    for declared, want in (("float32", "float32"), ("bfloat16", "float16"), (None, None)):
        data = json.loads(path.read_text())
        for part in (data, data["text_config"], data["vision_config"]):
            part["torch_dtype"] = declared
        path.write_text(json.dumps(data))
        out = tmp_path / str(declared)
        convert(source, out, Target("hf"))
        assert said(out) == {want}
        assert (json.loads((out / "config.json").read_text()) == data) == (declared == want)


def test_a_config_without_a_dtype_gets_none(tmp_path):
    source = respelled(tiny.save(tmp_path / "a", "hf", dtype="float16"), None)
    convert(source, tmp_path / "b", Target("hf"), Options(dtype="bf16"))
    assert said(tmp_path / "b") == set()


@pytest.mark.parametrize("to", ["projector", "lora"])
def test_parts_say_the_type_of_their_own_tensors(to, tmp_path):
    pytest.importorskip("torch")
    source = tiny.save(tmp_path / "a", "jax", tiny.lora(), dtype="float16")
    for dtype, name in NAMES.items():
        words = [str(source), str(tmp_path / dtype), "--to", to, "--dtype", dtype]
        assert main(["convert", *words]) == 0
        assert said(tmp_path / dtype) == {name}


@pytest.mark.parametrize("to", ["jax", "hf", "original"])
def test_a_tower_that_was_trained_but_for_the_layers_that_are_not_run(to, tmp_path):
    """Training's export: float32 up to the feature layer, and the files' float16 after it."""
    params = tiny.random_params(tiny.ORIGINAL, dtype="float16")
    params |= {
        n: p.astype(np.float32) for n, p in params.items() if n.startswith("vision.") and is_run(n)
    }
    save_checkpoint(Checkpoint(tiny.ORIGINAL, params), tmp_path / "export", to=to)
    for name, value in load_checkpoint(tmp_path / "export").params.items():
        assert value.dtype == params[name].dtype, name


# Sums -------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    """(folder, its state, the kernel under it) of a float32 adapter on a float16 model."""
    base = tiny.save(tmp_path / "base", "hf", dtype="float16")
    rng, state = np.random.default_rng(0), {}
    for i in range(2):
        at = f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj"
        state[f"{at}.lora_A.weight"] = 0.02 * rng.normal(size=(4, 32)).astype(np.float32)
        state[f"{at}.lora_B.weight"] = 0.02 * rng.normal(size=(40, 4)).astype(np.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    settings |= {"target_modules": r".*language_model.*\.q_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    kernel = load_checkpoint(base).params["language.layers.attn.q.kernel"][1].astype(np.float32)
    a, b = state[f"{at}.lora_A.weight"], state[f"{at}.lora_B.weight"]
    return folder, kernel + 2 * (b @ a).T


def kernel_of(folder):
    return load_checkpoint(folder).params["language.layers.attn.q.kernel"][1]


@pytest.mark.parametrize("to", ["jax", "hf"])
@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("dtype", [None, *NAMES])
def test_a_merge_is_rounded_once(to, merge, dtype, adapter, tmp_path):
    folder, want = adapter
    if to == "jax" and not merge:
        pytest.skip("the adapter stays apart")
    words = ["convert", str(folder), str(tmp_path / "b"), "--to", to]
    words += ["--merge"] * merge + (["--dtype", dtype] if dtype else [])
    assert main(words) == 0
    have = kernel_of(tmp_path / "b")
    assert have.dtype.name == NAMES[dtype or "fp16"]
    if dtype == "fp32":
        assert np.abs(have - want).max() < 1e-7
    # A sum that lies between two numbers of the type may go either way, by its last float32 bit.
    steps = want.astype(have.dtype).view(f"i{have.itemsize}") - have.view(f"i{have.itemsize}")
    assert np.abs(steps).max() <= 1
    assert dtype == "fp32" or (steps == 0).mean() > 0.99


def test_peft_merges_to_the_same(adapter, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import LlavaForConditionalGeneration

    folder, _ = adapter
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    theirs = merged.model.language_model.layers[1].self_attn.q_proj.weight.detach().numpy().T
    convert(folder, tmp_path / "b", Target("hf"), Options(merge=True, dtype="fp32"))
    assert np.abs(kernel_of(tmp_path / "b") - theirs).max() < 1e-7


def test_adapters_on_the_tower_are_summed_before_the_cast(adapter, tmp_path):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    at = "base_model.model.model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    a, b = np.full((4, 24), 0.01, np.float32), np.full((24, 4), 0.013, np.float32)
    save_file(load_file(path) | {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, path)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    name = "vision.layers.attn.q.kernel"
    want = load_checkpoint(base).params[name].astype(np.float32)
    want[1] += 2 * (b @ a).T
    got = load_checkpoint(folder, dtype="fp32", merge=True).params[name]
    assert np.abs(got - want).max() < 1e-7


def test_a_trained_adapter_is_merged_before_the_cast(tmp_path):
    """A training's export to bfloat16: the float32 sum is rounded, not the base before it."""
    params = tiny.random_params(tiny.lora())
    save_checkpoint(Checkpoint(tiny.lora(), params), tmp_path / "jax")
    for to in ("hf", "original"):
        words = [str(tmp_path / "jax"), str(tmp_path / to), "--to", to, "--dtype", "bf16"]
        assert main(["convert", *words]) == 0
        save_checkpoint(load_checkpoint(tmp_path / "jax"), tmp_path / f"{to}2", to=to, dtype="bf16")
        for folder in (tmp_path / to, tmp_path / f"{to}2"):
            got = load_checkpoint(folder).params["language.layers.mlp.up.kernel"]
            at = "language.layers.mlp.up"
            update = np.float32(2.0) * (params[f"{at}.lora_a"] @ params[f"{at}.lora_b"])
            want = (params[f"{at}.kernel"] + update).astype(got.dtype)
            assert (got.view(np.uint16) == want.view(np.uint16)).mean() > 0.999


def test_a_sum_that_does_not_fit_is_refused(adapter, tmp_path):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    save_file({n: v * 1e4 for n, v in load_file(path).items()}, path)
    with pytest.raises(WeightError, match="do not fit into float16"):
        convert(folder, tmp_path / "b", Target("hf"))
    convert(folder, tmp_path / "b", Target("hf"), Options(dtype="fp32"))


def test_delta_and_new_projector_are_made_in_float32(tmp_path):
    base = tiny.language_model(tmp_path / "base")
    full = tiny.random_params(tiny.ORIGINAL, seed=3)
    under = tiny.random_params(tiny.ORIGINAL)
    delta = {n: p - under[n] if n.startswith("language.") else p for n, p in full.items()}
    delta["language.norm.scale"] = np.full(32, 0.01, np.float32)
    delta = {n: p.astype(np.float16) for n, p in delta.items()}
    save_checkpoint(Checkpoint(tiny.ORIGINAL, delta), tmp_path / "delta", to="original")
    name = "language.layers.mlp.up.kernel"
    got = load_checkpoint(tmp_path / "delta", base=base, dtype="fp32").params[name]
    assert np.array_equal(got, delta[name].astype(np.float32) + under[name])
    clip = tiny.clip(tmp_path / "clip")
    wide = load_checkpoint(base, vision_tower=clip, dtype="fp32").params[
        "projector.linear_0.kernel"
    ]
    assert wide.dtype == np.float32
    assert not np.array_equal(wide, wide.astype(np.float16).astype(np.float32))
