import io

import pytest
import sentencepiece

from llava_jax.errors import ConfigError, PromptError
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.tokenizer import SPACE, Tokenizer
from tests.conftest import json_lines


def pieces(tokenizer, ids):
    return [tokenizer.token_text(i) for i in ids]


def test_plain_text_begins_with_bos_and_a_space(tok):
    ids = tok.encode("the cat")
    assert ids[0] == tok.bos_id
    assert "".join(pieces(tok, ids[1:])) == "▁the▁cat"
    assert tok.encode("the cat", add_bos=False) == ids[1:]


def test_spaces_are_kept(tok):
    for text in ("a  b", "  a", "a ", " ", "   ", "a\n  b\t", "▁"):
        joined = "".join(pieces(tok, tok.encode(text)[1:])).replace("<0x0A>", "\n")
        assert joined.replace("<0x09>", "\t") == SPACE + text.replace(" ", SPACE), text


def test_empty_text_is_bos_alone(tok, legacy_tok):
    assert tok.encode("") == [tok.bos_id] == legacy_tok.encode("")
    assert tok.encode_parts([]) == [tok.bos_id]


def test_characters_without_a_token_become_bytes(tok):
    ids = tok.encode("鬻", add_bos=False)
    assert pieces(tok, ids) == ["▁", "<0xE9>", "<0xAC>", "<0xBB>"]
    assert [tok.byte_value(i) for i in ids] == [None, 0xE9, 0xAC, 0xBB]
    assert tok.decode(tok.encode("鬻")) == "<s> 鬻"


def test_special_tokens_count_only_as_markup(tok):
    text = "a</s>b<unk><s>"
    specials = {tok.bos_id, tok.eos_id, tok.unk_id}
    assert specials.isdisjoint(tok.encode(text)[1:])
    ids = tok.encode(text, markup=True)[1:]
    assert [i for i in ids if i in specials] == [tok.eos_id, tok.unk_id, tok.bos_id]
    assert tok.encode("a<image>", markup=True) == tok.encode("a<image>")


def test_text_behind_a_special_token(tok, legacy_tok):
    parts = ["a", tok.eos_id, "USER"]
    assert "".join(pieces(tok, tok.encode_parts(parts)[1:])) == "▁a</s>USER"
    assert "".join(pieces(legacy_tok, legacy_tok.encode_parts(parts)[1:])) == "▁a</s>▁USER"


def test_no_lone_space_in_front_of_a_special_token(tok):
    assert tok.encode_parts([tok.eos_id], add_bos=False) == [tok.eos_id]
    image = tok.encode_parts([IMAGE_TOKEN, tok.eos_id, "a"], add_bos=False)
    assert pieces(tok, image) == ["<image>", "</s>", "a"]


def test_text_between_images_starts_anew(tok):
    ids = tok.encode_parts(["USER: ", IMAGE_TOKEN, "\nWhat"])
    slot = ids.index(IMAGE_TOKEN)
    assert pieces(tok, ids[slot - 1 : slot + 3]) == ["▁", "<image>", "▁", "<0x0A>"]
    assert ids[:slot] == tok.encode("USER: ")
    assert ids[slot + 1 :] == tok.encode("\nWhat", add_bos=False)


def test_adjacent_parts_are_one_text(tok):
    parts = ["What ", "", "is", " sho", "wn", tok.eos_id, " he", "re"]
    assert tok.encode_parts(parts) == tok.encode("What is shown</s> here", markup=True)


@pytest.mark.parametrize("name", ["tok", "legacy_tok"])
def test_align_names_the_part_of_each_tokens_first_character(name, request):
    tokenizer = request.getfixturevalue(name)
    parts = ["USER:", " the cat", "\n鬻", IMAGE_TOKEN, "", "  a", tokenizer.eos_id, "the", " mat"]
    ids, owners = tokenizer.align_parts(parts)
    assert ids == tokenizer.encode_parts(parts)
    assert owners[0] == -1
    assert owners == sorted(owners)
    for index, part in enumerate(parts):
        own = [ids[i] for i, owner in enumerate(owners) if owner == index]
        if isinstance(part, int):
            assert own == [part]
    assert 4 not in owners
    text = "".join(pieces(tokenizer, [i for i, o in zip(ids, owners) if o == 1]))
    assert text == "▁the▁cat"


def test_decode(tok, legacy_tok):
    ids = tok.encode_parts(["the cat", tok.eos_id, " a"])
    assert tok.decode(ids) == "<s> the cat</s> a"
    assert tok.decode(ids, skip_special=True) == "the cat a"
    assert legacy_tok.decode(ids) == "<s> the cat</s>a"
    assert tok.decode([]) == ""
    slots = tok.encode_parts(["USER: ", IMAGE_TOKEN, "\nWhat"])
    assert tok.decode(slots, skip_special=True) == "USER: <image>\nWhat"


def test_decode_of_a_piece_of_several_words():
    """Such a piece may open an answer, and is no piece any more without its own space."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["on the mat, on the mat, on the mat"] * 9),
        model_writer=out,
        model_type="bpe",
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_by_whitespace=False,
        user_defined_symbols=["▁on▁the"],
        minloglevel=3,
    )
    for legacy in (False, True):
        tokenizer = Tokenizer(out.getvalue(), legacy=legacy)
        (phrase,) = (i for i in range(len(tokenizer)) if tokenizer.token_text(i) == "▁on▁the")
        assert tokenizer.decode([phrase, phrase]) == "on the on the"
        assert tokenizer.decode([tokenizer.bos_id, phrase], skip_special=True) == "on the"


def test_decode_of_ids_without_text(tok):
    assert tok.decode([*tok.encode("a", add_bos=False), len(tok) + 5]) == "a"
    with pytest.raises(PromptError, match="-7"):
        tok.decode([-7])


def test_added_tokens(tok):
    more = tok.with_tokens(["[PAD]"], pad_token="[PAD]").with_tokens(["<im_start>", "[PAD]"])
    assert more.pad_id == len(tok)
    assert more.special_tokens["<im_start>"] == len(tok) + 1 == len(more) - 1
    assert tok.pad_id == tok.unk_id == 0
    ids = more.encode("a<im_start>b", markup=True)
    assert len(tok) + 1 in ids
    assert more.decode(ids) == "<s> a <im_start> b"
    assert more.decode(ids, skip_special=True) == "ab"


def test_lone_surrogates_do_not_break_tokenising(tok):
    assert tok.decode(tok.encode("a\ud83db")) == "<s> a\ufffdb"


def test_bytes_that_are_no_model():
    with pytest.raises(ConfigError, match="sentencepiece"):
        Tokenizer(b"nonsense")


def test_unknown_named_token(model):
    with pytest.raises(ConfigError, match=r"\[PAD\]"):
        Tokenizer(model, pad_token="[PAD]")


# The original's ids ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(request):
    from tests.conftest import shared

    folder = shared("golden/model/fullvocab/llava")
    return {f"legacy_{x}".lower(): Tokenizer.load(folder, legacy=x) for x in (False, True)}


def test_golden_strings(golden, originals):
    for row in json_lines(golden / "tokenization" / "strings.jsonl"):
        for mode, tokenizer in originals.items():
            want, text = row[mode], row["text"]
            parts = tokenizer.split_markup(text, image_tags=True)
            assert tokenizer.encode(text, markup=True) == want["ids"], text
            assert tokenizer.encode_parts(parts) == want["image_ids"], text
            assert tokenizer.align_parts(parts)[0] == want["image_ids"], text
            assert tokenizer.decode(want["ids"]) == want["decode"]
            assert tokenizer.decode(want["ids"], skip_special=True) == want["decode_skip"]


def test_golden_decode(golden, originals):
    for row in json_lines(golden / "tokenization" / "decode.jsonl"):
        for mode, tokenizer in originals.items():
            assert tokenizer.decode(row["ids"]) == row[mode]["decode"]
            skipped = tokenizer.decode(row["ids"], skip_special=True)
            assert skipped == row[mode]["decode_skip"]


def test_golden_batches(golden, originals):
    for row in json_lines(golden / "tokenization" / "batch.jsonl"):
        tokenizer = originals[row["tokenizer"]]
        rows = [tokenizer.encode(t, markup=True)[: row["max_length"]] for t in row["texts"]]
        for ids, want, mask in zip(rows, row["input_ids"], row["attention_mask"], strict=True):
            pad = len(want) - len(ids)
            assert [*ids, *[tokenizer.pad_id] * pad] == want
            assert [1] * len(ids) + [0] * pad == mask
