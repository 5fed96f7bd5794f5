"""Tokens and rows of a fine-tune's own: every export keeps them, and a comparison sees their loss."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import llava_jax
from llava_jax.convert import Target, convert, open_source
from llava_jax.convert.compare import compare
from llava_jax.convert.io import folder as folders
from llava_jax.errors import ConfigError, WeightError
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import fitted
from tests.convert import tiny

FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
EMBED = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """320 tokens, <image> 320, <pad> 321, rows up to 384."""
    made = tmp_path_factory.mktemp("base")
    tokenizer = tiny.tokenizer(made / "tokenizer")
    tiny.save(made / "jax", "jax", tiny.TEXT, tokenizer=tokenizer)
    convert(made / "jax", made / "hf", Target("hf"))
    shutil.rmtree(made / "hf" / "llava_jax")
    return made / "hf"


def edit(file: Path, change) -> None:
    data = json.loads(file.read_text()) if file.exists() else {}
    change(data)
    file.write_text(json.dumps(data))


def with_tokens(base: Path, folder: Path, tokens: dict[str, int], special=True, decoder=True):
    """A fine-tune with trained rows for `tokens`."""
    from safetensors.numpy import save_file

    shutil.copytree(base, folder)
    edit(folder / "added_tokens.json", lambda c: c.update(tokens))
    if decoder:
        entries = {str(n): {"content": t, "special": special, **FLAGS} for t, n in tokens.items()}
        edit(
            folder / "tokenizer_config.json",
            lambda c: c["added_tokens_decoder"].update(entries),
        )
    state = {n: t.read().copy() for n, t in folders.read_folder(folder, False)[0].items()}
    for number in tokens.values():
        state[EMBED][number] = np.linspace(-1, 1, 32) * (number % 7 + 1)
        state[HEAD][number] = np.linspace(1, -1, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows(folder: Path) -> np.ndarray:
    return open_source(folder).leaves["language.embed.embedding"].read()


@pytest.mark.parametrize("decoder", [True, False], ids=["in the decoder", "in added_tokens.json"])
@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("tokens", [{"[SEG]": 322}, {"[A]": 325, "[SEG]": 323}], ids=str)
def test_tokens_behind_image_survive(base, tmp_path, tokens, special, decoder):
    folder = with_tokens(base, tmp_path / "a", tokens, special, decoder)
    convert(folder, tmp_path / "b", Target("original"))
    last = max(tokens.values()) + 1
    assert len(rows(tmp_path / "b")) == last  # what no token uses is cut
    assert np.array_equal(rows(tmp_path / "b"), rows(folder)[:last])
    tokenizer = Tokenizer.load(tmp_path / "b")
    for token, number in tokens.items():
        assert tokenizer.added[token] == number
        assert tokenizer.encode(token, markup=True)[-1] == number
    assert compare(folder, tmp_path / "b", logits="auto" if decoder else "no")["equal"]
    # and back: <image> and <pad> are there already
    convert(tmp_path / "b", tmp_path / "c", Target("hf"))
    assert json.loads((tmp_path / "c" / "config.json").read_text())["image_token_index"] == 320
    assert Tokenizer.load(tmp_path / "c").added == Tokenizer.load(folder).added
    assert np.array_equal(rows(tmp_path / "c")[:last], rows(folder)[:last])


def test_transformers_reads_them_from_our_export(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = with_tokens(base, tmp_path / "a", {"[SEG]": 322, "[BOX]": 323}, special=False)
    convert(folder, tmp_path / "b", Target("original"))
    convert(tmp_path / "b", tmp_path / "c", Target("hf"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "c")
    ours = Tokenizer.load(tmp_path / "c")
    text = "a red disc [SEG][BOX] left"
    assert theirs(text)["input_ids"] == ours.encode(text, markup=True)
    assert "[SEG]" in theirs.decode([322, 5], skip_special_tokens=True)


def test_tokens_before_image_survive(base, tmp_path):
    """[SEG] added to the language model first, <image> and <pad> after it."""
    grown = replace(tiny.TEXT, language=replace(tiny.TEXT.language, vocab_size=321))
    shutil.copytree(base.parent / "tokenizer", tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text('{"[SEG]": 320}')
    tiny.save(tmp_path / "a", "hf", grown, tokenizer=tmp_path / "t")
    shutil.rmtree(tmp_path / "a" / "llava_jax")
    assert Tokenizer.load(tmp_path / "a").added == {"[SEG]": 320, "<image>": 321, "<pad>": 322}
    convert(tmp_path / "a", tmp_path / "b", Target("original"))
    assert len(rows(tmp_path / "b")) == 321
    assert Tokenizer.load(tmp_path / "b").added == {"[SEG]": 320}


def test_trained_rows_without_a_token_stay(base, tmp_path):
    folder = with_tokens(base, tmp_path / "a", {"[SEG]": 330})
    for file in ("added_tokens.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(
            text.replace('"[SEG]": 330', '"[SEG]": 5').replace('"330"', '"5"')
        )
    edit(folder / "added_tokens.json", lambda c: c.pop("[SEG]"))
    edit(folder / "tokenizer_config.json", lambda c: c["added_tokens_decoder"].pop("5"))
    convert(folder, tmp_path / "b", Target("original"))
    assert len(rows(tmp_path / "b")) == 331


def test_pure_padding_is_cut_as_before(base, tmp_path):
    convert(base, tmp_path / "b", Target("original"))
    assert len(rows(tmp_path / "b")) == 320
    assert Tokenizer.load(tmp_path / "b").added == {}
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "LlamaTokenizer"  # there is no tokenizer.json beside it


def test_either_name_of_the_image_token_is_read(base, tmp_path):
    """transformers 5 reads image_token_id as image_token_index."""
    shutil.copytree(base, tmp_path / "a")
    edit(
        tmp_path / "a" / "config.json",
        lambda c: c.update(image_token_id=c.pop("image_token_index")),
    )
    convert(tmp_path / "a", tmp_path / "b", Target("original"))
    assert len(rows(tmp_path / "b")) == 320


@pytest.mark.parametrize("padding", [1, 64])
def test_image_comes_behind_the_last_token_of_a_padded_vocabulary(base, tmp_path, padding):
    """transformers numbers added tokens without gaps, so <image> cannot come behind the padding."""
    size = 320 + padding
    padded = replace(tiny.TEXT, language=replace(tiny.TEXT.language, vocab_size=size))
    tiny.save(tmp_path / "a", "original", padded, tokenizer=base.parent / "tokenizer")
    convert(tmp_path / "a", tmp_path / "b", Target("hf"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"]) == (320, 321)
    assert config["text_config"]["vocab_size"] == 384
    assert Tokenizer.load(tmp_path / "b").added == {"<image>": 320, "<pad>": 321}
    convert(tmp_path / "b", tmp_path / "c", Target("original"))
    assert np.array_equal(rows(tmp_path / "c"), rows(tmp_path / "a"))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.convert_tokens_to_ids(["<image>", "<pad>"]) == [320, 321]


def test_a_comparison_sees_lost_rows(base, tmp_path):
    folder = with_tokens(base, tmp_path / "a", {"[SEG]": 322})
    convert(base, tmp_path / "b", Target("original"))
    report = compare(folder, tmp_path / "b")
    assert not report["equal"]
    off = {r["name"] for r in report["tensors"] if not r["equal"]}
    assert off == {"language.embed.embedding", "language.head.kernel"}


def test_a_comparison_sees_a_lost_token(base, tmp_path):
    folder = with_tokens(base, tmp_path / "a", {"[SEG]": 322})
    shutil.copytree(folder, tmp_path / "b")
    for file in ("added_tokens.json", "tokenizer_config.json"):
        shutil.copyfile(base / file, tmp_path / "b" / file)
    report = compare(folder, tmp_path / "b", logits="no")
    assert not report["equal"]
    assert report["config"] == {"token [SEG]": [322, None]}


def test_gguf_holds_them(base, tmp_path):
    gguf = pytest.importorskip("gguf")
    from llava_jax.convert.formats.gguf import write_gguf

    folder = with_tokens(base, tmp_path / "a", {"[SEG]": 322, "[BOX]": 323}, special=False)
    edit(folder / "generation_config.json", lambda c: c.update(eos_token_id=[2, 322]))
    write_gguf(folder, tmp_path / "g", kind="f32")
    reader = gguf.GGUFReader(tmp_path / "g" / "model-f32.gguf")
    field = reader.fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]).decode() for i in field.data]
    assert tokens[320:] == ["<image>", "<pad>", "[SEG]", "[BOX]"]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert kinds[320:] == [3, 3, 4, 4]
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert reader.fields["tokenizer.ggml.eot_token_id"].contents() == 322


# A tokenizer larger than the model ---------------------------------------------------------------


def larger(base: Path, folder: Path, token: str, **special) -> Path:
    """An original checkpoint of 320 rows whose tokenizer has one token more."""
    convert(base, folder, Target("original"))
    shutil.rmtree(folder / "llava_jax")
    edit(folder / "added_tokens.json", lambda c: c.update({token: 320}))
    if special:
        edit(folder / "special_tokens_map.json", lambda c: c.update(special))
    return folder


@pytest.mark.parametrize("token", ["<pad>", "[PAD]", "<image>"])
def test_padding_past_the_rows_is_never_used(base, tmp_path, token):
    folder = larger(
        base, tmp_path / "a", token, **({"pad_token": token} if token != "<image>" else {})
    )
    model = llava_jax.load(folder)
    convert(base, tmp_path / "b", Target("original"))
    want = llava_jax.load(tmp_path / "b").generate(f"what is {token}", max_new_tokens=4)
    assert model.generate(f"what is {token}", max_new_tokens=4) == want
    assert model.tokenizer.pad_id == 0
    convert(folder, tmp_path / "hf", Target("hf"))
    assert Tokenizer.load(tmp_path / "hf").added == {"<image>": 320, "<pad>": 321}
    assert compare(folder, tmp_path / "hf", logits="no")["equal"]


@pytest.mark.parametrize("to", ["hf", "original"])
def test_a_token_without_a_row_is_refused_before_weights(base, tmp_path, monkeypatch, to):
    folder = larger(base, tmp_path / "a", "[SEG]")
    with pytest.raises(WeightError, match=r"'\[SEG\]' is token 320, the model has 320 rows"):
        convert(folder, tmp_path / "out", Target(to))
    from llava_jax.convert.io.lazy import Leaf

    real = Leaf.read

    def read(leaf, *index):
        assert leaf.nbytes < 1000, "a weight was read"  # the last norm is, to know a delta
        return real(leaf, *index)

    monkeypatch.setattr(Leaf, "read", read)
    with pytest.raises(ConfigError, match=r"320 rows: none for '\[SEG\]'"):
        llava_jax.load(folder)


def test_more_pieces_than_rows_are_refused(base):
    tokenizer = Tokenizer.load(base)
    with pytest.raises(ConfigError, match="322 tokens, the model 300 rows"):
        fitted(tokenizer, 300)


def test_without_a_tokenizer_the_line_says_what_to_copy(tmp_path):
    folder = tiny.save(tmp_path / "a", "jax")
    with pytest.raises(ConfigError, match="there is no tokenizer") as error:
        llava_jax.load(folder)
    assert "copy the tokenizer files" in str(error.value)
