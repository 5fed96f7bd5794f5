"""Hostile and broken files: nothing in them runs, each is refused in one line and at once."""

import json
import os
import pickle
import struct
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_jax.convert import Target, convert, load_checkpoint
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import safetensors
from llava_jax.errors import WeightError
from tests.convert import tiny

MODEL = "model.safetensors"


def refused(action, *words):
    start = time.process_time()
    with pytest.raises(WeightError) as error:
        action()
    line = str(error.value)
    assert "\n" not in line
    assert " at 0x" not in line
    for word in words:
        assert word in line
    assert time.process_time() - start < 5
    return line


# Headers ----------------------------------------------------------------------------------------


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "empty file": b"",
    "short": b"\x01\x00",
    "huge length": raw({}, length=1 << 62),
    "length over the file": raw({}, length=10_000),
    "no JSON": raw(b"{nope"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "a list": raw([]),
    "deep nesting": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate": raw(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "parent folder": raw({"../../a": entry(0, 4)}, bytes(4)),
    "absolute": raw({"/etc/a": entry(0, 4)}, bytes(4)),
    "backslash": raw({"a\\b": entry(0, 4)}, bytes(4)),
    "terminal codes": raw({"a\x1b[31m": entry(0, 4)}, bytes(4)),
    "long name": raw({"a" * 5000: entry(0, 4)}, bytes(4)),
    "overlap": raw({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "same place": raw({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "hole": raw({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "hole at the front": raw({"a": entry(4, 8)}, bytes(8)),
    "beyond the end": raw({"a": entry(0, 400)}, bytes(4)),
    "trailing bytes": raw({"a": entry(0, 4)}, bytes(8)),
    "negative": raw({"a": entry(0, 4, [-1])}, bytes(4)),
    "negative offset": raw({"a": entry(-4, 0)}, bytes(4)),
    "overflow": raw({"a": entry(0, 4, [1 << 62, 1 << 62])}, bytes(4)),
    "wrong size": raw({"a": entry(0, 4, [2])}, bytes(4)),
    "floats": raw({"a": entry(0, 4, [1.0])}, bytes(4)),
    "bools": raw({"a": entry(0, 4, [True])}, bytes(4)),
    "unknown type": raw({"a": entry(0, 4, [1], "F8_E4M3")}, bytes(4)),
    "no entry": raw({"a": 3}),
    "extra key": raw({"a": entry(0, 4) | {"x": 1}}, bytes(4)),
    "200,000 tensors": raw({f"t{i}": entry(0, 0, [0]) for i in range(200_000)}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HEADERS[name])
    refused(lambda: safetensors.read(path), "x.safetensors")


def test_good_files_of_the_library_are_read(tmp_path):
    state = {
        "a.b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "empty": np.zeros((0, 4)),
        "s": np.array(3),
    }
    save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    ours = safetensors.read(tmp_path / "x.safetensors")
    for name, value in state.items():
        assert np.array_equal(ours[name].read(), value)
        assert ours[name].read().dtype == value.dtype


# Indexes and JSON -------------------------------------------------------------------------------


STAND_INS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132\n": "Git LFS pointer",
    b"<!DOCTYPE html><html><head>": "web page",
}


@pytest.mark.parametrize("data", STAND_INS, ids=STAND_INS.values())
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_what_was_not_downloaded_is_called_that(tmp_path, file, data):
    folder = tiny.save(tmp_path / "a", "hf")
    if file.endswith(".bin"):
        pytest.importorskip("torch")
        (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(data)
    refused(
        lambda: load_checkpoint(folder, allow_pickle=True), f"{file} is a {STAND_INS[data]}, not"
    )


@pytest.fixture
def sharded(tmp_path):
    folder = tiny.save(tmp_path / "a", "hf", shard_size=20_000)
    path = folder / "model.safetensors.index.json"
    return folder, path, json.loads(path.read_text())


@pytest.mark.parametrize(
    "target",
    ["../b.safetensors", "/etc/passwd", "x/y.safetensors", "..", "", 3, "a.txt", "\\b.bin"],
)
def test_index_cannot_leave_the_folder(sharded, target):
    folder, path, index = sharded
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = target
    path.write_text(json.dumps(index))
    refused(lambda: load_checkpoint(folder), name)


def test_index_and_files_disagree(sharded):
    folder, path, index = sharded
    table = index["weight_map"]
    names = list(table)
    other = next(n for n in names if table[n] != table[names[0]])
    for change in (
        {k: v for k, v in table.items() if k != names[0]},
        table | {"model.more": table[names[0]]},
        table | {names[0]: table[other]},
    ):
        path.write_text(json.dumps({"weight_map": change}))
        refused(lambda: load_checkpoint(folder))
    path.write_text(json.dumps({"weight_map": table}))
    (folder / table[names[0]]).unlink()
    refused(lambda: load_checkpoint(folder), table[names[0]])


def test_index_with_a_doubled_name(sharded):
    folder, path, index = sharded
    name, file = next(iter(index["weight_map"].items()))
    text = json.dumps(index).replace(
        '{"metadata"', f'{{"weight_map": {{"{name}": "{file}", "{name}": "{file}"}}, "x"', 1
    )
    path.write_text(text)
    refused(lambda: load_checkpoint(folder), "duplicated")


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"auto_map": {"AutoConfig": "evil.C"}}},
    ],
)
def test_code_in_a_config(file, change, tmp_path):
    folder = tiny.save(tmp_path / "a", "hf")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | change))
    refused(lambda: load_checkpoint(folder), file, "auto_map")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "32"}, {"hidden_size": -4}, {"num_hidden_layers": 10**8}, {"vocab_size": None},
        {"rms_norm_eps": "x"}, {"hidden_act": "relu"}, {"model_type": "gpt2"}, {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, {"rope_scaling": 3},
        {"num_attention_heads": 3}, {"head_dim": 7},
    ],
    ids=str,
)  # fmt: skip
def test_malformed_config(change, tmp_path):
    folder = tiny.save(tmp_path / "a", "hf")
    data = json.loads((folder / "config.json").read_text())
    data["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(data))
    from llava_jax.errors import LlavaError

    with pytest.raises(LlavaError) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "nul", '{"text_config": 3}'])
def test_config_that_is_none(text, tmp_path):
    folder = tiny.save(tmp_path / "a", "hf")
    (folder / "config.json").write_text(text)
    refused(lambda: load_checkpoint(folder))


# Pickles ----------------------------------------------------------------------------------------


class Call:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def gadgets(canary):
    import builtins
    import functools
    import importlib
    import operator
    import runpy
    import shutil
    import subprocess
    import webbrowser

    write = f"open({canary!r}, 'w').close()"
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "subprocess": Call(subprocess.check_call, ["touch", canary]),
        "eval": Call(builtins.eval, write),
        "exec": Call(builtins.exec, write),
        "open": Call(builtins.open, canary, "w"),
        "compile": Call(exec, Call(compile, write, "x", "exec")),
        "import": Call(importlib.import_module, "antigravity"),
        "runpy": Call(runpy.run_path, canary),
        "partial": Call(functools.partial(os.system, f"touch {canary}")),
        "attrgetter": Call(operator.methodcaller("system", f"touch {canary}"), os),
        "copy": Call(shutil.copyfile, "/etc/hostname", canary),
        "browser": Call(webbrowser.open, f"file://{canary}"),
    }


NAMES = sorted(gadgets("/x"))


@pytest.mark.parametrize("form", ["zip", "raw"])
@pytest.mark.parametrize("name", NAMES)
def test_malicious_pickle(name, form, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"
    folder = tiny.save(tmp_path / "a", "original")
    (folder / MODEL).unlink()
    state = {"model.norm.weight": torch.ones(3), "x": gadgets(str(canary))[name]}
    path = folder / "pytorch_model.bin"
    try:
        if form == "zip":
            torch.save(state, path)
        else:
            path.write_bytes(pickle.dumps(state["x"]))
    except (TypeError, pickle.PicklingError, AttributeError) as error:
        pytest.skip(f"cannot be pickled here: {error}")
    refused(lambda: load_checkpoint(folder), "--allow-pickle")
    refused(lambda: load_checkpoint(folder, allow_pickle=True), "pytorch_model.bin")
    assert not canary.exists()


@pytest.mark.parametrize("value", ["text", [1, 2], {"nested": {}}, 3.5])
def test_pickle_of_other_things(value, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": value}, tmp_path / "x.bin")
    refused(lambda: folders.read_file(tmp_path / "x.bin", True), "x.bin", "a")
    torch.save(value, tmp_path / "y.bin")
    refused(lambda: folders.read_file(tmp_path / "y.bin", True), "y.bin")


def test_sparse_and_truncated_pickles(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "x.bin")
    refused(lambda: folders.read_file(tmp_path / "x.bin", True), "x.bin")
    torch.save({"a": torch.eye(300)}, tmp_path / "y.bin")
    whole = (tmp_path / "y.bin").read_bytes()
    (tmp_path / "y.bin").write_bytes(whole[: len(whole) // 2])
    refused(lambda: folders.read_file(tmp_path / "y.bin", True), "y.bin")


def test_without_torch_there_is_a_clear_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.bin").write_bytes(b"")
    refused(lambda: folders.read_file(tmp_path / "x.bin", True), "PyTorch", "pip install")


# Damage -----------------------------------------------------------------------------------------


def test_a_changed_jax_checkpoint_is_not_converted(tmp_path):
    folder = tiny.save(tmp_path / "a", "jax")
    path = folder / MODEL
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    refused(lambda: convert(folder, tmp_path / "b", Target("hf")), MODEL, "SHA-256")
    assert not (tmp_path / "b").exists()


def test_deep_layers_from_a_small_file_are_refused_fast(tmp_path):
    """A config.json that claims 10,000 layers must not make us list them for minutes."""
    folder = tiny.save(tmp_path / "a", "hf")
    data = json.loads((folder / "config.json").read_text())
    data["text_config"]["num_hidden_layers"] = 10_000
    (folder / "config.json").write_text(json.dumps(data))
    refused(lambda: load_checkpoint(folder), "missing")


def test_link_in_a_hub_cache_is_followed(tmp_path):
    folder = tiny.save(tmp_path / "a", "hf")
    blob = tmp_path / "blob"
    (folder / MODEL).rename(blob)
    (folder / MODEL).symlink_to(blob)
    assert set(load_checkpoint(folder).params)
