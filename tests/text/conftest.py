"""A LLaMA-like tokenizer small enough to train in a test: BPE with byte fallback."""

import io

import pytest
import sentencepiece

from llava_jax.text.tokenizer import Tokenizer

CORPUS = """A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions.
USER: What is shown here? ASSISTANT: A red ball on a blue mat. USER: How many? ASSISTANT: 2
[INST] Where is the cat? [/INST] The cat is on the mat. ### Human: Is it a dog? ### Assistant: No
def f(x):
    return x ** 2
"""


@pytest.fixture(scope="session")
def model() -> bytes:
    """The bytes of a tokenizer.model."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=3,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def tok(model) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="session")
def legacy_tok(model) -> Tokenizer:
    return Tokenizer(model, legacy=True)


@pytest.fixture(scope="session")
def im_tok(tok) -> Tokenizer:
    """With the tokens that models with `use_im_start_end` have."""
    return tok.with_tokens(["<im_start>", "<im_end>"])


@pytest.fixture(scope="session")
def legacy_im_tok(legacy_tok) -> Tokenizer:
    return legacy_tok.with_tokens(["<im_start>", "<im_end>"])


def trained_text(example, tokenizer) -> str:
    """The trained tokens of an example as text, `|` where untrained ones lie between."""
    from llava_jax.text.show import text_of

    runs = [[]]
    for label in example.labels:
        if label < 0:
            runs.append([])
        else:
            runs[-1].append(int(label))
    return "|".join(text_of(run, tokenizer) for run in runs if run)
