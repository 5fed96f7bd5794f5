"""A whole training step under each kernel: the loss and every gradient are those of plain attention."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.attention import PLAIN, Choice
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.train.step import make_loss
from tests.tiny import CONFIG, random_batch, random_params

CHUNKED = Choice("chunked", block=8)
SPLASH, TRITON = (Choice(kernel, interpret=True) for kernel in ("splash", "triton"))
WINDOWED = replace(CONFIG, language=replace(CONFIG.language, sliding_window=5))


def packed(turns: bool) -> dict[str, np.ndarray]:
    """Two examples a row; with turns, the second holds two independent questions."""
    batch = random_batch(4)
    second = batch["segments"][:, 13:]
    batch["segments"][:, 13:] = np.where(second > 0, 2, 0)
    batch["positions"][:, 13:] = np.arange(second.shape[1])
    if turns:
        batch["turns"][:, 16:18], batch["turns"][:, 18:] = 1, 2
        batch["positions"][:, 18:] -= 2
    return batch


@cache
def gradients(config: LlavaConfig, choice: Choice, turns: bool, remat: str = "none"):
    """(loss, {name: gradient}) of every parameter, the tower's included."""
    loss = make_loss(config, Compute(attention=choice, turns=turns, remat=remat))
    step = jax.jit(jax.value_and_grad(loss))
    return step(random_params(config), {}, packed(turns))


@pytest.mark.parametrize(
    ("config", "choice", "turns"),
    [
        pytest.param(WINDOWED, CHUNKED, True, id="chunked, window and turns"),
        pytest.param(CONFIG, SPLASH, False, id="splash"),
        pytest.param(CONFIG, CHUNKED, False, id="chunked", marks=pytest.mark.slow),
        pytest.param(CONFIG, TRITON, False, id="triton", marks=pytest.mark.slow),
        pytest.param(WINDOWED, SPLASH, False, id="splash, window", marks=pytest.mark.slow),
    ],
)
def test_loss_and_every_gradient(config, choice, turns):
    loss, grads = gradients(config, choice, turns, remat="full")
    wanted_loss, wanted = gradients(config, PLAIN, turns)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    for name, grad in wanted.items():
        # A key's bias moves all scores of a query alike: its gradient is rounding, of its kernel's scale.
        like = name.replace(".k.bias", ".k.kernel")
        scale = max(float(jnp.abs(wanted[like]).max()), float(jnp.abs(grad).max()), 1e-3)
        np.testing.assert_allclose(grads[name], grad, rtol=0, atol=1e-5 * scale, err_msg=name)
