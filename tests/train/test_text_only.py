"""Batches without a picture train: the loss of the same rows beside an image slot that nobody uses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.clip import ClipVision
from llava_jax.layers import Compute
from llava_jax.llava import build, merge_images
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.cli import load_config
from llava_jax.train.log import METRICS, read_metrics
from llava_jax.train.loss import mean_loss
from llava_jax.train.optim import make_optimizer
from llava_jax.train.stages import run_stages
from llava_jax.train.step import TrainState, make_loss, make_step
from tests.tiny import CONFIG, random_batch, random_params
from tests.train.run import make_data, make_model, overrides
from tests.train.test_step import settings


def text_batch(images: int, rows: int = 8):
    """Rows of text alone, with `images` slots that no position uses."""
    batch = random_batch(rows)
    batch["slots"] = np.full_like(batch["slots"], -1)
    batch["images"] = np.zeros((rows, images, *batch["images"].shape[2:]), np.uint8)
    return batch


def one_step(mesh, images: int, micro: int = 1):
    params = random_params(CONFIG, 1)
    names = [n for n in params if n.startswith(("projector.", "language."))]
    trained = {n: jnp.array(params[n]) for n in sorted(names)}
    frozen = {n: v for n, v in params.items() if n not in names}
    optimizer, _ = make_optimizer(settings(weight_decay=0.0), names, 4)
    step = jax.jit(make_step(make_loss(CONFIG, Compute()), optimizer, average="global", seed=None))
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained))
    with jax.set_mesh(mesh):
        return step(state, frozen, put_batch(text_batch(images), mesh, micro))


@pytest.fixture(scope="module")
def with_slot():
    return one_step(make_mesh(devices=jax.devices()[:1]), images=1)[1]


@pytest.mark.parametrize(
    ("sizes", "micro"),
    [({}, 1), ({"data": 8, "fsdp": 1}, 1), ({"fsdp": 8}, 1), ({"fsdp": 2, "tensor": 4}, 4)],
    ids=["one device", "data", "fsdp", "tensor, accumulated"],
)
def test_a_batch_without_pictures_has_the_loss_of_its_rows(with_slot, sizes, micro):
    mesh = make_mesh(**sizes) if sizes else make_mesh(devices=jax.devices()[:1])
    _, metrics = one_step(mesh, images=0, micro=micro)
    assert metrics["ok"]
    # Not the parameters: Adam's first step turns a rounding error of a tiny gradient into its sign.
    for name in ("loss", "grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(with_slot[name]), rel=1e-5)


def test_the_projector_stays_where_it_is_without_pictures():
    """Zero gradient, zero moments, no decay: as torch's AdamW treats a gradient of zeros."""
    start = random_params(CONFIG, 1)
    for name, value in one_step(make_mesh(fsdp=8), images=0)[0].params.items():
        if name.startswith("projector."):
            np.testing.assert_array_equal(value, start[name], err_msg=name)


def test_no_image_is_a_size_everywhere():
    """M = 0 images through the tower, no rows to splice, no supervised position."""
    model = build(CONFIG, random_params(CONFIG, 1))
    size = CONFIG.vision.image_size
    features = model.image_features(jnp.zeros((0, size, size, 3), jnp.uint8))
    assert features.shape == (0, CONFIG.image_tokens, CONFIG.vision.width)
    assert isinstance(model.vision, ClipVision)
    text = jnp.ones((2, 3, 4))
    merged = merge_images(text, jnp.zeros((2, 0, 4)), jnp.full((2, 3), -1))
    np.testing.assert_array_equal(merged, text)
    nothing = jnp.zeros((4, 0))
    assert float(mean_loss(nothing, nothing.astype(jnp.int32), groups=2)) == 0.0


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Every other record has no picture; buckets as a user has them."""
    folder = tmp_path_factory.mktemp("mixed")
    data = make_data(folder / "data", 16)
    records = json.loads(data.read_text())
    for record in records[::2]:
        record.pop("image", None)
        for turn in record["conversations"]:
            turn["value"] = turn["value"].replace("<image>\n", "")
    data.write_text(json.dumps(records))
    return make_model(folder, data), data


@pytest.mark.slow  # quick: stage 2 of tests/rehearsal/test_recipes.py groups its mixture
@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_grouped_by_modality_trains(mixed, tmp_path, pack):
    config = load_config("finetune_7b", overrides(*mixed, **{"batch_size": 8, "data.pack": pack}))
    with config.unlocked():  # the defaults, which the other runs of these tests change
        config.data.image_buckets = (0, 1, 2, 4, 8, 16, 32, 64)
        config.data.target_buckets = ()
    config.steps, config.mesh.fsdp, config.mesh.data = 4, 4, 2
    if pack:
        config.mesh.data = 1  # a batch of 8 packs into fewer rows than devices
        config.mesh.fsdp, config.mesh.tensor = 1, 8
    run_stages(config, tmp_path, quiet=True)
    rows = read_metrics(tmp_path / METRICS)
    assert len(rows) == 4
    assert all(np.isfinite(r["loss"]) and r["ok"] for r in rows)
