"""No host holds the whole model: not when a run starts, and not when it exports."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from llava_jax.convert import load_checkpoint, save_checkpoint
from llava_jax.params import parameter_shapes
from tests.train.run import make_data, make_model, overrides
from tests.train.test_processes import end, slurm

LAYERS, WIDTH = 24, 320


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(model, data, bytes of the model): a language model of many equal layers."""
    folder = tmp_path_factory.mktemp("large")
    data = make_data(folder / "data", 8)
    small = load_checkpoint(make_model(folder, data))
    language = dataclasses.replace(
        small.config.language, layers=LAYERS, width=WIDTH, heads=5, kv_heads=5, head_width=64,
        mlp_width=4 * WIDTH,
    )  # fmt: skip
    config = dataclasses.replace(small.config, language=language)
    rng = np.random.default_rng(0)
    params = {
        name: np.ones(shape, np.float32)
        if name.endswith(".scale")
        else rng.standard_normal(shape, np.float32) * np.float32(0.02)
        for name, shape in parameter_shapes(config).items()
    }
    model = dataclasses.replace(small, config=config, params=params)
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    return save_checkpoint(model, folder / "large", to="jax"), data, size


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_two_processes_share_the_memory_of_start_and_export(large, tmp_path):
    model, data, size = large
    processes = []
    for index, env in enumerate(slurm(2, devices=2)):
        words = overrides(
            model, data, steps=1, batch_size=4, trainable="language,projector", unroll_layers=False
        )
        command = [sys.executable, "-m", "tests.train.measured", str(tmp_path / f"{index}.json")]
        command += ["--config", "common", "--quiet", "--workdir", str(tmp_path / "run"), *words]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    codes, outs = end(processes)
    assert codes == [0, 0], outs
    for index in range(2):
        found = json.loads((tmp_path / f"{index}.json").read_text())
        found = {name: round(value / size, 3) for name, value in found.items()}
        print(size, found)
        assert found["read"] < 0.51, found
        assert found["reading"] < 0.65, found
        assert found["export"] < 0.3, found
    before, after = (load_checkpoint(f).params for f in (model, tmp_path / "run" / "export"))
    assert before.keys() == after.keys()
    for name in ("language.layers.mlp.up.kernel", "vision.layers.mlp.fc1.kernel"):
        np.testing.assert_allclose(after[name], before[name], atol=1e-2)
