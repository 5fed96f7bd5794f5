"""--profile: which steps it traces, and the operations that took longest."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from llava_jax.errors import ConfigError
from llava_jax.train.profiling import Profile, operations, parse_steps


def event(name, start, duration, op=True):
    stats = [("hlo_op", name)] if op else []
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats)


def test_an_operation_counts_without_what_runs_inside_it():
    ops = [
        event("while.1", 0, 100),
        event("%dot.2 = f32[8] dot(a)", 10, 30),
        event("dot.2", 50, 20),
    ]
    device = SimpleNamespace(
        name="/device:TPU:0",
        lines=[SimpleNamespace(name="XLA Ops", events=ops),
               SimpleNamespace(name="Steps", events=[event("1", 0, 500)])],
    )  # fmt: skip
    host = SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(
        name="python", events=[event("sleep", 0, 900, op=False)])])  # fmt: skip
    seconds, calls = operations(SimpleNamespace(planes=[device, host]))
    assert seconds == pytest.approx({"while.1": 50e-9, "dot.2": 50e-9})
    assert calls == {"while.1": 1, "dot.2": 2}


def test_the_steps_that_were_asked_for_are_traced(tmp_path, caplog):
    caplog.set_level("INFO", "llava_jax")
    profile, product = Profile("2:2", tmp_path, 0, 4), jax.jit(lambda x: x @ x)
    x = product(jnp.ones((64, 64)))
    for done in range(4):
        profile.between(done, x)
        assert profile._runs == (done == 1)
        x = product(x)
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert "what took longest" in caplog.text
    profile.close()


@pytest.mark.parametrize(
    ("start", "total", "said"),
    [
        (0, 12, "--profile 14:16 traces nothing: the run has steps 1 to 12"),
        (16, 20, "--profile 14:16 traces nothing: the run has steps 17 to 20"),
        (14, 15, "--profile 14:16 traces steps 15 to 15 only"),
        (0, 20, "--profile 14:16 traced nothing: the run ended before these steps"),
    ],
)
def test_steps_that_a_run_has_not_are_named(tmp_path, caplog, start, total, said):
    Profile("14:16", tmp_path, start, total).close()
    assert said in caplog.text


@pytest.mark.parametrize("text", ["3", "5:4", "0:2", "a:b"])
def test_what_is_no_range_of_steps_is_refused(text):
    with pytest.raises(ConfigError, match="is not FROM:TO"):
        parse_steps(text)
