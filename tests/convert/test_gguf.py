"""GGUF files read back with the gguf package: every tensor, and what llama.cpp needs to know."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

import llava_jax
from llava_jax.config import LoraConfig
from llava_jax.convert import Target, convert, load_checkpoint, open_source, save_checkpoint
from llava_jax.convert.formats.gguf import (
    check_supported,
    interleaved,
    language_tensors,
    mmproj_tensors,
    write_gguf,
)
from llava_jax.convert.io.lazy import float_dtype
from llava_jax.errors import WeightError
from tests.convert import tiny

gguf = pytest.importorskip("gguf")

TRAINED = Path(llava_jax.__file__).parent / "assets/tiny"

MLP = replace(tiny.TEXT, language=replace(tiny.TEXT.language, mlp_width=64))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return tiny.save(folder / "a", "jax", MLP, tokenizer=tiny.tokenizer(folder / "t"))


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_tensors_are_read_back(source, kind, tmp_path):
    write_gguf(source, tmp_path / "b", kind=kind)
    opened = open_source(source)
    files = {"model": language_tensors(opened), "mmproj": mmproj_tensors(opened)}
    for stem, wanted in files.items():
        reader = gguf.GGUFReader(tmp_path / "b" / f"{stem}-{kind}.gguf")
        found = {t.name: t for t in reader.tensors}
        assert set(found) == set(wanted)
        for name, lazy in wanted.items():
            tensor, value = found[name], lazy.read().astype(np.float32)
            assert tuple(int(n) for n in tensor.shape[::-1]) == value.shape
            back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
            bound = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[kind]
            np.testing.assert_allclose(back, value, atol=bound, rtol=0)
            if value.ndim == 1:
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_a_merged_adapter_is_rounded_once(source, kind, tmp_path):
    """Not first to the type of its base, which is bfloat16 here."""
    made = load_checkpoint(source)
    config = replace(made.config, lora=LoraConfig(rank=3, alpha=6.0))
    params = tiny.random_params(config)
    bf16 = float_dtype("bf16")
    params = {n: p if ".lora_" in n else p.astype(bf16) for n, p in params.items()}
    save_checkpoint(replace(made, config=config, params=params), tmp_path / "a")
    write_gguf(tmp_path / "a", tmp_path / "b", kind=kind)
    reader = gguf.GGUFReader(tmp_path / "b" / f"model-{kind}.gguf")
    at = "language.layers.mlp.up"
    found = next(t for t in reader.tensors if t.name == "blk.1.ffn_up.weight")
    update = params[f"{at}.lora_a"][1] @ params[f"{at}.lora_b"][1]
    want = (params[f"{at}.kernel"][1].astype(np.float32) + np.float32(2) * update).T
    bound = {"f32": 1e-6, "f16": 1e-3}[kind]  # bfloat16 would be 8e-3 off
    np.testing.assert_allclose(found.data.astype(np.float32), want, rtol=bound, atol=bound)


def test_sizes_and_vocabulary(source, tmp_path):
    write_gguf(source, tmp_path / "b")
    reader = gguf.GGUFReader(tmp_path / "b/model-f16.gguf")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.vocab_size"].contents() == 320
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[:3]) == (320, ["<unk>", "<s>", "</s>"])
    reader = gguf.GGUFReader(tmp_path / "b/mmproj-f16.gguf")
    assert reader.fields["clip.vision.feature_layer"].contents() == [2]
    assert not any("blk.2." in t.name or "post" in t.name for t in reader.tensors)


def test_kinds_of_tokens(source, tmp_path):
    """Bytes and user-defined pieces are told apart, which llama.cpp tokenizes by."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    folder = tmp_path / "t"
    shutil.copytree(source.parent / "t", folder)
    model = pb.ModelProto.FromString((folder / "tokenizer.model").read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    model.pieces[300].type = 4
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    write_gguf(tiny.save(tmp_path / "a", "jax", MLP, tokenizer=folder), tmp_path / "b")
    reader = gguf.GGUFReader(tmp_path / "b/model-f16.gguf")
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:5] == [2, 3, 3, 6, 6]
    assert [i for i, k in enumerate(kinds) if k == 4] == [300]


def test_a_damaged_tokenizer_is_named(source, tmp_path):
    made = tiny.save(tmp_path / "a", "jax", MLP, tokenizer=source.parent / "t")
    (made / "tokenizer.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(WeightError, match=r"tokenizer\.model"):
        write_gguf(made, tmp_path / "b")


def test_rope_order():
    """Row 2k of a head is its row k, row 2k + 1 its row k + half."""
    rows = interleaved(np.arange(8)[:, None], heads=2)[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rows_that_hugging_face_added_stay_out(source, tmp_path):
    convert(source, tmp_path / "hf", Target("hf"))
    write_gguf(tmp_path / "hf", tmp_path / "b")
    reader = gguf.GGUFReader(tmp_path / "b/model-f16.gguf")
    assert reader.fields["llama.vocab_size"].contents() == 320


@pytest.mark.parametrize(
    "change", [{"projector": "linear"}, {"feature_select": "cls_patch"}], ids=str
)
def test_what_llama_cpp_cannot_run_is_refused(change, source, tmp_path):
    folder = tiny.save(tmp_path / "a", "jax", replace(MLP, **change), tokenizer=source.parent / "t")
    with pytest.raises(WeightError, match=r"llama\.cpp"):
        write_gguf(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_tokens_around_images_are_left_to_the_prompt(caplog):
    check_supported(MLP)
    assert not caplog.records
    check_supported(replace(MLP, use_im_start_end=True))
    assert "<im_start> and <im_end>" in caplog.text


# Read back without any of the writer's tables -----------------------------------------------------

# GGUF name -> parameter of ours; kernels are stored as torch has them, [out, in].
NAMES = {
    "token_embd.weight": "language.embed.embedding",
    "output.weight": "language.head.kernel",
    "output_norm.weight": "language.norm.scale",
    "blk.attn_q.weight": "language.layers.attn.q.kernel",
    "blk.attn_k.weight": "language.layers.attn.k.kernel",
    "blk.attn_v.weight": "language.layers.attn.v.kernel",
    "blk.attn_output.weight": "language.layers.attn.o.kernel",
    "blk.ffn_gate.weight": "language.layers.mlp.gate.kernel",
    "blk.ffn_up.weight": "language.layers.mlp.up.kernel",
    "blk.ffn_down.weight": "language.layers.mlp.down.kernel",
    "blk.attn_norm.weight": "language.layers.attn_norm.scale",
    "blk.ffn_norm.weight": "language.layers.mlp_norm.scale",
    "mm.0.weight": "projector.linear_0.kernel",
    "mm.0.bias": "projector.linear_0.bias",
    "mm.2.weight": "projector.linear_1.kernel",
    "mm.2.bias": "projector.linear_1.bias",
    "v.class_embd": "vision.class_embed",
    "v.patch_embd.weight": "vision.patch_embed.kernel",
    "v.position_embd.weight": "vision.pos_embed",
    "v.pre_ln.weight": "vision.pre_norm.scale",
    "v.pre_ln.bias": "vision.pre_norm.bias",
    "v.blk.ln1.weight": "vision.layers.norm1.scale",
    "v.blk.ln1.bias": "vision.layers.norm1.bias",
    "v.blk.ln2.weight": "vision.layers.norm2.scale",
    "v.blk.ln2.bias": "vision.layers.norm2.bias",
    "v.blk.attn_q.weight": "vision.layers.attn.q.kernel",
    "v.blk.attn_q.bias": "vision.layers.attn.q.bias",
    "v.blk.attn_k.weight": "vision.layers.attn.k.kernel",
    "v.blk.attn_k.bias": "vision.layers.attn.k.bias",
    "v.blk.attn_v.weight": "vision.layers.attn.v.kernel",
    "v.blk.attn_v.bias": "vision.layers.attn.v.bias",
    "v.blk.attn_out.weight": "vision.layers.attn.out.kernel",
    "v.blk.attn_out.bias": "vision.layers.attn.out.bias",
    "v.blk.ffn_up.weight": "vision.layers.mlp.fc1.kernel",
    "v.blk.ffn_up.bias": "vision.layers.mlp.fc1.bias",
    "v.blk.ffn_down.weight": "vision.layers.mlp.fc2.kernel",
    "v.blk.ffn_down.bias": "vision.layers.mlp.fc2.bias",
}


def as_in_gguf(name, params, config):
    """(parameter of ours, layer or None, the values that a GGUF tensor of that name must hold)."""
    ours = NAMES[re.sub(r"blk\.\d+\.", "blk.", name)]
    number = int(name.split("blk.")[1].split(".")[0]) if "blk." in name else None
    value = params[ours] if number is None else params[ours][number]
    if ours == "vision.patch_embed.kernel":
        value = value.transpose(3, 2, 0, 1)
    elif ours.endswith("kernel"):
        value = value.T
    if name.startswith("blk.") and name.split(".")[2] in ("attn_q", "attn_k"):
        heads = config.heads if "attn_q" in name else config.kv_heads
        pair = [j + h for j in range(config.head_width // 2) for h in (0, config.head_width // 2)]
        rows = [n * config.head_width + j for n in range(heads) for j in pair]
        value = value[rows]  # llama.cpp turns rows 2k and 2k + 1 together, we k and k + half
    return ours, number, value


def equal_or_rounded(tensor, value):
    """f32 and f16 exactly; q8_0 within half a step of its block's scale, which is a float16."""
    kinds = gguf.GGMLQuantizationType
    exact = {kinds.F32: np.float32, kinds.F16: np.float16}
    if tensor.tensor_type in exact:
        dtype = exact[tensor.tensor_type]
        assert tensor.data.dtype == dtype
        assert np.array_equal(tensor.data.reshape(value.shape), value.astype(dtype)), tensor.name
        return
    assert tensor.tensor_type == kinds.Q8_0
    blocks = tensor.data.view(np.uint8).reshape(-1, 34)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    whole = blocks[:, 2:].view(np.int8).astype(np.float64)
    off = np.abs(whole * scale - value.astype(np.float64).reshape(-1, 32))
    assert (off <= scale * (0.5 + 127 * 2.0**-11) + 1e-9).all(), tensor.name
    assert (np.abs(whole).max(1) == 127)[scale[:, 0] > 0].all(), tensor.name


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("which", ["random", "trained"])
def test_both_files_hold_the_source(which, kind, source, tmp_path):
    folder = source if which == "random" else TRAINED
    made = load_checkpoint(folder)
    write_gguf(folder, tmp_path / "b", kind=kind)
    left = {(n, i) for n, p in made.params.items() if not n.startswith("vision.tail.")
            for i in (range(len(p)) if ".layers." in n else [None])}  # fmt: skip
    for stem in ("model", "mmproj"):
        reader = gguf.GGUFReader(tmp_path / "b" / f"{stem}-{kind}.gguf")
        says = {n: f.contents() for n, f in reader.fields.items()}
        assert {n: says[n] for n in wanted_fields(stem, made)} == wanted_fields(stem, made)
        for tensor in reader.tensors:
            ours, number, value = as_in_gguf(tensor.name, made.params, made.config.language)
            assert tuple(int(n) for n in tensor.shape[::-1]) == value.shape
            equal_or_rounded(tensor, value)
            left.remove((ours, number))
    assert not left  # every parameter that runs, each exactly once


def wanted_fields(stem, made):
    """What llama.cpp must be told; floats as float32, which GGUF keeps."""
    c, v = made.config.language, made.config.vision
    f = lambda x: float(np.float32(x))  # noqa: E731
    if stem == "model":
        pieces = SentencePieceProcessor(model_file=str(made.tokenizer / "tokenizer.model"))
        return {
            "general.architecture": "llama", "llama.vocab_size": c.vocab_size,
            "llama.context_length": c.max_positions, "llama.embedding_length": c.width,
            "llama.block_count": c.layers, "llama.feed_forward_length": c.mlp_width,
            "llama.attention.head_count": c.heads, "llama.attention.head_count_kv": c.kv_heads,
            "llama.attention.key_length": c.head_width, "llama.rope.freq_base": f(c.rope_theta),
            "llama.rope.dimension_count": c.head_width,
            "llama.attention.layer_norm_rms_epsilon": f(c.norm_eps),
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": c.bos_id,
            "tokenizer.ggml.eos_token_id": c.eos_id, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(c.vocab_size)],
        }  # fmt: skip
    return {
        "general.architecture": "clip", "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp", "clip.use_gelu": False,
        "clip.vision.image_size": v.image_size, "clip.vision.patch_size": v.patch_size,
        "clip.vision.embedding_length": v.width, "clip.vision.feed_forward_length": v.mlp_width,
        "clip.vision.attention.head_count": v.heads,
        "clip.vision.attention.layer_norm_epsilon": f(v.norm_eps),
        "clip.vision.block_count": made.config.vision_layers_run,
        "clip.vision.feature_layer": [made.config.vision_layers_run],
        "clip.vision.projection_dim": c.width,
        "clip.vision.image_mean": [f(x) for x in v.image_mean],
        "clip.vision.image_std": [f(x) for x in v.image_std],
    }  # fmt: skip
