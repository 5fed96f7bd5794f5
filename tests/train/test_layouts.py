"""Every mesh computes the same: loss and every gradient, as one device does, packed rows too."""

import math

import jax
import numpy as np
import pytest

from llava_jax.layers import Compute
from llava_jax.llava import param_shardings
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.step import make_loss
from tests.tiny import CONFIG, random_batch, random_params

MESHES = [{"context": 2, "fsdp": 2, "tensor": 2}]
PARTS = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"context": 2, "fsdp": 4}]  # of its axes


def packed_batch():
    """Rows of 32 positions that hold two examples, which do not see each other."""
    batch = random_batch(8, length=32)
    batch["positions"][:, 16:] -= 16
    batch["segments"][:, 16:] += 1
    return batch


def computed(**sizes):
    """(loss, {name: gradient}) of all parameters, in float32."""
    mesh = make_mesh(**sizes, devices=None if sizes else jax.devices()[:1])
    batch = put_batch(packed_batch(), mesh, 1)
    shardings = param_shardings(CONFIG, mesh)
    params, loss = jax.device_put(random_params(CONFIG, 1), shardings), make_loss(CONFIG, Compute())
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(lambda p, b: loss(p, {}, b)), out_shardings=(None, shardings)
        )
        found = step(params, {name: x[0] for name, x in batch.items()})
    kernel = found[1]["language.layers.mlp.up.kernel"]
    assert math.prod(kernel.sharding.shard_shape(kernel.shape)) * mesh.size == kernel.size
    return jax.device_get(found)


@pytest.fixture(scope="module")
def alone():
    return computed()


@pytest.mark.parametrize(
    "sizes", [*MESHES, *(pytest.param(s, marks=pytest.mark.slow) for s in PARTS)], ids=str
)
def test_loss_and_every_gradient_are_those_of_one_device(sizes, alone):
    (loss, grads), (wanted, theirs) = computed(**sizes), alone
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for name, value in theirs.items():
        # Softmax does not see a bias of the keys: its gradient is rounding, held against its kernel's.
        of = name.replace("attn.k.bias", "attn.k.kernel")
        limit = 1e-5 * np.abs(theirs[of]).max()
        np.testing.assert_allclose(grads[name], value, rtol=0, atol=limit, err_msg=name)
