import gzip
import json

import numpy as np
import pytest

from llava_jax.errors import LlavaError, SampleError
from llava_jax.text.compat import compat_sample
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.labels import training_version
from llava_jax.text.records import modality_lengths
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.tokenizer import Tokenizer
from tests.conftest import SHARED, shared


def record(*texts, image=None):
    who = ("human", "gpt")
    turns = [{"from": who[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r1", "conversations": turns, **({"image": image} if image else {})}


def test_tags_collapse_to_the_front(tok):
    sample = compat_sample(record("Is <image> it <image>", "A <image> cat", image="a"), tok, "v1")
    assert [t["value"] for t in sample.turns] == ["<image>\nIs  it", "<image>\nA  cat"]
    assert (sample.ids == IMAGE_TOKEN).sum() == 2


def test_text_only_records_keep_tags_as_text_and_are_cut(tok):
    sample = compat_sample(record("<image>\nWhat?", "A cat"), tok, "v1", max_length=20)
    assert IMAGE_TOKEN not in sample.ids
    assert len(sample.ids) == 20


@pytest.mark.parametrize(
    "texts",
    [
        ("Say ASSISTANT: no", "the cat"),  # one more answer mark than answers
        ("What?", ""),
        ("What?", "A", "And?"),
    ],
)
def test_samples_the_original_gives_up(tok, texts):
    sample = compat_sample(record(*texts), tok, "v1")
    assert sample.mismatch is not None
    assert (sample.labels == IGNORE).all()


def test_failures_name_the_sample(tok):
    bad = record("a", "b")
    bad["conversations"][1]["from"] = "human"
    with pytest.raises(SampleError, match="sample r1"):
        compat_sample(bad, tok, "v1")
    with pytest.raises(SampleError, match="sample r1"):
        compat_sample(record("no tag", "caption", image="a"), tok, "plain")
    with pytest.raises(SampleError, match="sample r1"):
        compat_sample(record(), tok, "v1")


def collate_compat(samples, tokenizer, *, max_length) -> dict[str, np.ndarray]:
    """The original's batch: padded on the right, cut at max_length *before* image features go in.

    Returns int64[B, T] input_ids and labels, and bool[B, T] attention_mask (False at every padding
    id, so also at an `<unk>` in the text).
    """
    width = min(max((len(s.ids) for s in samples), default=0), max_length)
    ids = np.full((len(samples), width), tokenizer.pad_id, np.int64)
    labels = np.full((len(samples), width), IGNORE, np.int64)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = sample.ids[:width]
        labels[i, : len(sample.labels)] = sample.labels[:width]
    return {"input_ids": ids, "labels": labels, "attention_mask": ids != tokenizer.pad_id}


def test_collate(tok):
    samples = [compat_sample(record("What?", "A cat" * n), tok, "v1") for n in (1, 40)]
    batch = collate_compat(samples, tok, max_length=70)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 70)
    short = len(samples[0].ids)
    assert batch["attention_mask"].sum(axis=1).tolist() == [short, 70]
    assert (batch["labels"][0, short:] == IGNORE).all()


def test_lengths():
    rows = [record("a b\nc", "d", image="x"), record("a", "b c")]
    assert modality_lengths(rows) == [4, -3]
    assert modality_lengths([{"conversations": [{"from": "human"}, 3]}, {}]) == [0, 0]


# The original's labels -------------------------------------------------------------------------


def golden_files(pattern="*"):
    """Names of the reference files; where there are none, one whose test is then skipped."""
    folder = SHARED / "golden" / "preprocess"
    names = sorted(p.name.removesuffix(".jsonl.gz") for p in folder.glob(f"{pattern}.jsonl.gz"))
    held = [n for n in names if pattern != "*" or not n.startswith("collator")]
    return held or [pattern.replace("*", "v1")]


def read_rows(name):
    path = shared(f"golden/preprocess/{name}.jsonl.gz")
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def set_up(name):
    """(tokenizer, version, use_im_start_end) of a file."""
    version = name.replace("_legacy", "").replace("_imse", "")
    folder = shared("golden") / "model" / "fullvocab" / "llava"
    tokenizer = Tokenizer.load(folder, legacy="_legacy" in name)
    if version == "v0":
        tokenizer = tokenizer.with_tokens(["[PAD]"], pad_token="[PAD]")
    if "_imse" in name:
        tokenizer = tokenizer.with_tokens(["<im_start>", "<im_end>"])
    return tokenizer, version, "_imse" in name


def wanted_labels(row):
    labels = np.full(len(row["input_ids"]), IGNORE)
    for a, b in row["labels_spans"]:
        labels[a:b] = row["input_ids"][a:b]
    return labels


@pytest.mark.parametrize("name", golden_files())
def test_golden_preprocess(name):
    tokenizer, version, imse = set_up(name)
    for row in read_rows(name):
        try:
            sample = compat_sample(
                row["sample"],
                tokenizer,
                version,
                max_length=row["model_max_length"],
                use_im_start_end=imse,
            )
        except LlavaError:
            assert "error" in row, row["kind"]
            continue
        if "error" in row:
            continue
        assert sample.turns == row["processed"]
        assert sample.ids.tolist() == row["input_ids"], row["kind"]
        assert sample.labels.tolist() == wanted_labels(row).tolist(), row["kind"]
        if row["mismatch"]:
            assert sample.mismatch
            assert "{} vs. {}.".format(*sample.mismatch) in row["warning"]
        else:
            assert sample.mismatch is None


MARKS = ("<s>", "</s>", "<unk>", "<im_start>", "<im_end>", "ASSISTANT:", "[INST]", "[/INST]", "###")


def is_ordinary(row, kind):
    """A conversation in turns, nobody silent, none of the template's marks in it, not given up."""
    if "error" in row or row["mismatch"]:
        return False
    turns = row["sample"]["conversations"]
    said = [turn["value"].replace("<image>", "").strip() for turn in turns]
    if kind == "plain" and "image" not in row["sample"]:
        return False
    in_turn = [turn["from"] for turn in turns] == ["human", "gpt"] * max(len(turns) // 2, 1)
    return in_turn and all(said) and not any(mark in text for text in said for mark in MARKS)


@pytest.mark.parametrize("name", golden_files())
def test_right_labels_equal_the_originals_on_ordinary_samples(name):
    tokenizer, version, imse = set_up(name)
    kind = training_version(version).kind
    if kind == "mpt":
        pytest.skip("with this tokenizer the original's sums go wrong on ordinary samples too")
    compared = 0
    for row in read_rows(name):
        if not is_ordinary(row, kind):
            continue
        maker = ExampleMaker(tokenizer, version=version, max_length=None, use_im_start_end=imse)
        example = maker(row["sample"])
        cut = len(row["input_ids"])  # text-only rows were cut at model_max_length
        labels = np.where(wanted_labels(row) == IMAGE_TOKEN, IGNORE, wanted_labels(row))
        assert example.ids[:cut].tolist() == row["input_ids"], row["kind"]
        assert example.labels[:cut].tolist() == labels.tolist(), row["kind"]
        compared += 1
    if not compared:
        pytest.skip("the file has no ordinary sample")


@pytest.mark.parametrize("name", golden_files("collator_*"))
def test_golden_collator(name):
    tokenizer, version, imse = set_up(name.removeprefix("collator_"))
    for row in read_rows(name):
        samples = []
        for sample in row["samples"]:
            try:
                made = compat_sample(
                    sample,
                    tokenizer,
                    version,
                    max_length=row["model_max_length"],
                    use_im_start_end=imse,
                )
            except LlavaError:
                continue
            samples.append(made)
        batch = collate_compat(samples, tokenizer, max_length=row["model_max_length"])
        for key, values in batch.items():
            assert values.tolist() == row[key], key


def test_golden_lengths():
    want = json.loads((shared("golden") / "preprocess" / "lengths.json").read_text("utf-8"))
    assert modality_lengths(want["samples"]) == want["modality_lengths"]
