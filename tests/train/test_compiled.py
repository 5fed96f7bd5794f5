"""What the compiled step does, and what it leaves out: read from its program, or held to the same result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig
from llava_jax.layers import REMAT_POLICIES, Compute
from llava_jax.llava import abstract_params, build
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.config import load_config
from llava_jax.train.control import Flags, put_flags
from llava_jax.train.program import make_program, planned_params
from llava_jax.train.step import TrainState, make_loss, make_step
from tests import hlo
from tests.tiny import grouped, random_batch, random_params

# Sizes that tell in a product what was multiplied.
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=26, layers=3, heads=2, mlp_width=58),
    language=LanguageConfig(
        vocab_size=104,
        width=40,
        layers=4,
        heads=4,
        kv_heads=2,
        head_width=14,
        mlp_width=88,
        max_positions=64,
    ),
    max_length=64,
)
ROWS, LENGTH, TARGETS = 3, 19, 6  # 57 positions: no other size of the model, nor of attention
COMPUTES = [Compute(remat=name) for name in ("none", *REMAT_POLICIES)] + [Compute(unroll=True)]


def batch_of(**changes):
    return random_batch(ROWS, LENGTH, config=CONFIG, **changes)


# Equal results -------------------------------------------------------------------------------------


def whole_loss(params, batch):
    """The loss by logits of every position, from every layer's whole output."""
    model = build(CONFIG, params)
    logits = model.logits(model(batch)).reshape(len(batch["targets"]), -1, 104)  # [G, B / G * T, V]
    nll = -jnp.take_along_axis(
        jnp.take_along_axis(jax.nn.log_softmax(logits), batch["target_at"][..., None], axis=1),
        jnp.maximum(batch["targets"], 0)[..., None],
        axis=2,
    )[..., 0]
    held = batch["targets"] != -100
    return jnp.where(held, nll, 0).sum() / held.sum()


# Three recompute nothing, little, or by unrolled layers; the others differ in what is kept.
QUICK = ("none", "minimal")
MARKED = [
    c if c.unroll or c.remat in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in COMPUTES
]


@pytest.fixture(scope="module")
def whole():
    batch = grouped(batch_of(), 1)
    return jax.jit(jax.value_and_grad(whole_loss))(random_params(CONFIG, 1), batch)


@pytest.mark.parametrize("compute", MARKED, ids=lambda c: "unrolled" if c.unroll else c.remat)
def test_supervised_positions_and_recomputation_give_loss_and_gradients_of_the_whole(
    compute, whole
):
    loss, batch = make_loss(CONFIG, compute), grouped(batch_of(), 1)
    value, grads = jax.jit(jax.value_and_grad(lambda p: loss(p, {}, batch)))(
        random_params(CONFIG, 1)
    )
    assert float(value) == pytest.approx(float(whole[0]), abs=1e-5)
    for name, wanted in whole[1].items():
        # Softmax does not see a bias of the keys: its gradient is rounding, held against its kernel's.
        scale = np.abs(whole[1][name.replace("k.bias", "k.kernel")]).max()
        np.testing.assert_allclose(grads[name], wanted, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    loss, params = make_loss(CONFIG, Compute()), random_params(CONFIG, 1)
    start = jax.device_get(params)
    rule = optax.sgd(1.0)  # the new parameters are the old ones less the gradient
    batch = random_batch(4, LENGTH, config=CONFIG)

    def stepped(micro):
        step = jax.jit(make_step(loss, rule, average="global", seed=None))
        pieces = {n: v.reshape(micro, len(v) // micro, *v.shape[1:]) for n, v in batch.items()}
        state, metrics = step(TrainState(jnp.int32(0), params, rule.init(params)), {}, pieces)
        return metrics["loss"], {n: start[n] - np.asarray(v) for n, v in state.params.items()}

    (value, grads), (wanted_value, wanted) = stepped(2), stepped(1)
    assert float(value) == pytest.approx(float(wanted_value), abs=1e-5)
    for name, gradient in wanted.items():
        size = max(np.abs(gradient).max(), np.abs(start[name]).max() * 1e-2)
        np.testing.assert_allclose(grads[name], gradient, rtol=0, atol=1e-5 * size, err_msg=name)


# Work that is not done -----------------------------------------------------------------------------


@functools.cache
def compiled(trainable, images=1, remat="none", micro=1, dtype="float32"):
    """(the compiled step of a run, its program)."""
    words = [f"trainable={trainable}", f"remat={remat}", f"dtype={dtype}", "data.max_length=64"]
    words.append(f"grad_accum={micro}")
    config = load_config("pretrain_7b", [f"--config.{word}" for word in words])
    mesh = make_mesh(devices=jax.devices()[:1])
    program = make_program(config, CONFIG, planned_params(CONFIG, mesh), mesh, 10)
    with jax.set_mesh(mesh):
        rows = random_batch(ROWS * micro, LENGTH, images, config=CONFIG)
        batch = put_batch(rows, mesh, micro)
        args = program.state, program.frozen, batch, put_flags(Flags(), mesh)
        return program.step.lower(*args).compile(), program


def forward_flops():
    """{part: operations of its matrix products, forward}, attention in full."""
    v, t, tokens = CONFIG.vision, CONFIG.language, ROWS * LENGTH
    heads, keys = t.heads * t.head_width, t.kv_heads * t.head_width
    weights = t.width * (2 * heads + 2 * keys + 3 * t.mlp_width)
    patches = v.patches + 1
    layer = patches * (4 * v.width**2 + 2 * v.width * v.mlp_width) + 2 * patches**2 * v.width
    tower = CONFIG.vision_layers_run * layer + v.patches * 3 * v.patch_size**2 * v.width
    return {
        "decoder": 2 * t.layers * tokens * weights,
        "attention": 4 * t.layers * tokens * LENGTH * heads,
        "head": 2 * ROWS * TARGETS * t.width * t.vocab_size,
        "tower": 2 * ROWS * tower,
        "projector in": 2 * ROWS * v.patches * v.width * t.width,
        "projector out": 2 * ROWS * v.patches * t.width**2,
    }


def test_stage_1_multiplies_each_frozen_weight_twice_and_has_no_gradient_of_one():
    """4ND: forward, and the gradient of the input."""
    step, program = compiled("projector")
    part = forward_flops()
    wanted = 2 * (part["decoder"] + part["head"]) + 3 * part["attention"] + part["tower"]
    wanted += 2 * part["projector in"] + 3 * part["projector out"]
    assert wanted / 1.03 <= hlo.flops(step) <= wanted * 1.03
    # The gradient of a weight sums over all positions, which only the products of a weight do.
    assert not [dot for dot in hlo.dots(step) if dot.summed == (ROWS * LENGTH,)]
    assert all(name.startswith("projector.") for name in program.state.params)


def test_the_last_layer_and_the_head_work_at_supervised_positions_alone():
    step, _ = compiled("projector,language")
    part, t = forward_flops(), CONFIG.language
    others = 2 * t.width * (t.heads * t.head_width + 3 * t.mlp_width)  # o and the MLP, a position
    spared = others * (ROWS * LENGTH - ROWS * TARGETS)
    wanted = 3 * (part["decoder"] - spared + part["head"] + part["attention"]) + part["tower"]
    wanted += 2 * part["projector in"] + 3 * part["projector out"]
    assert wanted / 1.03 <= hlo.flops(step) <= wanted * 1.03
    assert [dot for dot in hlo.dots(step) if dot.summed == (ROWS * LENGTH,)]


def test_rows_without_pictures_run_no_tower():
    step, _ = compiled("projector,language", images=0)
    of_tower = {CONFIG.vision.width, CONFIG.vision.mlp_width, 3 * 14 * 14}
    assert not [dot for dot in hlo.dots(step) if dot.sizes & of_tower]
    assert [dot for dot in hlo.dots(compiled("projector,language")[0]) if dot.sizes & of_tower]


def test_the_state_is_donated():
    step, program = compiled("projector,language")
    leaves = jax.tree.leaves(program.state)
    assert step.as_text().partition("entry_computation_layout")[0].count("may-alias") == len(leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert step.memory_analysis().alias_size_in_bytes == pytest.approx(size, rel=0.01)


@pytest.mark.slow  # quick: test_accumulated_gradients_are_those_of_the_whole_batch
def test_accumulation_holds_one_float32_copy_of_the_gradients():
    def temporary(micro):
        step, program = compiled("projector,language", 1, "full", micro, "bfloat16")
        trained = 4 * sum(leaf.size for leaf in program.state.params.values())
        return step.memory_analysis().temp_size_in_bytes / trained

    alone, two, four = (temporary(micro) for micro in (1, 2, 4))
    assert four == pytest.approx(two, abs=0.1)  # what grows is the batch
    assert four < alone + 1.5  # the sum, and in bfloat16 the gradient of the micro-batch in hand


# What is kept for the backward pass ----------------------------------------------------------------


def kept(trained, compute, config=CONFIG):
    """[(shape, bytes)] of what the forward pass keeps, without parameters and the batch."""
    shapes = abstract_params(config)
    own = {n: v for n, v in shapes.items() if n.startswith(trained)}
    frozen = {n: v for n, v in shapes.items() if n not in own}
    loss, batch = make_loss(config, compute), batch_of()

    def residuals(own, frozen):
        return jax.vjp(lambda p: loss(p, frozen, batch), own)[1]

    given = {(leaf.shape, leaf.dtype) for leaf in (*shapes.values(), *batch.values())}
    leaves = jax.tree.leaves(jax.eval_shape(residuals, own, frozen))
    return [(x.shape, x.size * x.dtype.itemsize) for x in leaves if (x.shape, x.dtype) not in given]


@pytest.mark.parametrize("remat", ["dots", "minimal", "full", "offload"])
def test_a_layer_keeps_what_the_document_says(remat):
    """docs/training.md, "Memory and recomputation", in numbers a token of stage 1, whose stack is whole."""
    t = CONFIG.language
    qkv = (t.heads + 2 * t.kv_heads) * t.head_width
    numbers = {"minimal": 2 * t.width + qkv, "dots": 2 * t.width + qkv + 2 * t.mlp_width}
    stacked = [x for x in kept("projector.", Compute(remat=remat)) if x[0][:1] == (t.layers,)]
    assert sum(size for _, size in stacked) == 4 * t.layers * ROWS * LENGTH * numbers.get(
        remat, t.width
    )


def test_frozen_layers_keep_no_inputs_of_their_weights():
    flat = ROWS * LENGTH  # products of weights are two-dimensional
    whole = kept(("projector.", "language."), Compute())
    assert [shape for shape, _ in whole if shape[1:2] == (flat,) and len(shape) == 3]
    frozen = kept("projector.", Compute())
    assert not [shape for shape, _ in frozen if shape[1:2] == (flat,) and len(shape) == 3]
    tower = {CONFIG.vision.width, CONFIG.vision.mlp_width}
    held = [shape for shape, _ in frozen if tower & set(shape)]
    assert held == [
        (ROWS * CONFIG.image_tokens, CONFIG.vision.width)
    ]  # what the projector is given
