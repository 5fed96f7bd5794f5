"""Several end tokens: read from generation_config.json, obeyed, and kept by every export."""

import json
from pathlib import Path

import numpy as np
import pytest

import llava_jax
from llava_jax.convert import Target, convert
from llava_jax.model import Request
from tests.convert import tiny


def with_ends(folder: Path, ids, file="generation_config.json") -> Path:
    data = json.loads((folder / file).read_text())
    part = data.get("text_config", data)
    part["eos_token_id"] = ids
    (folder / file).write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("ends")
    tiny.save(made / "hf", "hf", tiny.TEXT, tokenizer=tiny.tokenizer(made / "tokenizer"))
    return made / "hf"


def greedy(path, **settings):
    return llava_jax.load(path).generate("what is this", max_new_tokens=12, **settings)


def test_an_answer_ends_at_each_of_them(folder, tmp_path):
    free = greedy(folder)
    assert len(free.ids) == 12
    last = free.ids[4]
    assert last not in free.ids[:4]
    convert(folder, tmp_path / "hf", Target("hf"))
    model = llava_jax.load(with_ends(tmp_path / "hf", [2, 319, int(last)]))
    reply = model.generate("what is this", max_new_tokens=12)
    assert reply.ids == free.ids[:5]
    assert reply.finish_reason == "stop"
    batch = model.generate_batch([Request("what is this", max_new_tokens=12), Request("a")])
    assert batch[0].ids == reply.ids
    assert model.chat(max_new_tokens=12).say("what is this").ids == reply.ids


@pytest.mark.parametrize("to", ["hf", "jax", "original"])
def test_every_export_keeps_them(folder, tmp_path, to):
    convert(folder, tmp_path / "hf", Target("hf"))
    with_ends(tmp_path / "hf", [2, 300, 17])
    convert(tmp_path / "hf", tmp_path / to / "out", Target(to))
    out = tmp_path / to / "out"
    assert llava_jax.load(out).generator.eos_ids == (2, 300, 17)
    if to != "jax":
        generation = json.loads((out / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [2, 300, 17]
    convert(out, tmp_path / "back", Target("hf"))  # also from formats that keep no such file
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 300, 17]


def test_a_list_in_config_json_counts_where_no_other_file_says_it(folder, tmp_path):
    convert(folder, tmp_path / "hf", Target("hf"))
    with_ends(tmp_path / "hf", [2, 300], "config.json")
    (tmp_path / "hf" / "generation_config.json").unlink()
    assert llava_jax.load(tmp_path / "hf").generator.eos_ids == (2, 300)
    convert(tmp_path / "hf", tmp_path / "out", Target("hf"))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 300]


def test_transformers_ends_at_the_same_token(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    convert(folder, tmp_path / "hf", Target("hf"))
    free = greedy(folder)
    with_ends(tmp_path / "hf", [2, int(free.ids[4])])
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ours = llava_jax.load(tmp_path / "hf")
    ids = ours.example(Request("what is this")).ids
    theirs = model.generate(torch.from_numpy(ids[None].astype(np.int64)), max_new_tokens=12)
    new = theirs[0, len(ids) :].tolist()
    assert new == list(ours.generate("what is this", max_new_tokens=12).ids)
    assert len(new) == 5
