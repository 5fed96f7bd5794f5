"""config.json files of published checkpoints, and configurations there and back."""

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_jax.config import (
    LanguageConfig,
    LlavaConfig,
    RopeScaling,
    VisionConfig,
)
from llava_jax.convert.io.lazy import Lazy
from llava_jax.convert.source import identify
from llava_jax.convert.table import configs, keys
from llava_jax.convert.table.language import generation_json, language_config, language_json
from llava_jax.errors import WeightError
from tests.convert import tiny

# The fields of llava-hf/llava-1.5-7b-hf's config.json that matter: the sizes are left to defaults.
HUB_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
ORIGINAL_7B = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}


def test_published_hugging_face_7b():
    config = configs.from_hf(HUB_7B, "config.json")
    language = replace(LanguageConfig(), vocab_size=32064, pad_id=32001)
    assert config == LlavaConfig(language=language, max_length=None)


def test_published_original_7b():
    config = configs.from_original(ORIGINAL_7B, VisionConfig(), "config.json", False)
    assert config == LlavaConfig(max_length=None)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (HUB_7B, "hf"),
        (ORIGINAL_7B, "original"),  # model_type "llava" as well
        ({"model_type": "llama", "hidden_size": 8}, "llama"),
        ({"model_type": "clip", "vision_config": {}, "text_config": {}}, "clip"),
        ({"model_type": "clip_vision_model"}, "clip"),
    ],
)
def test_kinds_are_told_by_content(data, kind, tmp_path):
    folder = tmp_path / "llava-lora-mpt-of-another-kind"  # names that mislead the original's loader
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "model.safetensors").write_bytes(b"")
    assert identify(folder) == kind


@pytest.mark.parametrize(
    "data", [{"model_type": "gpt2"}, {}, {"model_type": 3}, {"model_type": "llava_next"}]
)
def test_other_kinds_are_refused(data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightError):
        identify(tmp_path)


LANGUAGES = {
    "7b": LanguageConfig(),
    "13b": LlavaConfig.v15_13b().language,
    "v1": LlavaConfig.v1_7b().language,
    "grouped": tiny.CONFIG.language,
    "tied, biased": LanguageConfig(tied_head=True, attention_bias=True, rope_theta=5e5),
    "linear rope": LanguageConfig(rope_scaling=RopeScaling("linear", 2.0)),
    "llama 3": LanguageConfig(
        vocab_size=128256, kv_heads=8, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    ),
    "mistral": LanguageConfig(kv_heads=8, sliding_window=4096, mlp_width=14336),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_language_configs_come_back(name):
    language = LANGUAGES[name]
    data = json.loads(json.dumps(language_json(language)))
    assert language_config(data, "x") == language


def test_rope_of_transformers_5():
    data = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}}
    language = language_config(data, "x")
    assert language.rope_theta == 1e6
    assert language.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("name", ["7b", "13b", "grouped", "llama 3", "mistral"])
def test_configs_of_transformers_say_the_same(name):
    transformers = pytest.importorskip("transformers")
    language = LANGUAGES[name]
    data = language_json(language)
    kind = {"llama": "LlamaConfig", "mistral": "MistralConfig"}[data["model_type"]]
    theirs = getattr(transformers, kind).from_dict(data)
    assert theirs.num_key_value_heads == language.kv_heads
    assert theirs.head_dim == language.head_width
    saved = json.loads(theirs.to_json_string(use_diff=False))
    assert language_config(saved, "x") == language


@pytest.mark.parametrize("preset", ["v15_7b", "v15_13b", "v1_7b"])
@pytest.mark.parametrize("layout", [keys.ORIGINAL, *keys.HF_LAYOUTS], ids=lambda x: x.name)
def test_real_sizes_there_and_back(preset, layout):
    """All tensors of the published sizes, as shapes: names and shapes come back."""
    config = getattr(LlavaConfig, preset)()
    if layout.hf and config.projector == "linear":
        pytest.skip("Hugging Face has no linear projector")

    def never() -> np.ndarray:
        raise AssertionError("a value was read")

    state = {
        name: Lazy(entry.their_shape, np.dtype(np.float16), never)
        for entry in keys.pairings(layout, config)
        for name in entry.theirs
    }
    leaves, rest = keys.to_jax(state, layout, config, where="x")
    assert not rest
    back = keys.to_theirs(leaves, layout, config)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}
    assert state[f"{layout.lm}.layers.0.mlp.down_proj.weight"].shape[0] == config.language.width


@pytest.mark.parametrize(
    "change",
    [
        {"mm_projector_type": "resampler"}, {"mm_patch_merge_type": "spatial_unpad"}, {"s2": True},
        {"image_aspect_ratio": "anyres"}, {"mm_vision_select_layer": -30},
        {"mm_vision_select_feature": "all"}, {"model_type": "llava_mpt"},
    ],
    ids=str,
)  # fmt: skip
def test_models_that_are_not_supported_say_so(change):
    with pytest.raises(WeightError) as error:
        configs.from_original(ORIGINAL_7B | change, VisionConfig(), "config.json", False)
    assert "config.json" in str(error.value)


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_llama3_rope_in_every_spelling(key, name):
    settings = {k: v for k, v in LLAMA3.items() if k != "rope_type"} | {name: "llama3"}
    inside = language_config({key: settings | {"rope_theta": 5e5}}, "x")
    beside = language_config({key: settings, "rope_theta": 5e5}, "x")
    assert inside == beside
    assert inside.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert inside.rope_theta == 5e5


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("gone", [k for k in LLAMA3 if k != "rope_type"])
def test_llama3_rope_that_lacks_a_field_is_refused(key, gone):
    settings = {k: v for k, v in LLAMA3.items() if k != gone}
    with pytest.raises(WeightError, match=rf"config.json: {key}: {gone} missing.*llama3"):
        language_config({key: settings}, "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type 'yarn' is not supported"),
        ({"type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
        ({"type": "longrope", "short_factor": [1.0]}, "'longrope' is not supported"),
        ({"type": "linear"}, "factor missing, which rope_type linear needs"),
        ({"type": "linear", "factor": 0}, "factor is 0, not a number above 0"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "high_freq_factor 1 is not above"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_theta": 1e4}}, "'full_attention': settings per layer"),
    ],
    ids=str,
)
def test_rope_settings_that_are_not_supported_are_named(change, said):
    with pytest.raises(WeightError, match=said):
        language_config({"rope_scaling": change}, "config.json")


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": [2, 7, 2]}, None, (2, 7)),
        ({"eos_token_id": 2}, {"eos_token_id": [2, 300]}, (2, 300)),
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 9}, (9,)),
        ({"eos_token_id": [2, 7]}, {"bos_token_id": 1}, (2, 7)),
    ],
)
def test_every_end_token_is_read(config, generation, ids):
    """transformers' generate asks generation_config.json first."""
    language = language_config(config, "x", generation)
    assert language.eos_ids == ids
    again = language_config(language_json(language), "x")
    assert again.eos_ids == ids
    assert generation_json(language, 0)["eos_token_id"] == (list(ids) if len(ids) > 1 else ids[0])


@pytest.mark.parametrize("value", ["2", [2, "3"], [], True, -1, [2.0]], ids=repr)
def test_end_tokens_that_are_no_ids_are_refused(value):
    with pytest.raises(WeightError, match="generation_config.json: eos_token_id"):
        language_config({}, "x", {"eos_token_id": value})


def test_a_list_of_one_feature_layer_is_that_layer():
    config = configs.from_hf({"vision_feature_layer": [-3]}, "config.json")
    assert config.feature_layer == -3
    with pytest.raises(WeightError, match="several vision_feature_layer"):
        configs.from_hf({"vision_feature_layer": [-3, -2]}, "config.json")


def test_an_adapter_without_its_config_is_named(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(WeightError, match=r"without its adapter_config\.json"):
        identify(tmp_path)
