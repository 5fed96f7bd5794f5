"""Models put together: CLIP + language model, projectors, adapters, deltas."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.convert import Options, Target, convert, load_checkpoint, save_checkpoint
from llava_jax.errors import WeightError
from tests.conftest import SHARED, shared
from tests.convert import tiny

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def parts(tmp_path):
    return tiny.language_model(tmp_path / "llm"), tiny.clip(tmp_path / "clip")


def params_of(folder, **options):
    return load_checkpoint(folder, allow_pickle=True, **options).params


# Joining ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "mlp3x_gelu"])
def test_join(parts, projector):
    llm, clip = parts
    joined = load_checkpoint(llm, vision_tower=clip, projector=projector, seed=3)
    assert joined.config.projector == projector
    want = tiny.random_params(tiny.ORIGINAL)
    for name, value in joined.params.items():
        if not name.startswith("projector."):
            assert np.array_equal(value, want[name]), name
    kernel = joined.params["projector.linear_0.kernel"]
    assert 0.8 * 24**-0.5 < np.abs(kernel).max() <= 24**-0.5
    again = params_of(llm, vision_tower=clip, projector=projector, seed=3)
    other = params_of(llm, vision_tower=clip, projector=projector, seed=4)
    assert np.array_equal(kernel, again["projector.linear_0.kernel"])
    assert not np.array_equal(kernel, other["projector.linear_0.kernel"])


def test_parts_alone_are_refused_with_the_way_out(parts):
    llm, clip = parts
    with pytest.raises(WeightError, match="vision-tower"):
        load_checkpoint(llm)
    with pytest.raises(WeightError, match="vision-tower"):
        load_checkpoint(clip)


def test_joined_and_exported_and_back(parts, tmp_path):
    llm, clip = parts
    options = Options(vision_tower=clip)
    convert(llm, tmp_path / "jax", Target("jax"), options)
    for to in ("hf", "original"):
        convert(tmp_path / "jax", tmp_path / to, Target(to))
        ours, back = load_checkpoint(tmp_path / "jax"), load_checkpoint(tmp_path / to)
        for name, value in ours.params.items():
            rows = tuple(slice(n) for n in value.shape)
            assert np.array_equal(back.params[name][rows], value), name


# Stage 1 ----------------------------------------------------------------------------------------


def test_projector_over_a_language_model_and_over_a_llava(parts, tmp_path):
    llm, clip = parts
    trained = tiny.checkpoint(tiny.ORIGINAL, seed=9)
    save_checkpoint(trained, tmp_path / "stage1", to="projector")
    full = tiny.save(tmp_path / "full", "original", seed=5)
    for base, tower, language in ((llm, clip, 0), (full, None, 5)):
        got = params_of(tmp_path / "stage1", base=base, vision_tower=tower)
        want = tiny.random_params(tiny.ORIGINAL, seed=language)
        for name, value in got.items():
            source = trained.params if name.startswith("projector.") else want
            assert np.array_equal(value, source[name]), name


def test_settings_of_a_part_hold_over_a_base_with_more_rows(pair, tmp_path):
    """Hugging Face's format adds rows; the published folders of it crop, and so did what lay over them."""
    crops = replace(tiny.ORIGINAL, image_aspect_ratio="square", template="mistral_instruct")
    base = load_checkpoint(tiny.save(tmp_path / "hf", "hf", crops, seed=5))
    assert base.config.language.vocab_size > crops.language.vocab_size
    tiny.save(tmp_path / "stage1", "projector")
    for part in (pair[0], tmp_path / "stage1"):
        got = load_checkpoint(part, allow_pickle=True, base=tmp_path / "hf")
        assert replace(got.config, lora=None) == replace(base.config, image_aspect_ratio="pad")
        name = "language.embed.embedding"
        assert np.array_equal(got.params[name], base.params[name])


def test_projector_needs_its_base(parts, tmp_path):
    save_checkpoint(tiny.checkpoint(tiny.ORIGINAL), tmp_path / "stage1", to="projector")
    with pytest.raises(WeightError, match="--base"):
        load_checkpoint(tmp_path / "stage1", allow_pickle=True)
    wider = replace(
        tiny.ORIGINAL, language=replace(tiny.ORIGINAL.language, width=40, head_width=10)
    )
    base = tiny.language_model(tmp_path / "wide", wider)
    with pytest.raises(WeightError, match="width"):
        load_checkpoint(tmp_path / "stage1", allow_pickle=True, base=base, vision_tower=parts[1])


@pytest.mark.parametrize("rows", ["all", "new"])
def test_start_and_end_tokens(parts, tmp_path, rows):
    """mm_use_im_start_end: two tokens more than the base; the file brings their embeddings."""
    torch = pytest.importorskip("torch")
    llm, clip = parts
    config = replace(
        tiny.ORIGINAL,
        use_im_start_end=True,
        language=replace(tiny.ORIGINAL.language, vocab_size=92),
    )
    trained = tiny.checkpoint(config, seed=9)
    save_checkpoint(trained, tmp_path / "stage1", to="projector")
    embed = trained.params["language.embed.embedding"]
    if rows == "new":
        path = tmp_path / "stage1/mm_projector.bin"
        state = torch.load(path)
        state["model.embed_tokens.weight"] = torch.from_numpy(embed[90:].copy())
        torch.save(state, path)
        embed = np.concatenate(
            [tiny.random_params(tiny.ORIGINAL)["language.embed.embedding"], embed[90:]]
        )
    got = load_checkpoint(tmp_path / "stage1", allow_pickle=True, base=llm, vision_tower=clip)
    assert got.config.use_im_start_end
    assert np.array_equal(got.params["language.embed.embedding"], embed)
    head = got.params["language.head.kernel"]
    np.testing.assert_allclose(head[:, 90], head[:, :90].mean(1), rtol=1e-5, atol=1e-6)
    assert head.shape == (32, 92)


def test_embeddings_of_another_type_than_the_base(tmp_path, caplog):
    """Stage 1 in bfloat16 over a float16 base: what is written can be read again."""
    config = replace(tiny.ORIGINAL, use_im_start_end=True)
    made = tiny.checkpoint(config, seed=9)
    save_checkpoint(made, tmp_path / "stage1", to="projector", dtype="bf16")
    base = tiny.save(tmp_path / "base", "original", config, dtype="float16")
    options = Options(base=base, allow_pickle=True)
    convert(tmp_path / "stage1", tmp_path / "jax", Target("jax"), options)
    assert "model.embed_tokens.weight is bfloat16" in caplog.text
    params = params_of(tmp_path / "jax")
    assert params["language.embed.embedding"].dtype == np.float16
    assert params["projector.linear_0.kernel"].dtype.name == "bfloat16"


# Adapters ---------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    base = tiny.save(tmp_path / "base", "original")
    tiny.save(tmp_path / "pair", "lora", tiny.lora(), seed=4)
    return tmp_path / "pair", {"base": base, "vision_tower": base / "vision_tower"}


def merged(params, name, scale=2.0):
    at = f"language.layers.{name}"
    a, b = params[f"{at}.lora_a"], params[f"{at}.lora_b"]
    return params[f"{at}.kernel"] + scale * np.einsum("lir,lro->lio", a, b)


def test_merging(pair):
    folder, options = pair
    apart = params_of(folder, **options)
    together = params_of(folder, merge=True, **options)
    assert not any(".lora_" in n for n in together)
    for name in ("attn.q", "attn.o", "mlp.down"):
        np.testing.assert_allclose(
            together[f"language.layers.{name}.kernel"], merged(apart, name), rtol=1e-5, atol=1e-6
        )


def test_an_adapter_on_some_layers_only(pair, tmp_path):
    folder, options = pair
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    state = load_file(folder / ADAPTER)
    state = {n: v for n, v in state.items() if "q_proj" in n or "v_proj" in n}
    save_file(state, folder / ADAPTER)
    params = params_of(folder, **options)
    assert "language.layers.attn.k.lora_b" not in params
    assert params["language.layers.attn.q.lora_b"].any()
    opened = Options(allow_pickle=True, **options)
    convert(folder, tmp_path / "jax", Target("jax"), opened)
    convert(tmp_path / "jax", tmp_path / "back", Target("lora"))
    back = load_file(tmp_path / "back" / ADAPTER)
    assert set(back) == set(state)
    assert all(np.array_equal(back[n], state[n]) for n in state)


@pytest.mark.parametrize("file", ["adapter", "beside"])
def test_tensors_trained_whole_beside_an_adapter_come_back(pair, file, tmp_path):
    """modules_to_save: the embedding and the head, in either file of the pair."""
    torch = pytest.importorskip("torch")
    folder, options = pair
    rng = np.random.default_rng(1)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    more = {f"base_model.model.{n}": rng.normal(size=(90, 32)).astype(np.float32) for n in names}
    if file == "adapter":
        save_file(load_file(folder / ADAPTER) | more, folder / ADAPTER)
    else:
        path = folder / "non_lora_trainables.bin"
        state = torch.load(path) | {n: torch.from_numpy(v) for n, v in more.items()}
        torch.save(state, path)
    opened = Options(allow_pickle=True, **options)
    convert(folder, tmp_path / "jax", Target("jax"), opened)
    got = params_of(tmp_path / "jax")["language.embed.embedding"]
    assert np.array_equal(got, more["base_model.model.model.embed_tokens.weight"])
    convert(tmp_path / "jax", tmp_path / "back", Target("lora"))
    one, two = load_file(folder / ADAPTER), load_file(tmp_path / "back" / ADAPTER)
    assert set(one) == set(two)
    assert all(np.array_equal(one[n], two[n]) for n in one)
    one, two = (torch.load(f / "non_lora_trainables.bin") for f in (folder, tmp_path / "back"))
    assert set(one) == set(two)
    assert all(torch.equal(one[n], two[n]) for n in one)
    with pytest.raises(WeightError, match="trained whole"):
        convert(tmp_path / "jax", tmp_path / "peft", Target("peft"))


def test_rslora_has_another_scale(pair):
    folder, options = pair
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    config = load_checkpoint(folder, allow_pickle=True, **options).config
    assert config.lora is not None
    assert config.lora.scale == pytest.approx(6 / 3**0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True, "r": 3}, {"bias": "all"}, {"fan_in_fan_out": True}, {"peft_type": "IA3"},
        {"rank_pattern": {"q_proj": 2}}, {"r": "3"}, {"layers_to_transform": [0]},
        {"target_modules": ["q_proj", "k_proj", "x"], "r": 4},
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_of_adapter_are_refused(pair, change):
    folder, options = pair
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(WeightError):
        params_of(folder, **options)


@pytest.mark.parametrize("layout", ["hf", "hf5_memory"])
def test_peft_adapter_on_hugging_face(pair, layout, tmp_path):
    folder, options = pair
    opened = Options(allow_pickle=True, **options)
    convert(folder, tmp_path / "jax", Target("jax"), opened)
    convert(tmp_path / "jax", tmp_path / "peft", Target("peft", layout=layout))
    convert(options["base"], tmp_path / "hf", Target("hf"))
    got = load_checkpoint(tmp_path / "peft", base=tmp_path / "hf")
    want = load_checkpoint(tmp_path / "jax")
    for name, value in want.params.items():
        rows = tuple(slice(n) for n in value.shape)
        assert np.array_equal(got.params[name][rows], value), name
    convert(tmp_path / "peft", tmp_path / "again", Target("peft"), Options(base=tmp_path / "hf"))
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (tmp_path / "peft" / ADAPTER).read_bytes()


def test_adapters_on_layers_that_are_not_run_are_merged(pair, tmp_path):
    """PEFT matches the names of target_modules in the tower too."""
    folder, options = pair
    opened = Options(allow_pickle=True, **options)
    convert(folder, tmp_path / "peft", Target("peft"), opened)
    convert(options["base"], tmp_path / "hf", Target("hf"))
    want = load_checkpoint(tmp_path / "peft", base=tmp_path / "hf").params
    state = load_file(tmp_path / "peft" / ADAPTER)
    a, b = np.ones((3, 24), np.float32), np.arange(72, dtype=np.float32).reshape(24, 3)
    root = "base_model.model.model.vision_tower.encoder.layers.2.self_attn.q_proj"
    both = {f"{root}.lora_A.weight": a, f"{root}.lora_B.weight": b}
    save_file(state | both, tmp_path / "peft" / ADAPTER)
    got = load_checkpoint(tmp_path / "peft", base=tmp_path / "hf").params
    for name, value in want.items():
        more = 2.0 * (b @ a).T[None] if name == "vision.tail.layers.attn.q.kernel" else 0
        np.testing.assert_allclose(got[name], value + more, rtol=1e-6, atol=1e-6)
    mixed = both | {f"{root}.lora_B.weight": b.astype(np.float16)}
    save_file(state | mixed, tmp_path / "peft" / ADAPTER)
    again = load_checkpoint(
        tmp_path / "peft", base=tmp_path / "hf", dtype="fp32", mixed=True
    ).params
    assert all(np.array_equal(again[name], got[name]) for name in got)
    save_file(state | {f"{root}.lora_A.weight": a}, tmp_path / "peft" / ADAPTER)
    with pytest.raises(WeightError, match="lora_B"):
        load_checkpoint(tmp_path / "peft", base=tmp_path / "hf")


def test_an_adapter_on_the_projector_alone(pair, tmp_path):
    folder, options = pair
    convert(folder, tmp_path / "peft", Target("peft"), Options(allow_pickle=True, **options))
    convert(options["base"], tmp_path / "hf", Target("hf"))
    base = tmp_path / "hf"
    a, b = np.ones((3, 24), np.float32), np.arange(96, dtype=np.float32).reshape(32, 3)
    root = "base_model.model.model.multi_modal_projector.linear_1"
    state = {f"{root}.lora_A.weight": a, f"{root}.lora_B.weight": b}
    save_file(state, tmp_path / "peft" / ADAPTER)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    settings.pop("modules_to_save")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    got, want = load_checkpoint(tmp_path / "peft", base=base), params_of(base)
    assert got.config.lora
    assert got.config.lora.targets == ("projector.linear_0",)
    assert all(np.array_equal(got.params[name], value) for name, value in want.items())
    together = params_of(tmp_path / "peft", base=base, merge=True)
    for name, value in want.items():
        more = 2.0 * (b @ a).T if name == "projector.linear_0.kernel" else 0
        np.testing.assert_allclose(together[name], value + more, rtol=1e-6, atol=1e-6)
    # stage 1's file has no place for it
    convert(tmp_path / "peft", tmp_path / "stage1", Target("projector"), Options(base=base))
    alone = params_of(tmp_path / "stage1", base=base)
    assert set(alone) == set(together)
    assert all(np.array_equal(alone[name], together[name]) for name in together)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lm_head.lora_A", "adapters on lm_head"),
        ("model.embed_tokens.lora_embedding_A", "adapters on embed_tokens"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.lora_A", "patch"),
    ],
)
def test_adapters_that_are_not_supported_say_what_to_do(pair, name, said):
    folder, options = pair
    more = {f"base_model.model.{name}.weight": np.ones((3, 32), np.float32)}
    save_file(load_file(folder / ADAPTER) | more, folder / ADAPTER)
    with pytest.raises(WeightError, match=said) as caught:
        params_of(folder, **options)
    assert "merge_and_unload" in (caught.value.fix or "")


def test_base_is_found_beside_the_adapter(pair, tmp_path):
    folder, options = pair
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "base"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert params_of(folder, vision_tower=options["vision_tower"])
    settings["base_model_name_or_path"] = "../elsewhere"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightError, match="--base"):
        params_of(folder)


# Deltas -----------------------------------------------------------------------------------------


def test_delta(tmp_path, parts):
    base = tiny.random_params(tiny.ORIGINAL)
    config = replace(tiny.ORIGINAL, language=replace(tiny.ORIGINAL.language, vocab_size=93))
    target = tiny.random_params(config, seed=8)
    target = {n: v for n, v in target.items()}
    target["language.norm.scale"] = base["language.norm.scale"] + 0.01
    delta = dict(target)
    for name, value in base.items():
        if name.startswith("language."):
            rows = tuple(slice(n) for n in value.shape)
            delta[name] = target[name].copy()
            delta[name][rows] -= value
    made = tiny.checkpoint(config)
    made.params = delta
    save_checkpoint(made, tmp_path / "delta", to="original")
    got = params_of(tmp_path / "delta", base=parts[0])
    for name, value in target.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6)
    with pytest.raises(WeightError, match="delta"):
        load_checkpoint(tmp_path / "delta")
    full = tiny.save(tmp_path / "full", "original")
    with pytest.raises(WeightError, match="complete"):
        load_checkpoint(full, base=parts[0])


# Golden -----------------------------------------------------------------------------------------


def golden_with_parts() -> list[str]:
    """Golden models that have their language model apart; one, which then skips, without any."""
    found = sorted((SHARED / "golden/model").glob("*/base_llm"))
    return [p.parent.name for p in found if (p.parent / "stage1").exists()] or ["main"]


@pytest.mark.parametrize("model", golden_with_parts())
def test_golden_parts_make_the_golden_whole(model):
    """Base + stage-1 projector + tower are, tensor by tensor, the full golden checkpoint's parts."""
    folder = shared(f"golden/model/{model}")
    got = params_of(folder / "stage1", base=folder / "base_llm")
    assert set(got) == set(params_of(folder / "llava"))
    file = params_of(folder / "stage1/mm_projector.bin", base=folder / "base_llm",
                     vision_tower=folder / "vision_tower")  # fmt: skip
    assert all(np.array_equal(file[n], got[n]) for n in got)
