"""Packed rows train what unpacked ones do: the same loss and gradients, with fewer of both."""

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.layers import Compute
from llava_jax.train.step import make_loss
from tests.data.test_loader import MODEL, loader, make_data
from tests.tiny import random_params


def test_a_packed_step_equals_the_unpacked_one(tmp_path):
    """Loss and every gradient of projector and language model, in two groups of rows."""
    make_data(tmp_path)
    batch_size = 12
    plain, info = loader(tmp_path, batch_size=batch_size).load(1)
    settings = {"batch_size": batch_size, "pack": "exact", "pack_length": 128}
    packed, other = loader(tmp_path, parts=2, **settings).load(1)
    assert sorted(info["ids"]) == sorted(other["ids"])
    assert len(packed["tokens"]) < len(plain["tokens"])
    assert len(packed["images"]) == len(packed["targets"]) == 2
    params = random_params(MODEL, 1)
    # Not the tower's: the gradient of a key's bias is 0 but for rounding.
    tower = {name: params.pop(name) for name in list(params) if name.startswith("vision")}
    step = jax.jit(jax.value_and_grad(make_loss(MODEL, Compute())))
    (loss, grads), (packed_loss, packed_grads) = (step(params, tower, b) for b in (plain, packed))
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for name, grad in grads.items():
        scale = float(jnp.abs(grad).max())
        np.testing.assert_allclose(packed_grads[name], grad, atol=1e-5 * scale, err_msg=name)
