"""The table that a run prints before its first step: what lies where, and the bytes on a device."""

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.sharding import make_mesh
from llava_jax.train.config import load_config
from llava_jax.train.placement import bytes_on_a_device, kind, placement
from llava_jax.train.program import abstract_batch, make_program, planned_params


def test_kinds_of_parameters():
    assert kind("language.layers.attn.q.kernel") == "language attention"
    assert kind("language.layers.attn.q.lora_a") == "language adapters"
    assert kind("language.head.kernel") == kind("language.embed.embedding") == "language vocabulary"
    assert kind("vision.tail.layers.norm1.scale") == "vision norms and biases"
    assert kind("vision.patch_embed.kernel") == "vision matrices"


def test_the_7b_on_eight_devices():
    config = load_config("finetune_7b", ["--config.mesh.tensor=2"])
    mesh, model = make_mesh(**config.mesh), LlavaConfig.v15_7b()
    program = make_program(config, model, planned_params(model, mesh), mesh, 10)
    tokens = np.zeros((8, 2048), np.int32)
    batch = abstract_batch({"tokens": tokens}, mesh, 1)
    rows = [line.split() for line in placement(program.state, program.frozen, batch).split("\n")]
    wide = [line for line in rows if line[:2] == ["language", "MLP"]]
    # 32 layers x 3 matrices of 4096 x 11008, in float32, an eighth of them.
    count = 32 * 3 * 4096 * 11008
    assert wide == [
        ["language", "MLP", f"{count:,}", "trained", "float32", "fsdp", "x", "tensor", f"{count / 2e6:,.1f}"]
    ]  # fmt: skip
    trained = bytes_on_a_device(program.state.params)
    assert rows[-2] == ["optimizer", f"{2 * trained / 1e6:,.1f}"]
    assert rows[-1] == ["batch", f"{tokens.nbytes / 4e6:,.1f}"]
