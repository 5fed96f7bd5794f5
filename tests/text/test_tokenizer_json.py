"""tokenizer.json without tokenizer.model: the ids of transformers, or a refusal that says why."""

import json
import random
import shutil

import numpy as np
import pytest

from llava_jax.convert import tokenizer_json
from llava_jax.errors import ConfigError
from llava_jax.text.tokenizer import Tokenizer
from tests.convert import tiny

ADDED = {"<image>": 320, "<pad>": 321, "[SEG]": 322}
PIECES = (
    " ", "  ", "   ", "\n", "\t", "a", "the", "circle", "left", "USER:", "é", "図", "🙂", "▁", "x=1",
    "What", ".", ",", "0", "12", "'s", "</s", ">", "<", "\x00", "e\u0301", "ﬁ",
)  # fmt: skip


def texts(special, count=400):
    rng = random.Random(0)
    for i in range(count):
        parts = [rng.choice(PIECES) for _ in range(rng.randint(0, 10))]
        if i % 2:
            parts.insert(rng.randint(0, len(parts)), rng.choice(special))
        yield "".join(parts)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def folder_of(slow, folder, legacy=False, **config):
    """A folder as transformers 5 leaves one: the tokens stand in tokenizer.json alone."""
    folder.mkdir()
    fast = tokenizer_json.build(slow / "tokenizer.model", legacy, ADDED)
    assert fast is not None
    fast.save(str(folder / "tokenizer.json"))
    settings = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def change(folder, edit):
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_those_of_the_file(slow, tmp_path, legacy):
    tokenizers = pytest.importorskip("tokenizers")
    folder = folder_of(slow, tmp_path / "a", legacy)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.load(folder)
    assert ours.legacy is legacy
    assert ours.added == ADDED
    assert ours.pad_token == "<pad>"
    for text in texts(list(ours.special_tokens)):
        assert ours.encode(text, markup=True) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_ids_are_those_of_transformers_after_it_saved_the_folder(slow, tmp_path, name):
    """As a LlamaTokenizer, transformers 5 rebuilds the pipeline: Metaspace, no space before a space."""
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(slow, tmp_path / "a")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = name
    if name != "LlamaTokenizer":
        fast = tokenizer_json.build(slow / "tokenizer.model", False, ADDED)
        assert fast is not None
        fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    ours = Tokenizer.load(tmp_path / "b")
    for text in texts(list(ours.special_tokens)):
        assert ours.encode(text, markup=True) == theirs(text)["input_ids"], repr(text)


def test_the_model_inside_is_the_one_it_was_made_of(slow, tmp_path):
    """Read from tokenizer.json and written as tokenizer.model, ids and texts stay."""
    ours = Tokenizer.load(folder_of(slow, tmp_path / "a"))
    ours.save(tmp_path / "b")
    again, before = Tokenizer.load(tmp_path / "b"), Tokenizer.load(slow)
    assert len(again) == 323
    rng = np.random.default_rng(0)
    for text in texts(["</s>"]):
        assert again.encode(text) == before.encode(text)
    for _ in range(50):
        ids = rng.integers(0, 320, 12).tolist()
        assert ours.decode(ids) == before.decode(ids)


def test_a_text_without_a_space_of_its_own_is_not_written_as_tokenizer_model(slow, tmp_path):
    ours = Tokenizer.load(folder_of(slow, tmp_path / "a"))
    change(tmp_path / "a", lambda data: data.update(pre_tokenizer=None))  # spaces replaced, no more
    never = Tokenizer.load(tmp_path / "a")
    assert never.encode("USER") != ours.encode("USER")
    with pytest.raises(ConfigError, match=r"puts no space in front of a text"):
        never.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_added_tokens_are_found_beside_tokenizer_model_too(slow, tmp_path):
    folder = folder_of(slow, tmp_path / "a", legacy=False)
    shutil.copyfile(slow / "tokenizer.model", folder / "tokenizer.model")
    ours = Tokenizer.load(folder)
    assert ours.added == ADDED
    assert ours.legacy is False  # transformers 5 wrote no `legacy`; its pipeline says it
    assert ours.encode("a [SEG]", markup=True)[-1] == 322


def test_a_piece_that_no_merge_makes_is_never_made(slow, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = folder_of(slow, tmp_path / "a")
    change(folder, lambda data: data["model"]["merges"].pop())
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.load(folder)
    for text in texts(["</s>"], 100):
        assert ours.encode(text, markup=True) == theirs.encode(text).ids, repr(text)


def _byte_level(data):
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False}


def _unigram(data):
    data["model"]["type"] = "Unigram"


def _merges_apart(data):
    """Two ways to make a piece, another piece between them: no order of scores says that."""
    data["model"]["merges"].append(data["model"]["merges"][0])


def _ignores_merges(data):
    data["model"]["ignore_merges"] = True


def _lowercase(data):
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_byte_level, "pre_tokenizer ByteLevel"),
        (_unigram, "model is 'Unigram', not BPE"),
        (_merges_apart, "the merges of"),
        (_ignores_merges, "ignore_merges is True"),
        (_lowercase, "normalizer Lowercase"),
        (lambda data: data["model"].update(byte_fallback=False), "byte_fallback"),
        (lambda data: data["model"]["vocab"].pop("a"), "without gaps"),
        (lambda data: data["added_tokens"].append({"id": 400}), "added_tokens"),
    ],
)
def test_other_tokenizers_are_refused_by_name(slow, tmp_path, edit, said):
    folder = folder_of(slow, tmp_path / "a")
    change(folder, edit)
    with pytest.raises(ConfigError, match=said) as error:
        Tokenizer.load(folder)
    assert "tokenizer.json" in str(error.value)
