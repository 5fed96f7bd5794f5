"""The command itself, as a process: it starts, answers, and ends by SIGTERM after what runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from llava_jax import cli
from llava_jax.errors import ConfigError
from llava_jax.serve.server import listen


def test_sigterm_finishes_what_runs():
    words = [sys.executable, "-m", "llava_jax", "serve", "--port=0", "--slots=4"]
    env = {k: v for k, v in os.environ.items() if k != "LLAVA_JAX_API_KEY"}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        key = re.search(r"made for this run: (\S+)", lines[1])
        found = re.search(r"tiny answers at http://127.0.0.1:(\d+)/v1", lines[2])
        assert key, lines
        assert found, lines
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400}
        body["logit_bias"] = {"2": -100}
        url = f"http://127.0.0.1:{found[1]}/v1/chat/completions"
        head = {"Authorization": f"Bearer {key[1]}"}
        with httpx.stream("POST", url, json={**body, "stream": True}, headers=head) as reply:
            rest = reply.iter_lines()
            next(rest)
            process.send_signal(signal.SIGTERM)
            told = list(rest)
        assert "data: [DONE]" in told
        assert '"finish_reason": "length"' in "".join(told)
        assert process.wait(20) == 0
        assert process.stderr is not None
        told = process.stderr.read().splitlines()
        # Where nobody resized a photograph yet, that is compiled and said.
        assert [line for line in told if not line.startswith("INFO: compiled the loops")] == []
    finally:
        process.kill()
        process.communicate()
    assert threading.active_count() < 100


def test_a_taken_port_is_said_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen"):
            listen("127.0.0.1", port)
        assert cli.main(["serve", "--port", str(port), "--api-key", "a"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("port", [-1, 65_536, 99_999, 2**40])
def test_a_port_that_is_none_is_refused(port):
    """Left to the system, 99999 would listen at 34463."""
    with pytest.raises(ConfigError, match=f"port is {port}, but must be from 0 to 65,535"):
        listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["cats"], "is not NAME=DIR"),
        (["cats=a", "cats=b"], "names one that is there"),
        (["tiny=a"], "both called 'tiny'"),
        (["cats=nowhere"], "no such folder"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(capsys, given, says):
    words = [word for one in given for word in ("--adapter", one)]
    assert cli.main(["serve", "--port=0", "--api-key=a", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_limit_that_means_nothing_is_refused(capsys):
    assert cli.main(["serve", "--slots", "0"]) == 2
    assert "slots is 0" in capsys.readouterr().err
