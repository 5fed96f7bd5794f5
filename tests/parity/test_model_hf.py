"""Random Hugging Face LLaVAs of several shapes, saved and loaded by the real path, against ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.layers import Compute
from llava_jax.llava import build
from llava_jax.train.step import make_loss
from tests.tiny import random_batch

torch = pytest.importorskip("torch")

LLAMA = {"model_type": "llama", "num_key_value_heads": 4}
SHAPES = {
    "vicuna": (LLAMA, {}),
    "grouped heads, llama3 rope": (
        {
            "model_type": "llama",
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        {},
    ),
    "linear rope, attention bias": (
        {
            **LLAMA,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        },
        {},
    ),
    "mistral with a window": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 7},
        {},
    ),
    "class token, last layer": (
        LLAMA,
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "tied head, wide heads": ({**LLAMA, "head_dim": 20, "tie_word_embeddings": True}, {}),
}


def hugging_face(text, changes):
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 70,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        **text,
    }
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=69, **changes)
    if text.get("tie_word_embeddings"):
        config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            # Norms and biases away from 1 and 0, or a forgotten one would not show.
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else 0.06))
    return model


@pytest.fixture(scope="module", params=SHAPES, ids=list(SHAPES))
def pair(request, tmp_path_factory):
    """(torch model, our config, our parameters) of one shape."""
    model = hugging_face(*SHAPES[request.param])
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    checkpoint = load_checkpoint(folder)
    params = {k: jnp.asarray(v, jnp.float32) for k, v in checkpoint.params.items()}
    return model, dataclasses.replace(checkpoint.config, max_length=None), params


def inputs(config):
    """(our batch, torch inputs) of three right-padded rows with one image each, normalised."""
    batch = random_batch(3, 20, config=dataclasses.replace(config))
    batch["tokens"] = np.minimum(batch["tokens"], 68)
    rng = np.random.default_rng(1)
    batch["images"] = rng.normal(size=batch["images"].shape).astype(np.float32)
    ids = np.where(batch["slots"] >= 0, 69, batch["tokens"])
    theirs = {
        "input_ids": torch.tensor(ids, dtype=torch.long),
        "attention_mask": torch.tensor(batch["segments"], dtype=torch.long),
        "pixel_values": torch.tensor(batch["images"][:, 0].transpose(0, 3, 1, 2)),
    }
    return batch, theirs


def labels_of(batch):
    labels = np.full(batch["tokens"].shape, -100)
    for row, (at, targets) in enumerate(zip(batch["target_at"], batch["targets"])):
        labels[row, at[targets >= 0] + 1] = targets[targets >= 0]
    return torch.tensor(labels)


def test_tower_and_projector(pair):
    model, config, params = pair
    ours = build(config, params)
    batch, theirs = inputs(config)
    features = ours.image_features(batch["images"][:, 0])
    with torch.no_grad():
        out = model.model.vision_tower(theirs["pixel_values"], output_hidden_states=True)
        wanted = out.hidden_states[model.config.vision_feature_layer]
        if config.feature_select == "patch":
            wanted = wanted[:, 1:]
        projected = model.model.multi_modal_projector(wanted)
    np.testing.assert_allclose(features, wanted, atol=1e-5)
    np.testing.assert_allclose(ours.projector(features), projected, atol=1e-5)


def test_decoder(pair):
    model, config, params = pair
    ours = build(config, params)
    batch, theirs = inputs(config)
    x = np.random.default_rng(2).normal(size=(3, 20, config.language.width)).astype(np.float32)
    hidden, _ = ours.language(x, batch["positions"], jnp.asarray(batch["segments"]))
    with torch.no_grad():
        wanted = model.model.language_model(
            inputs_embeds=torch.tensor(x), attention_mask=theirs["attention_mask"]
        ).last_hidden_state
    real = batch["segments"] > 0
    np.testing.assert_allclose(np.asarray(hidden)[real], wanted.numpy()[real], atol=1e-5)


def test_logits_loss_and_gradients(pair):
    model, config, params = pair
    batch, theirs = inputs(config)
    model.zero_grad()
    out = model(**theirs, labels=labels_of(batch))
    out.loss.backward()
    ours = build(config, params)
    logits = np.asarray(ours.logits(ours(batch)))
    real = batch["segments"] > 0
    np.testing.assert_allclose(logits[real], out.logits.detach().numpy()[real], atol=1e-4)

    loss = make_loss(config, Compute())
    value, grads = jax.value_and_grad(loss)(params, {}, batch)
    assert float(value) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    ours_norm = {
        "language.embed.embedding": model.model.language_model.embed_tokens.weight,
        "projector.linear_0.kernel": model.model.multi_modal_projector.linear_1.weight,
        "vision.patch_embed.kernel": (model.model.vision_tower.embeddings.patch_embedding.weight),
    }
    for name, torch_param in ours_norm.items():
        assert float(jnp.linalg.norm(grads[name])) == pytest.approx(
            float(torch_param.grad.norm()), rel=1e-4
        ), name


def test_scan_remat_and_unroll_agree(pair):
    _, config, params = pair
    batch, _ = inputs(config)
    plain = build(config, params)(batch)
    others = [build(config, params, c) for c in (Compute(remat="full"), Compute(unroll=True))]
    for model in (*others, _unrolled(build(config, params))):
        np.testing.assert_allclose(plain, model(batch), atol=1e-5)


def _unrolled(model):
    model.language.unrolled()
    return model
