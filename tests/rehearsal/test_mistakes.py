"""Every mistake that people make with a first job of their own, typed as they type it.

A mistake is one line, exit code 2, that names the file, setting or sample; what can be read, is.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.rehearsal.command import here, losses, ok, refused, report, run, train_words
from tests.rehearsal.own_data import pictures, record, write

COUNT = 8


@pytest.fixture
def own(model, tmp_path) -> dict[str, Any]:
    """Settings of two short steps on eight records of one's own."""
    return _own(model, tmp_path, [record(n) for n in range(COUNT)])


def _own(model, folder: Path, records: list) -> dict[str, Any]:
    return {
        "model.init": model("hugging_face"),
        "data.path": write(folder / "own.json", records),
        "data.image_folder": pictures(folder / "img"),
        "batch_size": 8,
        "steps": 2,
    }


def _refused(tmp_path: Path, settings: dict, *words: Any, devices: int = 0) -> None:
    """Fails unless finetune_7b is refused with one line that says `words`, and leaves no model.

    devices: in a process of its own that has so many.
    """
    workdir = tmp_path / "run"
    line = train_words("finetune_7b", workdir, settings)
    done = run(*line, devices=devices) if devices else here(*line)
    refused(done, *map(str, words))
    assert not (workdir / "export").exists()


def _trained(tmp_path: Path, settings: dict):
    """(report, finished command) of a run of finetune_7b."""
    workdir = tmp_path / "run"
    done = ok(*train_words("finetune_7b", workdir, settings))
    assert len(losses(workdir)) == settings["steps"]
    return report(workdir), done


# Settings -----------------------------------------------------------------------------------------

SETTINGS = {
    "mistyped": ({"learning_rate": 3}, ("learning_rate", "lr")),
    "mistyped in a group": ({"data.image_foler": "x"}, ("data.image_folder",)),
    "of a wrong type": ({"batch_size": "many"}, ("batch_size", "many")),
    "an unknown choice": ({"dtype": "fp16"}, ("dtype", "fp16")),
    "lora_rank without lora": ({"lora_rank": 8}, ("lora_rank", "lora", "trainable")),
    "max_length above the positions": (
        {"data.max_length": 8192},
        ("max_length", "8192", "4096"),
    ),
    "loss_groups with packing": (
        {"loss_groups": 2, "data.pack": True},
        ("loss_groups", "pack"),
    ),
    "batch and accumulation": ({"grad_accum": 3}, ("batch_size", "grad_accum")),
    "no data file": ({"data.path": ""}, ("data.path",)),
    "an absent data file": ({"data.path": "nowhere.json"}, ("nowhere.json", "data.path")),
    "an absent folder": ({"data.image_folder": "nowhere"}, ("data.image_folder", "nowhere")),
    "an absent model": ({"model.init": "no/such/model"}, ("no/such/model",)),
    "an unknown version": ({"data.version": "v7"}, ("data.version", "v7")),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_setting(case, own, tmp_path):
    changes, words = SETTINGS[case]
    _refused(tmp_path, own | changes, *words)


def test_a_batch_that_eight_devices_cannot_share(own, tmp_path):
    _refused(tmp_path, own | {"batch_size": 6}, "batch_size", "6", "8", devices=8)


def test_nothing_is_loaded_before_settings_are_checked(own, tmp_path):
    """A mistake is found though the model is absent too: nobody waits 26 GB for it."""
    _refused(tmp_path, own | {"model.init": "gone", "dtype": "fp16"}, "dtype")


def test_a_mistyped_option():
    done = here("train", "--config", "finetune_7b", "--lr", "2e-5")
    refused(done, "--lr", "--config.lr")


# Data files ---------------------------------------------------------------------------------------


def test_a_wrong_image_folder_is_one_line(own, tmp_path):
    wrong = tmp_path / "elsewhere"
    wrong.mkdir()
    workdir = tmp_path / "run"
    done = here(*train_words("finetune_7b", workdir, own | {"data.image_folder": wrong}))
    refused(done, "data.image_folder", str(wrong / "a.jpg"))
    assert len(done.err.strip().splitlines()) <= 3, done.err
    assert losses(workdir) == []


def test_no_image_folder_is_one_line(own, tmp_path):
    _refused(tmp_path, own | {"data.image_folder": ""}, "data.image_folder", "a.jpg")


def _lines(records) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


FILES: dict[str, tuple[str, Callable[[list], str | bytes]]] = {
    "a line separator in a text": (
        "own.jsonl",
        lambda rs: _lines([record(0, tag="<image>\nA\u2028B\u2029C\x85D "), *rs[1:]]),
    ),
    "a byte order mark": ("bom.json", lambda rs: b"\xef\xbb\xbf" + json.dumps(rs).encode()),
    "a byte order mark before lines": (
        "bom.jsonl",
        lambda rs: b"\xef\xbb\xbf" + _lines(rs).encode(),
    ),
    "lines called .json": ("lines.json", _lines),
    "a list called .jsonl": ("list.jsonl", json.dumps),
    "an indented list called .jsonl": ("list.jsonl", lambda rs: json.dumps(rs, indent=2)),
    "UTF-16": ("own.json", lambda rs: json.dumps(rs).encode("utf-16")),
    "Windows line ends": ("own.jsonl", lambda rs: _lines(rs).replace("\n", "\r\n")),
}


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """FILES on disk, each with COUNT records of its own."""
    made = {}
    for n, (case, (name, make)) in enumerate(FILES.items()):
        (tmp_path / str(n)).mkdir()
        made[case] = tmp_path / str(n) / name
        content = make([record(n * COUNT + i) for i in range(COUNT)])
        made[case].write_bytes(content if isinstance(content, bytes) else content.encode())
    return made


def test_files_are_read_by_what_is_in_them(files, own, tmp_path):
    """One run on all of them, end to end, by the documented comma."""
    for path in files.values():
        shown = here("data", "show", path)
        assert shown.code == 0, shown.err
        assert "What is item" in shown.out or "A" in shown.out
    together = ",".join(map(str, files.values()))
    told, _ = _trained(tmp_path, own | {"data.path": together})
    assert (told["samples"], told["bad"]) == (COUNT * len(FILES), [])


NOT_DATA = {
    "broken": ('[{"id": 1,}]', "line 1"),
    "an object": ('{"train": []}', "list"),
    "empty list": ("[]", "no samples"),
    "empty": ("", ""),
}


@pytest.mark.parametrize("case", NOT_DATA)
def test_a_file_without_records_is_refused(case, own, tmp_path):
    content, word = NOT_DATA[case]
    path = tmp_path / "broken.json"
    path.write_text(content)
    _refused(tmp_path, own | {"data.path": path}, path.name, word)


# Records ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noted(model, tmp_path_factory):
    """(report, warnings) of one run on records of every kind that is trained otherwise than meant.

    own_0 to own_3 name a picture and no place for it, own_4 and own_5 have theirs under `images`,
    own_6 has an address.
    """
    folder = tmp_path_factory.mktemp("noted")
    records = [record(n, tag="" if n < 4 else "<image>\n") for n in range(48)]
    for n in (4, 5):
        records[n]["images"] = [records[n].pop("image")]
    records[6]["image"] = "https://example.org/x/a.jpg"
    settings = _own(model, folder, records) | {"steps": 6}
    done = ok(*train_words("finetune_7b", folder / "run", settings))
    warnings = [line for line in done.err.splitlines() if line.startswith("WARNING")]
    return report(folder / "run"), warnings


def test_pictures_without_a_tag_are_said_once_and_counted(noted):
    told, warnings = noted
    assert told["notes"]["image without tag"] == 4
    about = [w for w in warnings if "without tag" in w]
    assert len(about) == 1, warnings
    assert "own_0" in about[0]


def test_pictures_under_another_key_are_said_once_and_counted(noted):
    """Trained as text or left out, but never without a word."""
    told, warnings = noted
    about = [w for w in warnings if "images" in w and "own_4" in w]
    assert len(about) == 1, warnings
    everything = json.dumps([told["bad"], told["notes"], told.get("noted")])
    assert "own_4" in everything
    assert "own_5" in everything


def test_an_address_is_named_as_such(noted):
    told, _ = noted
    reasons = {row["id"]: row["reason"] for row in told["bad"]}
    assert "not fetched" in reasons["own_6"]


def test_too_many_bad_records_are_found_before_the_first_step(own, tmp_path):
    records = [record(n) for n in range(COUNT)]
    for n in range(4):
        records[n]["conversations"] = []
    path = write(tmp_path / "bad.json", records)
    settings = own | {"data.path": path}
    _refused(tmp_path, settings, "bad_limit", "4")
    assert losses(tmp_path / "run") == []
    # Mended, the same command goes through: what an earlier run listed is not held against it.
    write(path, [record(n) for n in range(COUNT)])
    told, _ = _trained(tmp_path, settings)
    assert told["bad"] == []


def test_the_first_bad_record_stops_a_strict_run(own, tmp_path):
    path = write(tmp_path / "bad.json", [*(record(n) for n in range(COUNT)), record(99, "no.jpg")])
    changes = {"data.path": path, "data.bad_samples": "error", "steps": 3}
    _refused(tmp_path, own | changes, "own_99", "no.jpg")


# Models -------------------------------------------------------------------------------------------


def _copy(folder: Path, to: Path, *without: str) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        if path.name not in without:
            (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_model_without_tokenizer(own, model, tmp_path):
    bare = _copy(
        model("hugging_face"),
        tmp_path / "bare",
        *(
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        ),
    )
    _refused(tmp_path, own | {"model.init": bare}, bare, "tokenizer.model")


def test_weights_that_are_not_finite(own, model, tmp_path):
    broken = _copy(model("hugging_face"), tmp_path / "broken")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][0, 0] = np.nan
            save_file(tensors, path, metadata={"format": "pt"})
    workdir = tmp_path / "run"
    done = here(*train_words("finetune_7b", workdir, own | {"model.init": broken}))
    refused(done, "not finite")
    assert "up" in done.last or "inspect" in done.last, done.last


def test_another_tower_than_the_checkpoint_names(own, model, tmp_path):
    """The hub is out of reach: the message says which option names a folder."""
    _refused(
        tmp_path,
        own | {"model.init": model("original")},
        *("vision tower", "clip-vit-large", "--config.model.vision_tower"),
    )
