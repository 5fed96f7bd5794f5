"""LoRA adapters beside the model: each answers as its merged model, and nobody else is touched."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from llava_jax import load
from llava_jax.config import LoraConfig
from llava_jax.convert import load_checkpoint, save_checkpoint
from llava_jax.errors import ConfigError, WeightError
from llava_jax.generate import Engine, Generator, Job
from llava_jax.generate.adapters import Adapter
from llava_jax.generate.request import Request
from llava_jax.model import LlavaModel
from llava_jax.params import is_lora, parameter_shapes
from llava_jax.settings import SamplingSettings
from llava_jax.sharding import make_mesh
from tests.generate import tiny

DECODER = LoraConfig().targets
KINDS = {  # name: (format, LoRA, whether the projector is trained too)
    "pair": ("lora", LoraConfig(4, 8.0, targets=DECODER), True),
    "peft": ("peft", LoraConfig(2, 3.0, targets=DECODER[:3], rslora=True), False),
    "ours": (
        "jax",
        LoraConfig(3, 9.0, targets=(*DECODER[-2:], "projector.linear_0"), dropout=0.05),
        False,
    ),
    "tower": ("peft", LoraConfig(2, 6.0, targets=(DECODER[0], "vision.layers.attn.q")), False),
}
PICTURE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)


def adapted(kind: str, **changed):
    """The shipped model with an adapter, in memory. changed: parameters in place of its own."""
    _, lora, trained = KINDS[kind]
    base, rng = (
        load_checkpoint("tiny", dtype="fp32"),
        np.random.default_rng(list(KINDS).index(kind)),
    )
    config = replace(base.config, lora=lora)
    for name, shape in parameter_shapes(config).items():
        if is_lora(name):  # small beside the kernels, as trained ones are: 1e-5 holds on every CPU
            base.params[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    kernel = base.params["projector.linear_0.kernel"]
    if trained:
        noise = rng.normal(0, 0.05, kernel.shape).astype(np.float32)
        base.params["projector.linear_0.kernel"] = kernel + noise
    return replace(base, config=config, params=base.params | changed)


def written(kind: str, folder, **changed):
    to = KINDS[kind][0]
    more = {} if to == "jax" else {"base": "tiny"}
    return save_checkpoint(adapted(kind, **changed), folder / kind, to=to, **more)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: str(written(kind, folder)) for kind in KINDS}


@pytest.fixture(scope="module")
def model(folders):
    return load("tiny", adapters=folders, allow_pickle=True)


@pytest.fixture(scope="module")
def plain():
    return load("tiny")


WORDS = "What color is the circle? " * 20  # longer than a chunk, so that it can be reused


def asked(adapter: str = "", **more) -> Request:
    return Request(WORDS, PICTURE, **{"max_new_tokens": 8, "adapter": adapter, **more})


def bits(model: LlavaModel, requests: list[Request], engine: Engine | None = None) -> list:
    """Ids and log-probabilities of answers together, by an engine of 8 slots."""
    engine = engine or Engine(model.generator, 8)
    jobs = [model.job(r.seeded(), model.with_pixels(model.example(r))) for r in requests]
    engine.run([engine.submit(job) for job in jobs])
    return [(job.ids, job.logprobs) for job in jobs]


def test_an_adapter_answers_as_its_merged_model(model, plain, folders):
    replies = {kind: model.generate_batch([asked(kind)])[0] for kind in folders}
    own, wanted = dict(plain.generator.params()), {}
    for kind, folder in folders.items():
        found = load_checkpoint(folder, base="tiny", merge=True, dtype="fp32", allow_pickle=True)
        plain.generator.set_params(found.params)
        wanted[kind] = plain.generate_batch([asked()])[0]
    plain.generator.set_params(own)
    for kind, want in wanted.items():
        assert replies[kind].ids == want.ids, kind
        assert replies[kind].logprobs == pytest.approx(want.logprobs, abs=1e-5), kind
    assert len({reply.logprobs for reply in replies.values()}) == len(KINDS)


def test_a_model_that_was_trained_with_dropout_answers_without(model, folders):
    """A LoRA model itself, not merged, as training leaves it."""
    found = load(folders["ours"])
    assert found.config.lora is not None
    assert found.config.lora.dropout
    reply, want = found.generate_batch([asked()])[0], model.generate_batch([asked("ours")])[0]
    assert reply.ids == want.ids
    assert reply.logprobs == pytest.approx(want.logprobs, abs=1e-5)


def test_neighbours_and_the_base_keep_every_bit(model, plain):
    requests = [asked(kind, temperature=t, seed=5) for t in (0, 1.5) for kind in ("", *KINDS)]
    alone = [bits(model, [request])[0] for request in requests]
    engine = Engine(model.generator, 8)
    assert bits(model, requests[::-1], engine)[::-1] == alone
    # What was read through one is not taken for another: now all prompts are known.
    assert bits(model, requests, engine) == alone
    assert engine.counts["prompt_tokens_reused"] > 0
    bare = [request for request in requests if not request.adapter]
    assert bits(plain, bare) == [alone[0], alone[len(KINDS) + 1]]


def test_a_stream_and_beams_go_through_it(model):
    greedy = model.generate_batch([asked("peft", max_new_tokens=2)])[0]
    assert model.stream(WORDS, PICTURE, adapter="peft").reply.ids[0] == greedy.ids[0]
    how = {"num_beams": 2, "max_new_tokens": 2, "adapter": "peft"}
    beams = {b.ids: b.logprobs for b in model.generate_n(WORDS, PICTURE, n=2, **how)}
    assert len(greedy.ids) == 2
    assert beams[greedy.ids] == pytest.approx(greedy.logprobs, abs=1e-5)


def test_an_unknown_name_is_refused(model):
    with pytest.raises(ConfigError, match="there is no adapter 'dogs'"):
        model.generate("x", adapter="dogs")
    assert not any(is_lora(name) for name, _ in model.generator.params())


def test_what_cannot_stay_unmerged_is_refused_by_name(tmp_path):
    norm = adapted("ours").params["language.norm.scale"]
    folder = written("ours", tmp_path, **{"language.norm.scale": norm + 1})
    with pytest.raises(WeightError, match=r"language\.norm\.scale is not the base's.*--merge"):
        load("tiny", adapters={"a": folder})
    with pytest.raises(WeightError, match="holds no LoRA factors"):
        load("tiny", adapters={"a": load_folder("tiny")})
    bad = {"language.layers.mlp.down.lora_b": np.full((2, 3, 96), np.nan, np.float32)}
    folder = written("ours", tmp_path / "nan", **bad)
    with pytest.raises(WeightError, match="not finite"):
        load("tiny", adapters={"a": folder})
    folder = written("peft", tmp_path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "someone/vicuna-7b"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightError, match="was trained on 'someone/vicuna-7b'.*to null"):
        load("tiny", adapters={"a": folder})


def test_an_adapter_trained_on_other_squares_is_served_where_the_model_makes_them(tmp_path):
    made = adapted("ours")
    made = replace(made, config=replace(made.config, image_aspect_ratio="square"))
    folder = save_checkpoint(made, tmp_path / "a", to="jax")
    with pytest.raises(WeightError, match="image_aspect_ratio.*--image-aspect-ratio square"):
        load("tiny", adapters={"a": folder})
    cropping = load("tiny", adapters={"a": folder}, image_aspect_ratio="square")
    wide = np.zeros((32, 64, 3), np.uint8)
    assert not np.array_equal(cropping.pixels(wide), load("tiny").pixels(wide))
    with pytest.raises(ConfigError, match="image_aspect_ratio 'crop' is unknown"):
        load("tiny", image_aspect_ratio="crop")


def load_folder(name: str):
    from llava_jax.convert.io import hub

    return hub.local(name)


@pytest.mark.slow  # the quick form: one device, layers one by one
def test_scanned_layers_and_eight_devices_give_the_tokens_of_one():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    rng, made = np.random.default_rng(0), {}
    for name, rank, targets in (("a", 4, DECODER), ("b", 3, DECODER[:2])):
        lora = LoraConfig(rank, 2.0 * rank, targets=targets)
        shapes = parameter_shapes(replace(tiny.CONFIG, lora=lora)).items()
        own = {n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes if is_lora(n)}
        made[name] = Adapter(lora, own)
    eyes = tiny.params()["projector.linear_0.kernel"] + 1
    made["a"] = Adapter(made["a"].lora, {**made["a"].params, "projector.linear_0.kernel": eyes})

    def answers(**how) -> tuple[list, np.ndarray]:
        generator = Generator(
            tiny.CONFIG, tiny.params(), eos_ids=(-1,), adapters=made, unroll=False, **how
        )
        engine = Engine(generator, 4)
        settings = SamplingSettings(max_new_tokens=6)
        jobs = [Job(tiny.prompt(9, 1), settings, adapter=name) for name in ("", "a", "b", "a")]
        engine.run([engine.submit(job) for job in jobs])
        return [job.ids for job in jobs], np.array([job.logprobs for job in jobs])

    ids, logprobs = answers()
    spread = answers(mesh=make_mesh(fsdp=4, tensor=2))
    assert spread[0] == ids
    np.testing.assert_allclose(spread[1], logprobs, atol=1e-5)
    assert ids[0] != ids[1] != ids[2]
    assert ids[1] == ids[3]
