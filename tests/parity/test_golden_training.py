"""The original's training runs, step by step: full, projector only, accumulated, LoRA."""

import dataclasses
import json
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.batch import Buckets, Shape, Size, collate, size_of
from llava_jax.config import LoraConfig
from llava_jax.convert import load_checkpoint
from llava_jax.layers import Compute
from llava_jax.params import is_lora
from llava_jax.text.example import Example
from llava_jax.train.optim import make_optimizer
from llava_jax.train.select import trainable_names
from llava_jax.train.step import TrainState, make_loss, make_step
from tests.conftest import SHARED, shared

LORA_ALPHA = 8.0  # said in the reference data's README only
TORCH_NAMES = {"projector.linear_0": "mm_projector.0", "projector.linear_1": "mm_projector.2"}


@cache
def reference() -> tuple[dict, dict]:
    folder = shared("golden/train")
    runs = {run["kind"]: run for run in json.loads((folder / "train.json").read_text())}
    return runs, dict(np.load(folder / "train.npz"))


def kinds() -> list[str]:
    """The runs that the reference data holds; one, whose tests then skip, without any."""
    path = SHARED / "golden/train/train.json"
    held = json.loads(path.read_text()) if path.exists() else []
    return [run["kind"] for run in held] or ["finetune"]


def trained_parts(kind: str) -> tuple[str, ...]:
    """What a run of this kind trains beside the projector."""
    parts = {"pretrain": (), "lora": ("lora",)}.get(kind.partition("_")[0], ("language",))
    return ("projector", *parts)


def start(kind: str):
    """(config, flat parameters) the original's run began with."""
    model = shared("golden/model") / "main"
    if "lora" not in trained_parts(kind):
        checkpoint = load_checkpoint(model / "llava", allow_pickle=True)
        return checkpoint.config, checkpoint.params
    checkpoint = load_checkpoint(
        model / "stage1",
        base=model / "base_llm",
        vision_tower=model / "vision_tower",
        allow_pickle=True,
    )
    a = np.load(shared("golden/train") / "lora_init.npz")
    rank = next(len(v) for k, v in a.items() if k.endswith("lora_A.weight"))
    config = dataclasses.replace(checkpoint.config, lora=LoraConfig(rank, LORA_ALPHA, 0.0))
    params = dict(checkpoint.params)
    for ours, theirs in {
        **{f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"},
        **{f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }.items():
        name = f"language.layers.{ours}"
        params[f"{name}.lora_a"] = np.stack(
            [a[f"model.layers.{i}.{theirs}.lora_A.weight"].T for i in range(config.language.layers)]
        )
        layers, _, out = params[f"{name}.kernel"].shape
        params[f"{name}.lora_b"] = np.zeros((layers, rank, out), np.float32)
    return config, params


def batch_of(rows: list[dict], images: np.ndarray, config, micro: int) -> dict[str, np.ndarray]:
    """[micro, rows / micro, ...] arrays of the original's rows (ids with -200, labels)."""
    samples = []
    for row in rows:
        ids = np.array(row["input_ids"])
        index = np.atleast_1d(row["image_index"])[: int((ids == -200).sum())]
        pictures = [images[i].transpose(1, 2, 0).astype(np.float32) for i in index]
        example = Example(ids, pictures, row["labels"])
        samples.append(example.truncated(config.max_length, config.image_tokens))
    # Few buckets, so that few shapes are compiled. One that the original masked whole takes places
    # of targets all the same.
    buckets = Buckets(*(tuple(n * 2**i for i in range(6)) for n in (96, 2, 48)))
    whole = [dataclasses.replace(s, labels=s.ids) if not s.target_count else s for s in samples]
    sizes = [size_of([s], config.image_tokens) for s in whole]
    shape = Shape(len(rows), *buckets.hold(Size(*map(max, zip(*sizes)))))
    batch = collate([[s] for s in samples], shape, config)
    return {k: v.reshape(micro, -1, *v.shape[1:]) for k, v in batch.items()}


@cache
def trained(kind: str):
    """(micro losses, gradient norms, parameters before, after) of our run."""
    runs, arrays = reference()
    run, (config, params) = runs[kind], start(kind)
    c = run["config"]
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    names = trainable_names(params, trained_parts(kind))
    settings = SimpleNamespace(
        optimizer="adamw",
        lr=c["lr"],
        projector_lr=c["mm_projector_lr"],
        vision_lr=None,
        param_groups=(),
        ema_decay=0.0,
        warmup_ratio=c["warmup_ratio"],
        lr_end_ratio=0.0,
        weight_decay=c["weight_decay"],
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        clip_norm=c["max_grad_norm"],
    )
    optimizer, _ = make_optimizer(settings, sorted(names), c["steps"])
    step = jax.jit(make_step(make_loss(config, Compute()), optimizer, average="micro", seed=None))
    begin = {k: v for k, v in params.items() if k in names}
    frozen = {k: v for k, v in params.items() if k not in names}
    state = TrainState(jnp.int32(0), begin, optimizer.init(begin))
    losses, norms, per_step = [], [], c["batch_size"] * c["ga"]
    for number in range(c["steps"]):
        rows = [run["rows"][number * per_step + i] for i in range(per_step)]
        state, metrics = step(state, frozen, batch_of(rows, arrays["images"], config, c["ga"]))
        losses += metrics["micro_loss"].tolist()
        norms.append(float(metrics["grad_norm"]))
    return np.array(losses), np.array(norms), begin, state.params


@pytest.mark.parametrize("kind", kinds())
def test_losses_and_gradient_norms(kind):
    run = reference()[0][kind]
    losses, norms, _, _ = trained(kind)
    np.testing.assert_allclose(losses, run["per_micro_step_loss"], rtol=0, atol=1e-3)
    # Norms were noted a micro-step; the last of each step is the accumulated one.
    accumulated = run["accumulated_grad_norm_before_clip"][
        run["config"]["ga"] - 1 :: run["config"]["ga"]
    ]
    np.testing.assert_allclose(norms, accumulated, rtol=2e-3)


@pytest.mark.parametrize("kind", kinds())
def test_final_parameters(kind):
    final = reference()[0][kind]["final"]
    _, _, before, after = trained(kind)
    compared = 0
    for name, value in after.items():
        for torch_name, new, old in torch_views(name, np.asarray(value), np.asarray(before[name])):
            matches = [v for k, v in final.items() if k.endswith(torch_name)]
            assert len(matches) == 1, torch_name
            assert np.linalg.norm(new - old) == pytest.approx(matches[0]["delta_l2"], rel=1e-2)
            np.testing.assert_allclose(new.ravel()[:8], matches[0]["first8"], atol=2e-4)
            compared += 1
    assert compared == len([v for v in final.values() if v["trainable"]])


def torch_views(name: str, new: np.ndarray, old: np.ndarray):
    """(end of the torch name, new, old) of each torch tensor a parameter holds, in torch's layout."""
    if name.startswith("projector."):
        owner, leaf = name.rsplit(".", 1)
        end = f"{TORCH_NAMES[owner]}.{'bias' if leaf == 'bias' else 'weight'}"
        yield end, new.T, old.T
        return
    single = {
        "language.embed.embedding": ("embed_tokens.weight", False),
        "language.head.kernel": ("lm_head.weight", True),
        "language.norm.scale": ("model.norm.weight", False),
    }
    if name in single:
        end, flip = single[name]
        yield end, new.T if flip else new, old.T if flip else old
        return
    inner = name.removeprefix("language.layers.")
    for i in range(len(new)):
        part = {"attn_norm.scale": "input_layernorm", "mlp_norm.scale": "post_attention_layernorm"}
        if inner in part:
            yield f"layers.{i}.{part[inner]}.weight", new[i], old[i]
            continue
        block, layer, leaf = inner.split(".")
        module = f"{'self_attn' if block == 'attn' else 'mlp'}.{layer}_proj"
        tail = f"lora_{leaf[-1].upper()}.default.weight" if is_lora(name) else "weight"
        yield f"layers.{i}.{module}.{tail}", new[i].T, old[i].T
