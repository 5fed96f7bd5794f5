"""Runs one picture and prompt through a checkpoint in JAX and, if installed, in PyTorch."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from llava_jax.batch import Shape, collate
from llava_jax.config import LlavaConfig
from llava_jax.convert.source import Source
from llava_jax.convert.table import keys
from llava_jax.errors import LlavaError
from llava_jax.text.example import Example

log = logging.getLogger(__name__)

QUESTION = "What is in this picture?"
NEW_TOKENS = 16


def prompt_ids(source: Source) -> np.ndarray:
    """int32[t], -200 at the image: the question in the model's own template, or, without tokenizer
    files, fixed ids of its vocabulary."""
    config = source.config
    text = f"USER: <image>\n{QUESTION} ASSISTANT:"
    if source.tokenizer and (source.tokenizer / "tokenizer.model").is_file():
        try:
            from llava_jax.text.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(source.tokenizer, legacy=config.tokenizer_legacy)
            before, after = text.split("<image>")
            ids = [*tokenizer.encode(before), -200, *tokenizer.encode(after, add_bos=False)]
            if max(ids) < config.language.vocab_size:
                return np.array(ids, np.int32)
        except LlavaError as error:
            log.warning("the probe uses fixed ids: %s", error)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.language.vocab_size, 12)
    return np.array([config.language.bos_id, *ids[:4], -200, *ids[4:]], np.int32)


def picture(config: LlavaConfig) -> np.ndarray:
    """float32[H, W, 3]: a colour gradient with a disc in it, normalised as CLIP wants it."""
    n = config.vision.image_size
    y, x = np.mgrid[0:n, 0:n] / n
    rgb = np.stack([x, y, 1 - x], -1)
    rgb[(x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.06] = (0.9, 0.1, 0.2)
    mean, std = (np.array(values) for values in config.vision.units)
    return ((rgb - mean) / std).astype(np.float32)


def jax_answer(source: Source) -> tuple[np.ndarray, list[int]]:
    """(float32[t + I - 1, V] logits of the prompt, NEW_TOKENS greedy ids), in fp32."""
    import jax
    import jax.numpy as jnp

    from llava_jax import llava

    config, ids = source.config, prompt_ids(source)
    params = {n: jnp.asarray(leaf.read(), jnp.float32) for n, leaf in source.leaves.items()}
    # Room for the answer: the mask is causal, so no earlier token sees it.
    prompt = Example(np.pad(ids, (0, NEW_TOKENS)), (picture(config),))
    total = prompt.length(config.image_tokens)
    length = total - NEW_TOKENS
    arrays = collate([[prompt]], Shape(1, total, 1, None), config)
    tokens = arrays.pop("tokens")  # [1, T]
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    bind = llava.binder(config)

    @jax.jit
    def logits(params, tokens):
        model = bind(params)
        return model.logits(model(batch | {"tokens": tokens}))[0]

    with jax.default_matmul_precision("highest"):
        out = np.asarray(logits(params, tokens))
        first, new = out[:length], []
        for i in range(NEW_TOKENS):
            new.append(int(out[length + i - 1].argmax()))
            tokens[0, length + i] = new[-1]
            out = np.asarray(logits(params, tokens))
    return first, new


def torch_answer(source: Source) -> tuple[np.ndarray, list[int]]:
    """The same by transformers' LlavaForConditionalGeneration, filled from the leaves, in fp32."""
    import torch

    config, ids = source.config, prompt_ids(source)
    model, image_id = torch_model(source)
    at, count = int(np.argmax(ids < 0)), config.image_tokens
    full = np.concatenate([ids[:at], np.full(count, image_id), ids[at + 1 :]])
    tokens = torch.tensor(full[None], dtype=torch.long)
    pixels = torch.tensor(picture(config).transpose(2, 0, 1)[None])
    with torch.inference_mode():
        inputs: dict[str, Any] = {"pixel_values": pixels}
        first = model(input_ids=tokens, **inputs).logits[0].float().numpy()
        new, out = [], first
        for _ in range(NEW_TOKENS):
            new.append(int(out[-1, : config.language.vocab_size].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[new[-1]]])], 1)
            out = model(input_ids=tokens, **inputs).logits[0].float().numpy()
    return first[:, : config.language.vocab_size], new


def torch_model(source: Source):
    """(transformers' model in fp32 with the values of `source`, its id of <image>).

    Projectors that transformers lacks are built from their parts.
    """
    import torch
    from transformers import LlavaConfig as HfConfig
    from transformers import LlavaForConditionalGeneration

    from llava_jax.convert.table import configs
    from llava_jax.convert.vocabulary import hf_vocabulary

    # With an <image> of its own: published files exist whose id of <image> has no row.
    config, leaves, image_id, pad_id = hf_vocabulary(replace(source, metadata={}))
    data = configs.hf_json(config, image_id, pad_id, "float32")
    model = LlavaForConditionalGeneration(HfConfig.from_dict(data))
    if config.projector != "mlp2x_gelu":
        setattr(model.model, "multi_modal_projector", _projector(torch, config))  # noqa: B010
    layout = keys.HF_MEMORY
    if config.projector != "mlp2x_gelu":
        layout = keys.Layout(
            "probe", layout.lm, layout.head, layout.projector, layout.vision, hf=False
        )
    state = {}
    for name, lazy in keys.to_theirs(leaves, layout, config).items():
        array = np.ascontiguousarray(lazy.read().astype(np.float32))
        state[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    left = [n for n in missing if not keys.is_buffer(n) and n != "lm_head.weight"]
    if left or unexpected:
        raise LlavaError(
            f"transformers names its parameters differently: {[*left, *unexpected][:3]}"
        )
    if config.language.tied_head:
        model.tie_weights()
    return model.eval(), image_id


def _projector(torch, config: LlavaConfig):
    """linear, mlpNx_gelu or identity, as in llava/model/multimodal_projector/builder.py."""
    if config.projector == "identity":
        return torch.nn.Identity()
    layers, d_in = [], config.vision.width
    for i in range(config.projector_depth):
        layers += [torch.nn.GELU()] * bool(i) + [torch.nn.Linear(d_in, config.language.width)]
        d_in = config.language.width
    return layers[0] if config.projector == "linear" else torch.nn.Sequential(*layers)
