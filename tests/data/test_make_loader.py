"""The loader from its settings to its batches, with the real text and image rooms behind it."""

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import sentencepiece
from ml_collections import ConfigDict
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.data.bad import TooManyBad
from llava_jax.data.check import open_data
from llava_jax.data.loader import make_loader
from llava_jax.data.scan import is_held
from llava_jax.errors import ConfigError, LlavaError, SampleError
from llava_jax.text.records import image_paths
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.config import load_config
from tests.conftest import shared

MODEL = LlavaConfig.tiny()
WORDS = "what is the shape blue red green circle square yes no a in picture colour of there".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS)[:6]) for _ in range(300)]
    prefix = tmp_path_factory.mktemp("tokens") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",  # as in LLaMA's model, which keeps line ends
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer.load(prefix.with_suffix(".model"))


@pytest.fixture
def data(tmp_path) -> Path:
    records = []
    for i, colour in enumerate(["red", "green", "blue"] * 4):
        Image.new("RGB", (30 + i, 40), colour).save(tmp_path / f"{i}.png")
        turns = []
        for question, answer in (("what is the colour", colour), ("is there a circle", "no")):
            tag = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": tag + question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    records.append({"id": "text", "image": None, "conversations": turns_without_image()})
    records.append(
        {"id": "two", "image": ["0.png", "1.png"], "conversations": turns_with("<image> <image>")}
    )
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def turns_with(front: str) -> list[dict]:
    return [
        {"from": "human", "value": f"{front} what is in the picture"},
        {"from": "gpt", "value": "a square"},
    ]


def turns_without_image() -> list[dict]:
    return turns_with("")


def config(folder: Path, **changes) -> ConfigDict:
    base = {"batch_size": 4, "threads": 1, "length_buckets": (64, 128, 256), "seed": 3}
    return ConfigDict(
        {"path": str(folder / "data.json"), "image_folder": str(folder), **base, **changes}
    )


def trained_text(tokenizer: Tokenizer, batch: dict, row: int) -> str:
    return tokenizer.decode([t for t in batch["targets"][row].tolist() if t >= 0])


def rows_by_id(loader) -> dict[str, tuple[dict, int]]:
    found = {}
    for _ in range(loader.steps_per_epoch):
        batch, info = next(loader)
        found.update({name: (batch, row) for row, name in enumerate(info["ids"])})
    loader.close()
    return found


def test_a_conversation_ends_up_in_the_batch(data, tokenizer):
    rows = rows_by_id(make_loader(config(data), MODEL, tokenizer))
    assert len(rows) == 14
    batch, row = rows["0"]
    assert trained_text(tokenizer, batch, row).split() == ["red</s>", "no</s>"]
    assert (batch["slots"][row] >= 0).sum() == MODEL.image_tokens
    assert batch["images"][row, 0, 32, 32].tolist() == [255, 0, 0]
    assert batch["images"][row, 0, 32, 0].tolist() == [122, 116, 104]
    batch, row = rows["text"]
    assert (batch["slots"][row] == -1).all()
    batch, row = rows["two"]
    assert (batch["slots"][row] >= 0).sum() == 2 * MODEL.image_tokens
    assert batch["images"][row, :2, 32, 32].tolist() == [[255, 0, 0], [0, 128, 0]]


def test_crop_instead_of_pad(data, tokenizer):
    settings = config(data, image_aspect_ratio="square")
    batch, row = rows_by_id(make_loader(settings, MODEL, tokenizer))["0"]
    assert (batch["images"][row, 0] == [255, 0, 0]).all()


def test_independent_turns(data, tokenizer):
    settings = config(data, turns="independent")
    batch, row = rows_by_id(make_loader(settings, MODEL, tokenizer))["0"]
    turns = batch["turns"][row][batch["segments"][row] > 0]
    assert sorted(set(turns.tolist())) == [0, 1, 2]
    starts = [batch["positions"][row][turns.tolist().index(n)] for n in (1, 2)]
    assert starts[0] == starts[1] == (turns == 0).sum()

    one = config(data, turns="independent", turns_per_sample=1)
    seen = []
    for epoch in range(8):
        loader = make_loader(one, MODEL, tokenizer, start=4 * epoch)
        seen.append(trained_text(tokenizer, *rows_by_id(loader)["0"]).strip())
    assert set(seen) == {"red</s>", "no</s>"}


def test_captions_of_stage_one(data, tokenizer):
    records = [
        {"id": str(i), "image": f"{i}.png", "conversations": turns_with("<image>")}
        for i in range(3)
    ]
    (data / "data.json").write_text(json.dumps(records))
    rows = rows_by_id(make_loader(config(data, version="plain"), MODEL, tokenizer))
    assert trained_text(tokenizer, *rows["0"]).strip(" ") == "a square\n"


def test_compat_trains_as_the_original(data, tokenizer):
    """Its caption has no `<unk>`, which the original takes for padding; ours keeps it as text."""
    records = json.loads((data / "data.json").read_text())[:2]
    for record in records:
        record["conversations"] = turns_with("<image>")
        record["conversations"][1]["value"] = "a <unk>square"
    (data / "data.json").write_text(json.dumps(records))
    for compat, text in ((False, "a <unk>square"), (True, "a square")):
        settings = config(data, version="plain", compat=compat, batch_size=2)
        batch, row = rows_by_id(make_loader(settings, MODEL, tokenizer))["0"]
        assert trained_text(tokenizer, batch, row).split() == text.split()
        assert 0 not in batch["targets"][row]


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("hosts", [1, 2])
def test_notes_are_counted_by_sample(data, tokenizer, threads, hosts):
    """Three epochs, batches made ahead and two hosts: each record's notes count once."""
    records = json.loads((data / "data.json").read_text())
    records[1]["conversations"].append({"from": "human", "value": "and"})
    records[2]["conversations"].insert(0, {"from": "gpt", "value": "yes"})
    records[3]["conversations"][0]["value"] = "what is the colour"
    records[4]["conversations"][0]["value"] = "<image> <image> what is the colour"
    records[12]["conversations"][0]["value"] = "what is <image> there"
    records[5]["conversations"][1]["value"] = ""
    (data / "data.json").write_text(json.dumps(records))
    wanted = {
        "unanswered question": ["1"],
        "leading answer": ["2"],
        "image without tag": ["3"],
        "more tags than images": ["4"],
        "tag without image": ["text"],
        "empty answers": ["5"],
    }
    for i in range(hosts):
        source = make_loader(
            config(data, threads=threads), MODEL, tokenizer, process_index=i, process_count=hosts
        )
        for _ in range(3 * source.steps_per_epoch):
            next(source)
        report = source.report()
        source.close()
        assert report["notes"] == {note: 1 for note in wanted}
        assert report["noted"] == wanted
        assert (report["seen"], report["given"]) == (14, 42)


def test_an_epoch_cut_short_counts_what_it_gave(data, tokenizer):
    """Batches made ahead do not count."""
    source = make_loader(config(data, threads=2, prefetch=8), MODEL, tokenizer)
    next(source)
    assert (source.report()["given"], source.report()["seen"]) == (4, 4)
    source.close()


def test_data_opened_before_the_model_is_not_read_again(data, tokenizer):
    opened = open_data(config(data))
    (data / "data.json").unlink()
    assert make_loader(config(data), MODEL, tokenizer, data=opened).samples == 14


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_shipped_settings_on_mixed_records(data, tokenizer, pack, grouped):
    """finetune_7b as it is but for its data and batch: text-only batches, on 1, 2 and 4 hosts."""
    records = json.loads((data / "data.json").read_text())
    text = [{"id": f"t{i}", "conversations": turns_without_image()} for i in range(21)]
    (data / "data.json").write_text(json.dumps([*records, *text]))
    shipped = load_config("finetune_7b", []).data
    settings = {
        **{**shipped, "path": str(data / "data.json"), "image_folder": str(data)},
        **{"batch_size": 8, "pack": pack, "group_by_modality": grouped},
    }
    whole = None
    for hosts in (1, 2, 4):
        sources = [
            make_loader(
                settings, MODEL, tokenizer, process_index=i, process_count=hosts, row_parts=4
            )
            for i in range(hosts)
        ]
        steps = []
        for _ in range(sources[0].steps_per_epoch):
            parts = [next(source)[0] for source in sources]
            steps.append({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        for source in sources:
            source.close()
        whole = whole or steps
        for one, other in zip(whole, steps, strict=True):
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name])
    for batch in whole or ():
        assert batch["tokens"].shape[0] % 4 == 0
        assert (batch["slots"] >= 0).any() == (batch["images"].shape[1] > 0)
    widths = [batch["images"].shape for batch in whole or ()]
    assert not grouped or any(shape[1:] == (0, 64, 64, 3) for shape in widths)


def test_errors_before_the_first_step(data, tokenizer):
    with pytest.raises(ConfigError, match=r"data\.hold_out is not a setting"):
        make_loader(config(data, hold_out=0.1), MODEL, tokenizer)
    with pytest.raises(SampleError, match="no such data file"):
        make_loader(config(data, path=str(data / "none.json")), MODEL, tokenizer)
    with pytest.raises(ConfigError, match="not a multiple of the 3 hosts"):
        make_loader(config(data), MODEL, tokenizer, process_count=3)


def test_easy_vqa():
    """Real data that was not made for this project: every sample of an epoch, once, none bad."""
    folder = shared("easy_vqa")
    records = json.loads((folder / "instruct.json").read_text(encoding="utf-8"))
    kept = [r for i, r in enumerate(records) if not is_held(r, i, image_paths(r), 0.1, 0)]
    tokenizer = Tokenizer.load(shared("golden/model/fullvocab/llava"))
    settings = config(folder, path=str(folder / "instruct.json"), batch_size=64, holdout=0.1)
    settings.turns, settings.turns_per_sample = "independent", 2
    del settings.length_buckets  # the defaults
    loader = make_loader(settings, MODEL, tokenizer)
    ids = [i for _ in range(loader.steps_per_epoch) for i in next(loader)[1]["ids"]]
    loader.close()
    assert sorted(ids) == sorted(str(r["id"]) for r in kept)
    assert len(ids) == loader.samples
    assert loader.report()["bad_count"] == 0


def in_a_bucket(data: Path, bucket: str) -> ConfigDict:
    """The data of `data` in fsspec's store in memory, below memory://BUCKET."""
    store = fsspec.filesystem("memory")
    for file in data.iterdir():
        store.pipe(f"/{bucket}/{file.name}", file.read_bytes())
    places = {"path": f"memory://{bucket}/data.json", "image_folder": f"memory://{bucket}"}
    return config(data, **places)


def test_data_of_an_object_store_are_those_of_a_disk(data, tokenizer):
    here = make_loader(config(data), MODEL, tokenizer)
    there = make_loader(in_a_bucket(data, "same"), MODEL, tokenizer)
    assert here.identity() == there.identity()
    for _ in range(here.steps_per_epoch):
        ours, theirs = next(here)[0], next(there)[0]
        for name, value in ours.items():
            np.testing.assert_array_equal(theirs[name], value, err_msg=name)


def test_images_of_an_object_store_are_looked_for_by_one_listing(data, monkeypatch):
    (data / "3.png").unlink()
    settings = in_a_bucket(data, "listed")
    store, asked = fsspec.filesystem("memory"), []
    for name in ("ls", "info", "exists", "isfile"):
        does = getattr(store, name)
        monkeypatch.setattr(
            store,
            name,
            lambda *a, _name=name, _does=does, **k: asked.append(_name) or _does(*a, **k),
        )
    found = open_data(settings)
    assert 3 in found.bad
    assert asked.count("ls") <= 3, asked
    assert len(asked) <= 8, asked


def test_an_object_store_that_cannot_be_read_is_named(data, tokenizer):
    settings = in_a_bucket(data, "limited")
    small = ConfigDict({**settings, "max_bytes": 10, "bad_limit": 0.5})
    with pytest.raises(TooManyBad, match="larger than allowed"):
        rows_by_id(make_loader(small, MODEL, tokenizer))
    for address, words in (
        ("memory://nowhere", "memory://nowhere' holds none of the images"),
        ("nosuchstore://bucket", "Protocol not known"),
    ):
        with pytest.raises(LlavaError, match=words):
            open_data(ConfigDict({**settings, "image_folder": address}))
    with pytest.raises(SampleError, match=r"memory://limited/none.json: .* \(No such file"):
        open_data(ConfigDict({**settings, "path": "memory://limited/none.json"}))
