"""The model of a run: weights that are not finite, adapters that are continued, no tokenizer."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import LoraConfig
from llava_jax.convert import load_checkpoint, save_checkpoint
from llava_jax.convert.io.lazy import Leaf
from llava_jax.errors import ConfigError, WeightError
from llava_jax.images.pixels import pixels_of
from llava_jax.llava import build, init_params
from llava_jax.params import is_lora
from llava_jax.sharding import make_mesh
from llava_jax.train import model_io
from llava_jax.train.cli import load_config
from llava_jax.train.model_io import Stream, check_finite, open_model, read_params, save_model
from llava_jax.train.stages import run_stages
from llava_jax.train.steps import open_loader
from tests.tiny import CONFIG, random_batch, random_params
from tests.train.run import make_data, make_model, overrides


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model_io")
    data = make_data(folder / "data", 8)
    return make_model(folder, data), data


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named_before_the_first_step(made, tmp_path, value):
    checkpoint = load_checkpoint(made[0])
    params = {name: np.array(v) for name, v in checkpoint.params.items()}
    params["language.layers.mlp.up.kernel"][1, 0, 0] = value
    params["projector.linear_0.bias"][2] = value
    broken = dataclasses.replace(checkpoint, params=params)
    folder = save_checkpoint(broken, tmp_path / "broken", to="jax")
    config = load_config("common", overrides(folder, made[1]))
    with pytest.raises(WeightError) as info:
        run_stages(config, tmp_path / "run", quiet=True)
    text = str(info.value)
    assert str(folder) in text
    assert "projector.linear_0.bias is not finite, nor are 1 more tensors" in text
    assert "inspect MODEL --values" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_layer_is_named_and_what_is_never_run_is_not_looked_at():
    params = random_params(CONFIG, 1)
    check_finite(params, "model")
    unused = {n: v * np.nan for n, v in params.items() if n.startswith("vision.tail.")}
    assert unused
    check_finite({**params, **unused}, "model")
    name = "language.layers.attn.q.kernel"
    broken = {**params, name: params[name].at[1, 3, 2].set(np.inf)}
    with pytest.raises(WeightError, match=f"{name} is not finite in layer 1"):
        check_finite(broken, "model")


@pytest.fixture(scope="module")
def adapter(made, tmp_path_factory):
    """The model with trained adapters of rank 4 and alpha 8."""
    checkpoint = load_checkpoint(made[0])
    config = dataclasses.replace(checkpoint.config, lora=LoraConfig(4, 8.0, 0.0))
    params = {**init_params(config), **checkpoint.params}
    params = {n: v + 0.1 if n.endswith(".lora_b") else v for n, v in params.items()}
    whole = dataclasses.replace(checkpoint, config=config, params=params)
    return save_checkpoint(whole, tmp_path_factory.mktemp("adapter") / "model", to="jax")


def test_an_adapter_that_is_continued_keeps_its_rank_and_alpha(made, adapter):
    def config(**changes):
        trainable = "('projector','lora')"
        return load_config("common", overrides(adapter, made[1], trainable=trainable, **changes))

    assert open_model(config()).config.lora == LoraConfig(4, 8.0, 0.0)
    same = open_model(config(lora_rank=4, lora_alpha=8.0, lora_dropout=0.1)).config.lora
    assert same == LoraConfig(4, 8.0, 0.1)
    for other, says in (
        ({"lora_rank": 4}, "lora_alpha 256 differs from the adapter that .* holds: 8"),
        ({"lora_rank": 8, "lora_alpha": 8.0}, "lora_rank 8 differs from .* holds: 4"),
        ({"lora_rank": 4, "lora_alpha": 8.0, "lora_dora": True}, "lora_dora True differs"),
    ):
        with pytest.raises(ConfigError, match=says) as info:
            open_model(config(**other))
        assert "lora_rank=0" in str(info.value)


def test_a_model_without_tokenizer_is_refused_before_its_weights_are_read(
    made, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    shutil.copytree(made[0], folder)
    for path in folder.rglob("tokenizer*"):
        path.unlink()
    monkeypatch.setattr(model_io, "read_params", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"there is no tokenizer"):
        run_stages(load_config("common", overrides(folder, made[1])), tmp_path / "run", quiet=True)


def test_a_tower_or_projector_that_is_not_read_is_named(made, caplog):
    def said(**settings):
        caplog.clear()
        open_model(load_config("common", overrides(*made, **settings)))
        return caplog.text

    assert not said()
    assert "model.vision_tower clip is not read: " in said(**{"model.vision_tower": "clip"})
    assert "model.projector linear has no effect: " in said(**{"model.projector": "linear"})


def test_a_new_adapter_is_made_where_it_lies(made):
    changes = {"lora_rank": 4, "trainable": "('lora',)"}
    opened = open_model(load_config("common", overrides(*made, **changes)))
    params = read_params(opened, 0, make_mesh(fsdp=8))
    kernel = params["language.layers.attn.q.lora_a"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape


@pytest.mark.slow  # quick: tests/train/test_loop.py::test_qlora_leaves_the_base_to_the_bit_and_exports_the_moving_average
def test_new_adapters_change_nothing_over_a_quantised_base(made):
    changes = {"lora_rank": 4, "trainable": "lora", "quantize": "nf4", "lora_dora": True}
    changes["lora_targets"] = r"language,projector,re:vision\.layers\.attn\.[qv]"
    opened = open_model(load_config("common", overrides(*made, **changes)))
    assert opened.config.lora
    assert len(opened.config.lora.targets) == 7 + 2 + 2
    params = read_params(opened, 0, make_mesh(fsdp=8))
    assert params["language.layers.mlp.up.codes"].dtype == jnp.uint8
    assert "language.layers.mlp.up.kernel" not in params
    batch = random_batch(8, config=opened.config)
    base = {n: v for n, v in params.items() if not is_lora(n)}
    without = dataclasses.replace(opened.config, lora=None)
    wanted = jax.jit(lambda p: build(without, p)(batch))(base)
    found = jax.jit(lambda p: build(opened.config, p)(batch))(params)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_what_is_not_trained_is_exported_as_it_was_read(made, tmp_path):
    """float16 files, trained in the config's own bfloat16, which would round them."""
    halves = save_checkpoint(load_checkpoint(made[0]), tmp_path / "fp16", to="jax", dtype="fp16")
    # On cropped pixels and another template's prompts, which are exported, too.
    changes = {"data.image_aspect_ratio": "square", "data.version": "llava_v1"}
    values = overrides(halves, made[1], steps=1, dtype="bfloat16", trainable="projector", **changes)
    config = load_config("common", values)
    export = run_stages(config, tmp_path / "run", quiet=True)
    found = load_checkpoint(export)
    assert (found.config.image_aspect_ratio, found.config.template) == ("square", "llava_v1")
    loader = open_loader(config, open_model(config), make_mesh())
    batch, info = next(loader)
    loader.close()
    picture = made[1].parent / "images" / f"{info['ids'][0][1:]}.png"
    assert np.array_equal(batch["images"][0, 0], pixels_of(picture, found.config))
    before, after = load_checkpoint(halves).params, found.params
    assert before.keys() == after.keys()
    for name, value in before.items():
        trained = name.startswith("projector.")
        assert after[name].dtype == (np.float32 if trained else np.float16), name
        assert trained or np.array_equal(after[name], value), name


def test_a_shard_is_read_alone_and_an_export_takes_a_layer_at_a_time(made, tmp_path, monkeypatch):
    opened, mesh = open_model(load_config("common", overrides(*made))), make_mesh(fsdp=4, tensor=2)
    reads, whole = [], {name: leaf.nbytes for name, leaf in opened.source.leaves.items()}
    read = Leaf.read
    monkeypatch.setattr(Leaf, "read", lambda *a: reads.append(read(*a).nbytes) or read(*a))
    params = read_params(opened, 0, mesh)
    kernel = "language.layers.mlp.up.kernel"
    assert sum(reads) == sum(whole.values())
    assert reads.count(whole[kernel] // 8) >= 8
    sizes = []
    gather = Stream._gather
    monkeypatch.setattr(Stream, "_gather", lambda *a: sizes.append(gather(*a).nbytes) or gather(*a))
    trained = {name: value for name, value in params.items() if name.startswith("language.layers.")}
    save_model(tmp_path / "export", opened, trained)
    assert len(sizes) == len(trained) * CONFIG.language.layers
    assert max(sizes) == whole[kernel] // CONFIG.language.layers
    after = load_checkpoint(tmp_path / "export").params
    assert all(np.array_equal(after[name], value) for name, value in params.items())
