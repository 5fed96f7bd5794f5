"""Every kernel equals plain attention, forward and backward; Pallas kernels in interpret mode."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.attention import PLAIN, Causal, Choice, attention
from llava_jax.attention.cached import Places, attend

CHUNKED = Choice("chunked", block=64)
SPLASH, TRITON = (Choice(kernel, interpret=True) for kernel in ("splash", "triton"))


def rows(length: int, turns: bool = False, window: int | None = None) -> Causal:
    """Two rows of three packed examples each, and padding."""
    arrays = np.zeros((3, 2, length), np.int32)
    segments, positions, questions = arrays
    for i in range(2):
        cuts = [0, length // 3 + 7 * i, length // 2 + 11, length - 17 - i]
        for n, (start, end) in enumerate(pairwise(cuts), 1):
            segments[i, start:end], positions[i, start:end] = n, np.arange(end - start)
            if turns:
                first = start + (end - start) // 3
                second = (first + end) // 2
                questions[i, first:second], questions[i, second:end] = 1, 2
                positions[i, second:end] = first - start + np.arange(end - second)
    segments, positions, questions = map(jnp.asarray, arrays)
    return Causal(segments, positions, questions if turns else None, window)


def compare(choice: Choice, length: int, seen: Causal | None, heads=2, kv_heads=1, width=128):
    """Output at real tokens and gradients of q, k and v, against plain attention at 1e-5."""
    rng = np.random.default_rng(length)
    shapes = [(2, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    real = 1 if seen is None else (seen.segments > 0)[..., None, None]

    @partial(jax.jit, static_argnums=0)
    def run(choice, q, k, v):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, seen, choice), q, k, v)
        return out * real, *pull(weights * real)

    for got, wanted in zip(run(choice, q, k, v), run(PLAIN, q, k, v)):
        scale = float(jnp.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("length", "seen"),
    [
        (200, {}),
        (300, {"window": 50}),
        (200, {"turns": True}),
        (300, {"turns": True, "window": 50}),
        (300, None),
    ],
    ids=str,
)
def test_chunked_equals_plain(length, seen):
    compare(CHUNKED, length, None if seen is None else rows(length, **seen), heads=4, kv_heads=2)


@pytest.mark.parametrize(
    ("choice", "length", "seen"),
    [
        (SPLASH, 200, {}),
        (SPLASH, 200, {"window": 50}),
        (SPLASH, 200, None),
        (SPLASH, 700, {}),  # two blocks
        (TRITON, 200, {}),
        (TRITON, 200, None),
    ],
    ids=str,
)
def test_pallas_kernels_equal_plain(choice, length, seen):
    compare(choice, length, None if seen is None else rows(length, **seen))


def test_the_towers_heads_are_64_wide():
    compare(SPLASH, 145, None, heads=1, width=64)
    compare(CHUNKED, 145, None, heads=1, width=64)


@pytest.mark.parametrize("choice", [PLAIN, CHUNKED, SPLASH, TRITON], ids=str)
def test_padding_stays_finite_forward_and_backward(choice):
    """A row of nothing but padding, and padding whose output is asked for."""
    segments = jnp.asarray(np.repeat([[0], [1]], 140, axis=1).astype(np.int32)).at[1, 100:].set(0)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 140, 1, 16)), jnp.float32)
    seen = Causal(segments, segments)

    def total(q, k, v):
        return (attention(q, k, v, seen, choice) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(q, q, q)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_bfloat16_weights_are_float32():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 300, 2, 64)), jnp.bfloat16) for _ in range(3))
    seen = rows(300)
    run = jax.jit(partial(attention, seen=seen), static_argnames="choice")
    exact = run(*(x.astype(jnp.float32) for x in (q, k, v)))
    real = seen.segments > 0
    errors = [jnp.abs(run(q, k, v, choice=c) - exact)[real].max() for c in (PLAIN, CHUNKED)]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("choice", [CHUNKED, SPLASH], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1, "fsdp": 2, "tensor": 4},
        {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
    ],
    ids=str,
)
def test_over_a_mesh_equals_one_device(choice, sizes):
    """Rows over data and fsdp, heads over tensor (2 KV heads do not divide by 4), queries over context."""
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    place = NamedSharding(mesh, P(("data", "fsdp")))
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 200, n, 32)), jnp.float32) for n in (4, 2, 2))
    seen = rows(200)

    def run(q, k, v, seen):
        real = (seen.segments > 0)[..., None, None]
        return jnp.sum(jnp.sin(attention(q, k, v, seen, choice)) * real)

    grad = jax.grad(run, (0, 1, 2))
    wanted = jax.jit(grad)(q, k, v, seen)
    with jax.set_mesh(mesh):
        got = jax.jit(grad)(*jax.device_put((q, k, v, seen), place))
    for a, b in zip(got, wanted):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="there is no GPU")
@pytest.mark.parametrize("kernel", ["cudnn", "triton"])
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_kernels_are_as_near_to_float32_as_plain(kernel, causal):
    """In bfloat16, no further from float32 than twice the plain path, forward and backward."""
    rng = np.random.default_rng(3)
    shape = (2, 577 if not causal else 512, 4, 64 if not causal else 128)
    q, k, v, weights = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(4))
    ones = jnp.ones(shape[:2], jnp.int32)
    seen = Causal(ones, ones) if causal else None

    def run(choice, dtype):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        out, pull = jax.vjp(lambda *a: attention(*a, seen, choice), *arrays)
        return [x.astype(jnp.float32) for x in (out, *pull(weights.astype(dtype)))]

    with jax.default_matmul_precision("highest"):
        exact = run(PLAIN, jnp.float32)
    got, plain = run(Choice(kernel), jnp.bfloat16), run(PLAIN, jnp.bfloat16)
    for a, b, wanted in zip(got, plain, exact):
        assert jnp.abs(a - wanted).max() <= 2 * jnp.abs(b - wanted).max()


@pytest.mark.parametrize(("groups", "window"), [(1, None), (2, 20)])
def test_a_new_token_by_the_gpu_kernel_equals_the_loop(groups, window):
    """Over a slot cache of three blocks of 16: slots that are new, full and between."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(4, 1, 2 * groups, 16)), jnp.float32)
    cache = jnp.asarray(rng.normal(size=(2, 3, 4, 2, 16, 16)), jnp.float32)
    at = jnp.asarray([[0], [16], [33], [47]], jnp.int32)
    places = Places(None, at[:, 0], jnp.int32(3))
    wanted = attend(q, *cache, at, places, window)
    np.testing.assert_allclose(attend(q, *cache, at, places, window, TRITON), wanted, atol=1e-6)
    chunk = Places(jnp.asarray([2, 0]), jnp.asarray([16, 0]), jnp.int32(2))
    rows = q.reshape(2, 2, *q.shape[2:]), *cache, jnp.asarray([[16, 17], [0, 1]], jnp.int32), chunk
    np.testing.assert_allclose(attend(*rows, window, TRITON), attend(*rows, window), atol=1e-6)


@pytest.mark.parametrize("width", [24, 8])
def test_a_head_that_triton_does_not_take_goes_by_the_loop(width, monkeypatch):
    """Interpreted, Triton takes any size; on a GPU it refuses those of the shipped tiny model."""
    monkeypatch.setattr("llava_jax.attention.cached.flash_decode", None)
    rng = np.random.default_rng(0)
    cache = [jnp.asarray(rng.normal(size=(3, 2, 1, 16, width)), jnp.float32) for _ in range(2)]
    q = jnp.asarray(rng.normal(size=(2, 1, 2, width)), jnp.float32)
    at = jnp.asarray([[20], [3]])
    given = q, *cache, at, Places(None, at[:, 0], jnp.int32(2)), None
    np.testing.assert_allclose(attend(*given, TRITON), attend(*given), atol=1e-6)
