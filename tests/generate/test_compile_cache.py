"""Where compiled programs are kept, and where they are not."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import os, jax, jax.numpy as jnp
if "JOINED" in os.environ:
    jax.distributed.initialize(os.environ["JOINED"], 1, 0)
from llava_jax.generate.compile_cache import use_compile_cache
print(use_compile_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8))).block_until_ready()
"""


def run(**env) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "LLAVA_JAX"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**kept, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "LLAVA_JAX_CACHE"])
def test_programs_are_kept_in_the_users_cache_or_where_the_variable_says(tmp_path, variable):
    folder = run(**{"XDG_CACHE_HOME": "/none", variable: str(tmp_path)})
    assert folder.startswith(str(tmp_path))
    assert [p for p in tmp_path.rglob("*-cache") if p.is_file()]


def test_nothing_is_kept_where_it_is_off_or_jax_has_a_cache_or_there_is_no_folder(tmp_path):
    assert run(LLAVA_JAX_CACHE="off", XDG_CACHE_HOME=str(tmp_path)) == "None"
    theirs = tmp_path / "theirs"
    assert run(JAX_COMPILATION_CACHE_DIR=str(theirs), XDG_CACHE_HOME=str(tmp_path)) == "None"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    on_cpus = {"JOINED": address, "JAX_PLATFORMS": "cpu"}
    assert run(**on_cpus, XDG_CACHE_HOME=str(tmp_path)) == "None"  # gloo aborts with a cache
    (tmp_path / "file").touch()
    assert run(LLAVA_JAX_CACHE=str(tmp_path / "file" / "x")) == "None"
    assert not (tmp_path / "llava_jax").exists()
