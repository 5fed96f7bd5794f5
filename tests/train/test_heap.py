"""malloc's settings: where they are changed and where they are left alone."""

import platform
import subprocess
import sys

import pytest

CALL = "from llava_jax.train.heap import keep_freed_memory as k; import sys; print(k(), 'jax' in sys.modules)"


def run(platforms):
    out = subprocess.run(
        [sys.executable, "-c", CALL],
        capture_output=True,
        text=True,
        check=True,
        env={"JAX_PLATFORMS": platforms, "PATH": ""},
    )
    return out.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_on_the_cpu_it_is_done_before_jax_is_there():
    assert run("cpu") == ["True", "False"]


def test_with_an_accelerator_nothing_is_changed():
    assert run("cuda,cpu") == ["False", "False"]
