"""GGUF for llama.cpp: the language model, and tower + projector ("mmproj"), each one file.

Tensor names come from the gguf package's own map over Hugging Face's; the keys of the settings are
those of llama.cpp's tools/mtmd/clip-impl.h and src/llama-arch.cpp.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, PixelConfig
from llava_jax.convert.checkpoint import open_source
from llava_jax.convert.formats import adapter
from llava_jax.convert.formats.jax import verify
from llava_jax.convert.io import hub, output
from llava_jax.convert.io.lazy import Lazy
from llava_jax.convert.io.output import Progress
from llava_jax.convert.source import Options, Source
from llava_jax.convert.table import keys
from llava_jax.convert.vocabulary import check_tokens, original_rows
from llava_jax.errors import ConfigError, WeightError
from llava_jax.params import is_run
from llava_jax.text.constants import IM_END, IM_START
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.tokenizer_files import added_tokens
from llava_jax.util import need, refuse_input

log = logging.getLogger(__name__)

# The types of --quantize, and what gguf.LlamaFileType calls a file of them.
TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
# llama.cpp counts the projector's layers as the original does, and gguf's map does not.
_LAYOUT = replace(keys.LLAMA, projector="mm", vision="vision_tower.vision_model")


def write_gguf(
    src: str | Path,
    dst: str | Path,
    options: Options | None = None,
    kind: str = "f16",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes `model-KIND.gguf` and `mmproj-KIND.gguf` into the folder `dst`, tensor by tensor.

    kind: "f16", "q8_0" or "f32", of the matrices; norms and biases are float32, and what q8_0 has
    no whole blocks for is f16. Adapters are merged. Raises WeightError for what llama.cpp cannot
    run (projectors other than mlp2x_gelu, the class token among the features), and for a JAX-side
    source that no longer has the bytes that were written.
    """
    if kind not in TYPES:
        raise WeightError(f"gguf type {kind!r} is unknown", fix=f"one of {', '.join(TYPES)}")
    options = options or Options()
    source = open_source(src, replace(options, merge=options.dtype is not None))
    refuse_input(dst, [hub.local(src), *source.files], WeightError)
    if source.kind == "jax":
        verify(hub.resolve(src, options.allow_pickle))
    source = adapter.merge(source, np.dtype(np.float32))  # the sum is rounded once, to `kind`
    check_tokens(source)
    source = original_rows(source)
    check_supported(source.config)
    with output.folder(Path(dst), overwrite=overwrite) as work:
        _write_language(source, work / f"model-{kind}.gguf", kind, progress)
        _write_mmproj(source, work / f"mmproj-{kind}.gguf", kind, progress)
    return Path(dst)


def check_supported(config: LlavaConfig) -> None:
    """Raises WeightError, with the reason, for a model that llama.cpp has no graph for."""
    if config.projector != "mlp2x_gelu":
        raise WeightError(f"llama.cpp runs no projector {config.projector!r}, only mlp2x_gelu")
    if config.feature_select != "patch":
        raise WeightError("llama.cpp always drops the class token: feature_select must be patch")
    language = config.language
    if language.sliding_window or language.attention_bias:
        raise WeightError("sliding windows and attention biases are not written to GGUF")
    if language.rope_scaling and language.rope_scaling.kind != "linear":
        raise WeightError(f"RoPE scaling {language.rope_scaling.kind} is not written to GGUF")
    if len(language.eos_ids) > 3:
        listed = ", ".join(map(str, language.eos_ids))
        raise WeightError(
            f"the model has {len(language.eos_ids)} end tokens ({listed}), GGUF holds three",
            fix="leave those that it never says out of generation_config.json",
        )
    pixels, usual = config.vision.pixels, PixelConfig()
    if (pixels.rescale, pixels.normalize) != (usual.rescale, usual.normalize):
        raise WeightError(
            "llama.cpp always rescales by 1/255 and normalises: do_rescale, rescale_factor and "
            "do_normalize of preprocessor_config.json cannot be otherwise"
        )
    if pixels != usual:
        log.warning("llama.cpp resizes images in its own way, not by preprocessor_config.json")
    if config.image_aspect_ratio != "pad":
        log.warning("llama.cpp pads images to a square; this model was made for cropped ones")
    if config.use_im_start_end:
        log.warning(
            "llama.cpp puts no %s and %s around images, as this model wants them: write them into "
            "the prompt, around the place of each image",
            IM_START, IM_END,
        )  # fmt: skip


# Tensors ----------------------------------------------------------------------------------------


def language_tensors(source: Source) -> dict[str, Lazy]:
    """{GGUF name: tensor, as torch has it} of the decoder."""
    config = replace(source.config, lora=None)
    state = keys.to_theirs(source.leaves, _LAYOUT.decoder, config)
    rename = _names("LLAMA", config.language.layers)
    state = {rename(name): lazy for name, lazy in state.items()}
    heads = {"attn_q": config.language.heads, "attn_k": config.language.kv_heads}
    for name, lazy in state.items():
        if count := heads.get(name.split(".")[-2]):
            state[name] = lazy.map(lambda a, n=count: interleaved(a, n))
    return state


def mmproj_tensors(source: Source) -> dict[str, Lazy]:
    """{GGUF name: tensor, as torch has it} of the layers of the tower that run, and the projector."""
    layout = replace(_LAYOUT, lm=None, head=None)
    rename = _names("MMPROJ", source.config.vision_layers_run)
    return {
        rename(name): p.move.to_theirs(part)
        for p in keys.pairings(layout, source.config)
        # Past the layers that run stands the last norm, which llama.cpp would apply to the features.
        if is_run(p.ours)
        for name, part in zip(p.theirs, source.leaves[p.ours].parts, strict=True)
    }


def _names(arch: str, layers: int) -> Callable[[str], str]:
    """A function from Hugging Face's names to GGUF's. arch: of gguf.MODEL_ARCH."""
    gguf = _gguf()
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch), layers)

    def rename(name: str) -> str:
        found = name if name.startswith("mm.") else table.get_name(name, (".weight", ".bias"))
        if found is None:
            raise WeightError(f"GGUF has no name for {name}")
        return found

    return rename


def _gguf() -> Any:
    return need("gguf", "to write GGUF", "llava_jax[gguf]")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: the two halves that RoPE turns together, alternating."""
    rows, columns = weight.shape
    split = weight.reshape(heads, 2, rows // heads // 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def _type_of(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """The gguf.GGMLQuantizationType of a tensor in a file of `kind`."""
    if len(shape) == 1 or name == "v.position_embd.weight":
        kind = "f32"
    elif kind == "q8_0" and (len(shape) != 2 or shape[1] % 32):  # 32 values share a scale
        kind = "f16"
    return _gguf().GGMLQuantizationType[kind.upper()]


def _packed(lazy: Lazy, kind: Any) -> np.ndarray:
    """A tensor as it lies in the file. kind: of gguf.GGMLQuantizationType."""
    values = np.ascontiguousarray(lazy.read().astype(np.float32))
    with np.errstate(over="ignore"):
        packed = _gguf().quants.quantize(values, kind)
    if packed.dtype == np.float16 and np.isinf(packed).any():
        raise WeightError("values do not fit into f16", fix="use --quantize f32 or q8_0")
    return packed


def _write(writer, state: Mapping[str, Lazy], kind: str, progress: Progress | None) -> None:
    """Header first, then one tensor at a time."""
    types = {name: _type_of(name, lazy.shape, kind) for name, lazy in state.items()}
    for name, lazy in state.items():
        block, size = _gguf().GGML_QUANT_SIZES[types[name]]
        count, unpacked = math.prod(lazy.shape), np.dtype(np.float32)
        writer.add_tensor_info(name, lazy.shape, unpacked, count // block * size, types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, lazy in state.items():
        writer.write_tensor_data(_packed(lazy, types[name]))
        if progress:
            progress(lazy.nbytes)
    writer.close()


# The two files ----------------------------------------------------------------------------------


def _write_language(source: Source, path: Path, kind: str, progress: Progress | None) -> None:
    gguf = _gguf()
    c = source.config.language
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("LLaVA (language model)")
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind]])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_width)
    writer.add_value_length(c.head_width)
    writer.add_rope_dimension_count(c.head_width)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.rope_scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_scaling.factor)
    _add_vocabulary(writer, source)
    _write(writer, language_tensors(source), kind, progress)


def _write_mmproj(source: Source, path: Path, kind: str, progress: Progress | None) -> None:
    gguf = _gguf()
    v = source.config.vision
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name("LLaVA (vision tower and projector)")
    writer.add_file_type(gguf.LlamaFileType[TYPES[kind]])
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_bool("clip.use_gelu", v.hidden_act == "gelu")
    writer.add_vision_image_size(v.image_size)
    writer.add_vision_patch_size(v.patch_size)
    writer.add_vision_embedding_length(v.width)
    writer.add_vision_feed_forward_length(v.mlp_width)
    writer.add_vision_projection_dim(source.config.language.width)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.norm_eps)
    writer.add_vision_block_count(source.config.vision_layers_run)
    # Said outright: without it llama.cpp would leave out the last of the blocks that are there.
    writer.add_array("clip.vision.feature_layer", [source.config.vision_layers_run])
    writer.add_vision_image_mean(list(v.image_mean))
    writer.add_vision_image_std(list(v.image_std))
    _write(writer, mmproj_tensors(source), kind, progress)


def _add_vocabulary(writer, source: Source) -> None:
    """The sentencepiece vocabulary; added tokens become control tokens, missing ids unused ones."""
    gguf = _gguf()
    from sentencepiece import sentencepiece_model_pb2

    folder, language = source.tokenizer, source.config.language
    if folder is None:
        raise WeightError("GGUF needs the tokenizer of the language model")
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(Tokenizer.load(folder).model)
    except ConfigError as error:
        raise WeightError(error.message, fix=error.fix) from None
    kinds = gguf.TokenType
    entries = [(f"[PAD{i}]", -10000.0, kinds.UNUSED) for i in range(language.vocab_size)]
    for i, piece in enumerate(proto.pieces[: language.vocab_size]):
        # GGUF numbers the kinds as sentencepiece_model.proto does, user-defined ones included.
        entries[i] = (piece.piece, piece.score, kinds(piece.type))
    added = added_tokens(folder)
    for token, number in added.ids.items():
        if len(proto.pieces) <= number < language.vocab_size:
            kind = kinds.USER_DEFINED if token in added.plain else kinds.CONTROL
            entries[number] = (token, -1000.0, kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([t.encode() for t, _, _ in entries])
    writer.add_token_scores([s for _, s, _ in entries])
    writer.add_token_types([int(k) for _, _, k in entries])
    writer.add_bos_token_id(language.bos_id)
    # llama.cpp ends an answer at three tokens at most: those of a text, a turn and a message.
    ends = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, number in zip(ends, language.eos_ids):
        add(number)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_pad_token_id(language.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
