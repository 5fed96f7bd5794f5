"""`--launcher ray`: what it asks of Ray; two workers of which one is killed, and the run goes on."""

import contextlib
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from llava_jax.cli import main
from llava_jax.errors import ConfigError, Diverged, LlavaError, NotSaved, Stopped
from llava_jax.train import cli as train_cli
from llava_jax.train import ray_launch
from llava_jax.train.log import METRICS, read_metrics
from llava_jax.train.ray_launch import _every_host, _given
from tests.conftest import xla_flags
from tests.train.run import make_data, make_model, overrides
from tests.train.test_processes import end, slurm

HAS_RAY = importlib.util.find_spec("ray") is not None
STEPS = 24


def test_a_worker_a_host_with_all_its_gpus():
    cpu, gpu = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}
    nodes = [{"Alive": True, "Resources": r} for r in (cpu, gpu, gpu)]
    assert _every_host(nodes[:1]) == {"num_workers": 1}
    gone = {"Alive": False, "Resources": gpu}
    found = _every_host([*nodes, gone])
    assert found == {"num_workers": 2, "use_gpu": True, "resources_per_worker": {"GPU": 4}}


def test_scaling_is_name_and_value():
    words = ["num_workers=4", "use_tpu=true", "topology=4x4", "resources_per_worker={'CPU': 1}"]
    assert _given(words) == {
        "num_workers": 4, "use_tpu": True, "topology": "4x4", "resources_per_worker": {"CPU": 1}
    }  # fmt: skip
    with pytest.raises(ConfigError, match="'4' is not NAME=VALUE"):
        _given(["4"])


@pytest.mark.skipif(HAS_RAY, reason="ray is installed")
def test_without_ray_the_extra_is_named(capsys):
    assert main(["train", "--config", "finetune_7b", "--launcher", "ray"]) == 2
    assert "llava_jax[ray]" in capsys.readouterr().err


def ray_without_workers():
    """The modules that `launch` needs; what it asks of Ray is done in this process."""

    class Failed(Exception):
        worker_failures: ClassVar = {}

    class Trainer:
        def __init__(self, work, train_loop_config, **_):
            self.work = lambda: work(train_loop_config)

        def fit(self):
            try:
                return SimpleNamespace(return_value=self.work())
            except Exception as error:
                Failed.worker_failures = {0: error}
            raise Failed

    def record(**given):
        return given

    return {
        "ray": SimpleNamespace(init=record, nodes=list),
        "ray.train": SimpleNamespace(
            ScalingConfig=record, RunConfig=record, FailureConfig=record, TrainingFailedError=Failed
        ),
        "ray.train.v2.jax": SimpleNamespace(JaxTrainer=Trainer, JaxConfig=record),
    }


def no_room():
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "x")
    except OSError as error:
        raise LlavaError("x cannot be written") from error


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: 0, 0),
        (lambda: raises(ConfigError("no such file")), 2),
        (lambda: raises(Diverged("too many steps were skipped")), 65),
        (lambda: raises(NotSaved("the last state is not saved")), 74),
        (no_room, 74),
        (lambda: raises(Stopped("stopped at step 3")), 75),
    ],
)
def test_a_run_ends_with_the_code_that_it_has_without_ray(work, code, monkeypatch):
    modules, run = ray_without_workers(), train_cli.run
    monkeypatch.setattr(ray_launch, "need", lambda module, *_: modules[module])
    monkeypatch.setattr(train_cli, "run", lambda args: run(args) if args.launcher else work())
    assert main(["train", "--config", "finetune_7b", "--launcher", "ray"]) == code


# Two workers ---------------------------------------------------------------------------------------


def command(made, workdir, *words):
    settings = overrides(*made, steps=STEPS, save_every=2, unroll_layers=False)
    return [
        *(sys.executable, "-m", "llava_jax", "train", "--config", "common", "--quiet"),
        *("--workdir", str(workdir), *settings, *words),
    ]


def killed_after_step(number: int, mark: str, workdir: Path, driver: subprocess.Popen) -> int:
    """Kills the worker that does not write the log, once step `number` is in it and one is saved; its id."""
    log = workdir / METRICS
    while driver.poll() is None:
        saved = [x for x in (workdir / "checkpoints").glob("*") if x.name.isdigit()]
        if saved and len(read_metrics(log)) >= number:
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if mark.encode() not in (process / "environ").read_bytes():
                        continue
                    if b"TrainWorker" not in (process / "cmdline").read_bytes():
                        continue
                    if log not in [p.readlink() for p in (process / "fd").iterdir()]:
                        os.kill(int(process.name), signal.SIGKILL)
                        return int(process.name)
        time.sleep(0.02)
    pytest.fail(str(driver.communicate()))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_RAY, reason="pip install 'llava_jax[ray]'")
def test_a_worker_is_killed_and_the_run_goes_on(tmp_path):
    data = make_data(tmp_path / "data", 30)
    made = make_model(tmp_path, data), data
    never, killed = tmp_path / "never", tmp_path / "killed"
    two = [
        subprocess.Popen(
            command(made, never),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for env in slurm(2, devices=2)
    ]
    codes, outs = end(two)
    assert codes == [0, 0], outs
    start, mark = time.time(), f"{tmp_path.name}-{os.getpid()}"
    env = {**os.environ, "XLA_FLAGS": xla_flags(2)}
    env |= {"LLAVA_JAX_TEST_MARK": mark, "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # see slurm
    words = ["--launcher", "ray", "--scaling", "num_workers=2", "--max-failures", "1"]
    driver = subprocess.Popen(
        command(made, killed, *words),
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    victim = killed_after_step(3, mark, killed, driver)
    (code,), (out,) = end([driver], 900)
    assert code == 0, out
    rows, wanted = (
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(w / METRICS)]
        for w in (killed, never)
    )
    assert rows == wanted
    assert "resumed at step" in out
    assert (killed / "export" / "llava_jax.json").is_file()
    import ray

    told = {
        "ray": ray.__version__,
        "steps": STEPS,
        "killed": f"worker 1 of 2, process {victim}, after step 3",
        "resumed": next(x[x.index("resumed at") :] for x in out.splitlines() if "resumed at" in x),
        "rows equal to the run never killed": len(rows),
        "seconds": round(time.time() - start),
    }
    print(json.dumps(told, indent=1))
