"""The lmms-eval adapter on a stand-in for the harness, and in the real registry where it is installed."""

import importlib
import importlib.util
import sys
import types
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from llava_jax.errors import LlavaError
from llava_jax.eval.likelihood import Likelihood
from llava_jax.generate import answer
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example
from llava_jax.text.prompt import build_prompt
from tests.generate.tiny import model

HARNESS = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, with a stand-in for lmms_eval."""
    base = types.ModuleType("lmms_eval.api.model")

    class lmms:
        def __init__(self):
            self.task_dict = {}

    base.lmms = lmms
    for name, value in (
        ("lmms_eval", types.ModuleType("lmms_eval")),
        ("lmms_eval.api", types.ModuleType("lmms_eval.api")),
        ("lmms_eval.api.model", base),
    ):
        monkeypatch.setitem(sys.modules, name, value)
    monkeypatch.delitem(sys.modules, "llava_jax.eval.lmms_model", raising=False)
    yield importlib.import_module("llava_jax.eval.lmms_model")
    sys.modules.pop("llava_jax.eval.lmms_model", None)


class Recorder:
    """A model that notes what it is asked."""

    def __init__(self):
        self.config, self.asked, self.ways = model().config, [], []

    def generate_batch(self, requests, **_):
        self.asked += requests
        self.ways += [self.config.image_aspect_ratio] * len(requests)
        return [SimpleNamespace(text=f"a{len(self.asked)}") for _ in requests]


@pytest.fixture
def harness(adapter, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("llava_jax.eval.run.model.load_model", lambda *a, **k: recorder)
    ours = adapter.LlavaJax("folder", batch_size="4", device="cuda")
    ours.task_dict = {"t": {"test": [{"images": [image()]}, {"images": []}]}}
    return ours, recorder


def image():
    return PIL.Image.fromarray(np.full((20, 30, 3), 90, np.uint8))


def instance(context, kwargs, doc=0):
    return SimpleNamespace(args=(context, kwargs, lambda d: d["images"], doc, "t", "test"))


def test_requests(harness):
    ours, recorder = harness
    kwargs = {
        "until": ["\n\n", ""],
        "max_new_tokens": 16,
        "temperature": 0.7,
        "do_sample": False,
        "num_beams": 1,
        "top_p": None,
    }
    ours.generate_until(
        [
            instance("What?", kwargs),
            instance("See <image> now", {}),
            instance("Text <image>", {"image_aspect_ratio": "square", "temperature": 0.5}, 1),
        ]
    )
    one, two, three = recorder.asked
    kinds = [[c["type"] for c in r.messages[0]["content"]] for r in recorder.asked]
    assert kinds == [["image", "text"], ["text", "image", "text"], ["text"]]
    assert (one.max_new_tokens, one.temperature, one.top_p, one.stop) == (16, 0.0, 1.0, ("\n\n",))
    assert two.max_new_tokens == 1024
    assert three.temperature == 0.5
    assert recorder.ways == ["pad", "pad", "square"]
    assert recorder.config.image_aspect_ratio == "pad"


def test_refused(harness):
    ours, _ = harness
    with pytest.raises(LlavaError, match="num_beams 5"):
        ours.generate_until([instance("q", {"num_beams": 5})])
    with pytest.raises(LlavaError, match="2 <image> in the context for 1 images"):
        ours.generate_until([instance("<image><image>", {})])
    ours.task_dict["t"]["test"][0]["images"] = ["video.mp4"]
    with pytest.raises(LlavaError, match="t 0: a str is not an image"):
        ours.generate_until([instance("q", {})])


def test_rounds(harness):
    ours, recorder = harness

    def to_text(doc, previous_output, round_idx, previous_round_info):
        return None, f"round {round_idx}", round_idx == 2, previous_output, None

    args = ("q", {}, lambda d: d["images"], to_text, 0, "t", "test")
    assert ours.generate_until_multi_round([SimpleNamespace(args=args)]) == [["a1", "a2"]]
    assert recorder.asked[1].messages[0]["content"] == [{"type": "text", "text": "round 1"}]


def test_likelihood_is_that_of_the_tokens_one_by_one():
    m = model()
    content = [{"type": "image", "image": np.asarray(image())}, {"type": "text", "text": "what?"}]
    scorer = Likelihood(m)
    found = scorer(content, "a red disc")
    assert found.tokens > 1
    assert found.total == pytest.approx(-found.mean_loss * found.tokens)
    assert not found.greedy
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a red disc"}]
    ids = build_prompt(turns, m.tokenizer, "vicuna_v1", open_turn=False).ids
    pixels, logprobs = (m.pixels(content[0]["image"]),), []
    for n in range(len(ids) - found.tokens, len(ids)):
        one = SamplingSettings(max_new_tokens=1)
        (out,) = answer(m.generator, [Example(ids[:n], pixels)], one, keep_logits=True)
        logits = out.logits[0].astype(np.float64)
        logprobs.append(logits[ids[n]] - np.log(np.exp(logits).sum()))
    assert found.total == pytest.approx(sum(logprobs), abs=1e-4)
    text_only = scorer([{"type": "text", "text": "what?"}], "a red disc")
    assert text_only.total != found.total


def test_entry_point():
    found = [e for e in entry_points(group="lmms_eval.models") if e.name == "llava_jax"]
    if not found:
        pytest.skip("this installation is from before the entry point")
    assert found[0].value == "llava_jax.eval.lmms:manifest"


@pytest.mark.skipif(not HARNESS, reason="lmms-eval is not installed")
def test_real_registry():
    from lmms_eval.models import get_model_manifest

    assert get_model_manifest("llava_jax").simple_class_path.endswith("LlavaJax")
