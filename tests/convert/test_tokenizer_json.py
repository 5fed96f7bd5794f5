"""The tokenizer.json of an export, against the original's tokenizer."""

from dataclasses import replace

import pytest
import tokenizers

from llava_jax.convert import tokenizer_json
from llava_jax.text.tokenizer import Tokenizer
from tests.conftest import json_lines, shared
from tests.convert import tiny


@pytest.mark.parametrize("legacy", [False, True])
def test_golden_strings(legacy):
    model = shared("golden/model/fullvocab/llava/tokenizer.model")
    fast = tokenizer_json.build(model, legacy, {"<image>": len(Tokenizer.load(model))})
    assert fast is not None
    for row in json_lines(shared("golden/tokenization/strings.jsonl")):
        if "<image>" in row["text"]:  # a token of its own here, plain text there
            continue
        wanted = row[f"legacy_{str(legacy).lower()}"]["ids"]
        assert fast.encode(row["text"]).ids == wanted, row["text"]


@pytest.mark.parametrize("legacy", [False, True])
def test_as_ours_with_added_tokens_and_a_gap(legacy, tmp_path):
    folder = tiny.tokenizer(tmp_path / "t")
    config = replace(tiny.TEXT, tokenizer_legacy=legacy)
    added = {"<image>": 330, "<pad>": 331}
    assert tokenizer_json.write(folder, config, added)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert fast.token_to_id("<pad>") == 331
    slow = Tokenizer.load(folder, legacy=legacy)
    for text in ("USER: what  is this", " a", "a </s> b", "图 é\n\n", "x</s>USER: y"):
        assert fast.encode(text).ids == slow.encode(text, markup=True), text
    answer = "a red  disc, 图"
    assert fast.decode(fast.encode(answer).ids) == answer


def test_a_unigram_model_is_left_alone(tmp_path):
    import sentencepiece

    corpus = tmp_path / "c.txt"
    corpus.write_text("what is in this picture\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "tokenizer"), vocab_size=18, minloglevel=2
    )
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert not tokenizer_json.write(tmp_path, tiny.TEXT, {})
    assert not (tmp_path / "tokenizer.json").exists()
