"""The tiny vocabulary: deterministic, exact in our tokenizer, right for text it never saw."""

import pytest

from examples.tiny import vocabulary
from llava_jax.errors import ConfigError
from llava_jax.text.conversation import find_template
from llava_jax.text.tokenizer import Tokenizer

SYSTEM = find_template("vicuna_v1").system
SHORT = "\nAnswer the question using a single word or phrase."
TEXTS = [
    *(f"What color is the {shape}?{SHORT}" for shape in ("circle", "square", "triangle")),
    *(
        "red",
        "green",
        "top left",
        '[{"color": "red", "shape": "circle"}]',
        "左上角的图形是什么颜色？",
    ),
] * 5 + [SYSTEM]
PHRASES = [f" {SYSTEM}", " USER:", " ASSISTANT:", " \n", SHORT, '", "shape": "', " top left"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    return Tokenizer.load(vocabulary.train(TEXTS, path, phrases=PHRASES, size=480), legacy=False)


def test_same_text_same_bytes(tmp_path):
    models = [
        vocabulary.train(TEXTS, tmp_path / name, phrases=PHRASES, size=450).read_bytes()
        for name in "ab"
    ]
    assert models[0] == models[1]


def test_llama_special_tokens(tokenizer):
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.byte_value(3) == 0


def test_phrases_are_single_tokens(tokenizer):
    def pieces(text):
        return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_bos=False)]

    assert pieces(f"{SYSTEM} USER: ") == [
        "▁" + SYSTEM.replace(" ", "▁"),
        "▁USER:",
        "▁",
    ]
    question = pieces(f"\nWhat color is the circle?{SHORT} ASSISTANT: red")
    assert question[0] == "▁\n"
    assert question[-3:] == [SHORT.replace(" ", "▁"), "▁ASSISTANT:", "▁red"]
    assert '",▁"shape":▁"' in pieces('[{"color": "red", "shape": "circle"}]')


@pytest.mark.parametrize(
    "text", ["Zebra!", "naïve Ω 漢字 🙂", "two  spaces", "tab\there", SHORT * 2, "USER: hello"]
)
def test_other_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text, add_bos=False)
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == text


def test_a_size_without_room_for_the_characters_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="too small"):
        vocabulary.train(TEXTS, tmp_path / "tokenizer.model", size=270)
