"""Checkpoints that go through this package come back byte for byte."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_jax.convert import Options, Target, convert, load_checkpoint, save_checkpoint
from llava_jax.convert.io import folder as folders
from llava_jax.errors import WeightError
from tests.conftest import SHARED, shared
from tests.convert import tiny

GOLDEN = SHARED / "golden/model"
PICKLE = Options(allow_pickle=True)


def chain(start, *steps, folder):
    """start -> steps[0] -> steps[1] ...; the last folder."""
    for i, to in enumerate(steps):
        target = to if isinstance(to, Target) else Target(to)
        convert(start, folder / str(i), target, PICKLE)
        start = folder / str(i)
    return start


def golden_folders(pattern: str) -> list[str]:
    """model/folder of each golden folder that holds `pattern`; one, which then skips, without any."""
    found = sorted({p.parent for p in GOLDEN.glob(pattern)})
    return [str(p.relative_to(GOLDEN)) for p in found] or ["main/llava"]


def golden_models() -> list[str]:
    return golden_folders("*/hf/config.json") + golden_folders("*/llava/config.json")


@pytest.mark.parametrize("model", golden_models())
@pytest.mark.parametrize("way", ["jax", "hf", "hf jax", "jax hf"])
def test_golden(model, way, tmp_path):
    source = shared(f"golden/model/{model}")
    settings = json.loads((source / "config.json").read_text())
    if "hf" in way and settings.get("mm_projector_type") == "linear":
        pytest.skip("Hugging Face has no linear projector")
    if way == "hf" and model.endswith("hf"):
        way = "original jax"
    home = "hf" if model.endswith("hf") else "original"
    back = chain(source, *way.split(), home, folder=tmp_path)
    if way == "original jax":  # 64 rows were dropped on the way, and come back as mean rows
        ours, theirs = load_checkpoint(back), load_checkpoint(source)
        kept = settings["image_token_index"]
        for name, value in theirs.params.items():
            rows = kept if name in ("language.embed.embedding",) else None
            if name != "language.head.kernel":
                assert np.array_equal(ours.params[name][:rows], value[:rows]), name
        return
    tiny.same_tensors(source, back)
    assert json.loads((back / "config.json").read_text()) == settings
    held = folders.read_folder(source, allow_pickle=True)[0]
    if not any("vision_tower" in name for name in held):
        tiny.same_tensors(source.parent / "vision_tower", back / "vision_tower")


@pytest.mark.parametrize("adapter", golden_folders("*/*/adapter_config.json"))
def test_golden_lora_pair(adapter, tmp_path):
    source = shared(f"golden/model/{adapter}")
    back = chain(source, "jax", "lora", folder=tmp_path)
    for path in sorted(source.iterdir()):
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((back / path.name).read_text())
        else:
            same_file(path, back / path.name)


def same_file(a, b):
    one, other = folders.read_file(a, True), folders.read_file(b, True)
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert np.array_equal(one[name].read(), other[name].read()), name


@pytest.mark.parametrize("stage1", golden_folders("*/stage1/mm_projector.bin"))
def test_golden_projector(stage1, tmp_path):
    folder = shared(f"golden/model/{stage1}").parent
    base = "base_llm" if (folder / "base_llm").exists() else "llava"
    options = Options(allow_pickle=True, base=folder / base)
    convert(folder / "stage1", tmp_path / "jax", Target("jax"), options)
    convert(tmp_path / "jax", tmp_path / "back", Target("projector"))
    same_file(folder / "stage1/mm_projector.bin", tmp_path / "back/mm_projector.bin")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["hf", "hf5", "hf5_memory", "hf4_memory"])
def test_hugging_face_layouts(layout, dtype, tmp_path):
    source = tiny.save(tmp_path / "a", "hf", layout=layout, dtype=dtype)
    tiny.same_tensors(source, chain(source, "jax", "hf", folder=tmp_path))


def test_a_vocabulary_without_the_added_rows(tmp_path):
    """Published files exist with 32000 rows, where <image> has an id but no row."""
    folder = tiny.save(tmp_path / "a", "hf")
    from safetensors.numpy import load_file, save_file

    state = load_file(folder / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = state[name][:90]
    save_file(state, folder / "model.safetensors")
    data = json.loads((folder / "config.json").read_text())
    data["text_config"]["vocab_size"] = 90
    (folder / "config.json").write_text(json.dumps(data))
    back = chain(folder, "jax", "hf", folder=tmp_path)
    tiny.same_tensors(folder, back)
    assert json.loads((back / "config.json").read_text()) == data


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_original_projectors(projector, tmp_path):
    config = replace(tiny.ORIGINAL, projector=projector)
    source = tiny.save(tmp_path / "a", "original", config)
    back = chain(source, "jax", "original", folder=tmp_path)
    assert tiny.files(source).keys() == tiny.files(back).keys()
    tiny.same_tensors(source, back)
    tiny.same_tensors(source / "vision_tower", back / "vision_tower")


def test_settings_survive_every_format(tmp_path):
    config = replace(tiny.ORIGINAL, template="llava_v1", max_length=77, feature_select="cls_patch")
    source = tiny.save(tmp_path / "a", "jax", config)
    for i, to in enumerate(("hf", "original", "jax")):
        convert(source, tmp_path / str(i), Target(to))
        source = tmp_path / str(i)
        loaded = load_checkpoint(source)
        config = loaded.config
        assert (config.max_length, config.feature_select) == (77, "cls_patch"), to
    assert config.language.vocab_size == tiny.ORIGINAL.language.vocab_size


@pytest.mark.parametrize("to", ["jax", "hf", "original"])
def test_two_runs_write_the_same_files(to, tmp_path):
    tokenizer = tiny.tokenizer(tmp_path / "t")
    source = tiny.save(tmp_path / "a", "jax", tiny.TEXT, tokenizer=tokenizer)
    for name in ("one", "two"):
        convert(source, tmp_path / name, Target(to, shard_size=20_000))
    one, two = tiny.files(tmp_path / "one"), tiny.files(tmp_path / "two")
    assert len(one) > 5
    assert one == two


def test_buffers_and_a_full_clip_come_back(tmp_path):
    source = tiny.save(tmp_path / "a", "hf", shard_size=1 << 40)
    from safetensors.numpy import load_file, save_file

    state = load_file(source / "model.safetensors")
    state["vision_tower.vision_model.embeddings.position_ids"] = np.arange(5)[None]
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    save_file(state, source / "model.safetensors")
    tiny.same_tensors(source, chain(source, "jax", "hf", folder=tmp_path))


def test_added_rows_are_the_mean_row_and_go_again(tmp_path):
    checkpoint = tiny.checkpoint()
    save_checkpoint(checkpoint, tmp_path / "hf", to="hf")
    loaded = load_checkpoint(tmp_path / "hf")
    embed = loaded.params["language.embed.embedding"]
    assert embed.shape[0] == 128
    want = checkpoint.params["language.embed.embedding"].astype(np.float64).mean(0)
    np.testing.assert_allclose(embed[90:], np.broadcast_to(want, (38, 32)), rtol=1e-6)
    assert np.array_equal(embed[:90], checkpoint.params["language.embed.embedding"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_casting(dtype, tmp_path):
    source = tiny.save(tmp_path / "a", "jax")
    convert(source, tmp_path / "b", Target("hf"), Options(dtype=dtype))
    loaded = load_checkpoint(tmp_path / "b")
    kinds = {p.dtype.name for p in loaded.params.values()}
    assert kinds == {{"fp16": "float16", "bf16": "bfloat16"}[dtype]}
    assert json.loads((tmp_path / "b/config.json").read_text())["torch_dtype"] in kinds


def test_mixed_types_are_cast_only_when_asked(tmp_path):
    source = tiny.save(tmp_path / "a", "hf")
    from safetensors.numpy import load_file, save_file

    name = "language_model.model.norm.weight"
    state = load_file(source / "model.safetensors")
    half = state[name].astype(np.float16)
    save_file(state | {name: half}, source / "model.safetensors")
    for dtype in (None, "fp32"):
        with pytest.raises(WeightError, match=name):
            load_checkpoint(source, dtype=dtype)
    loaded = load_checkpoint(source, dtype="fp32", mixed=True)
    assert np.array_equal(loaded.params["language.norm.scale"], half.astype(np.float32))
    with pytest.raises(WeightError, match="--dtype"):
        load_checkpoint(source, mixed=True)


def test_a_value_that_does_not_fit_is_refused(tmp_path):
    made = tiny.checkpoint()
    made.params["language.norm.scale"][3] = 1e6
    save_checkpoint(made, tmp_path / "a")
    with pytest.raises(WeightError, match=r"language\.norm\.scale.*float16"):
        load_checkpoint(tmp_path / "a", dtype="fp16")
