"""Which files of a folder are read, and which folders are refused by name."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.cli import main
from llava_jax.convert import load_checkpoint
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import torch_file
from llava_jax.convert.io.safetensors import read
from llava_jax.convert.source import identify
from llava_jax.errors import WeightError
from tests.convert import tiny

KEY = "language.norm.scale"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


def save(path, seed, **kwargs):
    return tiny.save(path, "hf", seed=seed, **kwargs)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """The same model after two trainings, each whole, in shards and as .bin, to be thrown together."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("saves")
    for seed in (0, 1):
        whole = save(root / f"whole{seed}", seed)
        save(root / f"shards{seed}", seed, shard_size=40_000)
        state = read(whole / "model.safetensors")
        for name, parts in (("bin", [state]), ("bins", split(state))):
            folder = root / f"{name}{seed}"
            folder.mkdir()
            files = {f"pytorch_model-{i:05}-of-00002.bin": p for i, p in enumerate(parts, 1)}
            files = files if len(parts) > 1 else {"pytorch_model.bin": state}
            for file, part in files.items():
                torch_file.write(folder / file, part)
            if len(parts) > 1:
                table = {n: f for f, part in files.items() for n in part}
                (folder / BIN_INDEX).write_text(json.dumps({"weight_map": table}))
    return root


def split(state):
    names = sorted(state)
    return [{n: state[n] for n in half} for half in (names[:20], names[20:])]


def together(saves, folder, *parts, drop=()):
    """The files of several saves in one folder, those of the first on top."""
    for part in reversed(parts):
        shutil.copytree(saves / part, folder, dirs_exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(saves / "whole0" / name, folder)
    shutil.rmtree(folder / "llava_jax", ignore_errors=True)
    for pattern in drop:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


CASES = {
    "index without its shards": (["whole0", "shards1"], ["model-*"], INDEX),
    "index and its shards": (["whole0", "shards1"], [], INDEX),
    "shards without their index": (["whole0", "shards1"], [INDEX], "model-00001"),
    "whole .bin": (["whole0", "bin1"], [], "pytorch_model.bin"),
    "sharded .bin": (["whole0", "bins1"], [], "pytorch_model-00001-of-00002.bin"),
    "index of .bin alone": (["whole0", "bins1"], ["pytorch_model-*"], None),
    "shards over a whole .bin": (["shards0", "bin1"], [], "pytorch_model.bin"),
    "both indexes": (["shards0", "bins1"], [], "pytorch_model-00001-of-00002.bin"),
    "index of .bin beside a whole .bin": (["bin0", "bins1"], ["pytorch_model-*"], BIN_INDEX),
    "shards and index of .bin beside it": (["bin0", "bins1"], [], BIN_INDEX),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_over_is_not_read(case, saves, tmp_path, caplog):
    parts, drop, said = CASES[case]
    folder = together(saves, tmp_path / "x", *parts, drop=drop)
    params = load_checkpoint(folder, allow_pickle=True).params
    assert np.array_equal(params[KEY], tiny.random_params(seed=0)[KEY])
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert bool(warned) == bool(said)
    assert all(str(folder) in w and "as transformers does" in w for w in warned)
    assert not said or said in warned[0]


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_the_same_files(case, saves, tmp_path):
    transformers = pytest.importorskip("transformers")
    parts, drop, _ = CASES[case]
    folder = together(saves, tmp_path / "x", *parts, drop=drop)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    theirs = model.model.language_model.norm.weight.detach().numpy()
    assert np.array_equal(load_checkpoint(folder, allow_pickle=True).params[KEY], theirs)


def test_an_index_of_the_one_file_is_checked_against_it(tmp_path):
    folder = save(tmp_path / "a", 0)
    table = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    assert not folders.weight_files(folder)[1]
    load_checkpoint(folder)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": table | {"model.more": "model.safetensors"}})
    )
    with pytest.raises(WeightError, match=r"model\.more"):
        load_checkpoint(folder)


def test_a_malformed_index_beside_the_whole_file_is_not_read(tmp_path, caplog):
    folder = save(tmp_path / "a", 0)
    (folder / INDEX).write_text("{")
    load_checkpoint(folder)
    assert INDEX in caplog.text


def test_a_second_adapter_file_is_named(tmp_path, caplog):
    pytest.importorskip("torch")
    base = tiny.save(tmp_path / "base", "original")
    pair = tiny.save(tmp_path / "pair", "lora", tiny.lora())
    (pair / "adapter_model.bin").write_bytes(b"of another run")
    load_checkpoint(pair, base=base, allow_pickle=True, vision_tower=base / "vision_tower")
    assert "adapter_model.safetensors is read, adapter_model.bin is not" in caplog.text


# Pickles ----------------------------------------------------------------------------------------


def test_a_pickle_is_refused_with_its_folder_and_the_option(saves, tmp_path, capsys):
    for parts, file in ((["bin0"], "pytorch_model.bin"), (["bins0"], "pytorch_model-00001-of-00002.bin")):  # fmt: skip
        folder = together(saves, tmp_path / parts[0], *parts)
        assert main(["inspect", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{folder / file} is a pickle file" in error
        assert "--allow-pickle" in error
    # The hub's are not fetched without the option: the index alone is there.
    for path in folder.glob("pytorch_model-*"):
        path.unlink()
    assert main(["inspect", str(folder)]) == 2
    assert "--allow-pickle" in capsys.readouterr().err


# Quantised --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config fp8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config of 4 bits"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization of 4 bits"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "quantization_config gptq"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["hf", "original", "llama", "clip"])
def test_a_quantised_model_is_named(settings, said, to, tmp_path, capsys):
    make = {"llama": tiny.language_model, "clip": tiny.clip}
    folder = make[to](tmp_path / "q") if to in make else tiny.save(tmp_path / "q", to)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    if "text_config" in settings:
        settings = {"text_config": (data.get("text_config") or {}) | settings["text_config"]}
    path.write_text(json.dumps(data | settings))
    model = tiny.language_model(tmp_path / "lm") if to == "clip" else folder
    words = ["inspect", str(model), *(["--vision-tower", str(folder)] if to != "hf" else [])]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"config.json: {said} is not supported (use the 16-bit weights)" in error


def test_a_configuration_that_quantises_nothing_is_no_hindrance(tmp_path):
    folder = save(tmp_path / "a", 0)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    plain = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    for settings in (None, {}, plain):
        path.write_text(json.dumps(data | {"quantization_config": settings}))
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("weight.absmax", "bitsandbytes"), ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("SCB", "bitsandbytes"), ("qweight", "GPTQ or AWQ"), ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "FP8"), ("W_q", "HQQ"),
    ],
)  # fmt: skip
def test_quantised_tensors_are_named_without_a_word_in_the_configuration(ending, said, tmp_path):
    folder = save(tmp_path / "a", 0)
    state = load_file(folder / "model.safetensors")
    name = f"language_model.model.layers.0.mlp.up_proj.{ending}"
    state[name] = np.zeros(8, np.uint8)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match="use the 16-bit weights") as caught:
        load_checkpoint(folder)
    assert name in str(caught.value)
    assert said in str(caught.value)


def test_integers_and_eight_bit_floats_in_place_of_weights(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    name = "language_model.model.layers.0.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.float8_e4m3fn):
        folder = save(tmp_path / str(dtype), 0)
        state = load_torch(folder / "model.safetensors")
        state[name] = state[name].to(dtype)
        save_torch(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightError, match="use the 16-bit weights") as caught:
            load_checkpoint(folder)
        assert name in str(caught.value)


def test_a_folder_without_weights_says_what_may_be_missing(tmp_path):
    """A tower of the hub that has a .bin alone, say."""
    (tmp_path / "config.json").write_text("{}")
    for opens in (lambda: folders.read_folder(tmp_path, False), lambda: identify(tmp_path)):
        with pytest.raises(WeightError, match="no weights.*--allow-pickle"):
            opens()


def test_gguf_is_not_read(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        assert main(["inspect", str(path)]) == 2
        assert "GGUF files are written, not read" in capsys.readouterr().err


def test_an_adapter_of_qlora_goes_over_the_plain_base(tmp_path, caplog):
    """Its config.json says how the base was held while training; no export of whole weights does."""
    pytest.importorskip("torch")
    base = tiny.save(tmp_path / "base", "original")
    pair = tiny.save(tmp_path / "pair", "lora", tiny.lora())
    path = pair / "config.json"
    held = {"quant_method": "bitsandbytes", "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}
    settings = {"quantization_config": held}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    words = [str(pair), str(tmp_path / "out"), "--to", "original", "--base", str(base)]
    words += ["--allow-pickle", "--vision-tower", str(base / "vision_tower")]
    assert main(["convert", *words]) == 0
    assert "over a base in 8 bits" in caplog.text
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    load_checkpoint(tmp_path / "out")
