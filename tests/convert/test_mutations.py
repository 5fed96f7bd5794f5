"""Every tensor of a checkpoint dropped, renamed, transposed, cast, doubled: all refused, by name."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_jax.convert import Options, open_source
from llava_jax.errors import WeightError
from tests.convert import tiny

MODEL = "model.safetensors"
KINDS = {
    "hf": ("hf", MODEL),
    "hf5_memory": ("hf", MODEL),
    "original inside": ("original", MODEL),
    "original": ("original", MODEL),
    "tower": ("original", f"vision_tower/{MODEL}"),
    "jax": ("jax", MODEL),
    "lora": ("lora", "adapter_model.safetensors"),
}


@pytest.fixture(scope="module", params=KINDS)
def victim(request, tmp_path_factory):
    """(folder, weight file in it, its tensors, options to open it)."""
    to, file = KINDS[request.param]
    folder = tmp_path_factory.mktemp("victim") / "a"
    options = Options(allow_pickle=True)
    if request.param == "lora":
        base = tiny.save(folder.parent / "base", "original")
        tiny.save(folder, "lora", tiny.lora())
        options = Options(allow_pickle=True, base=base, vision_tower=base / "vision_tower")
    elif request.param == "original inside":
        from llava_jax.convert import Target, convert

        convert(
            tiny.save(folder.parent / "b", "jax", tiny.ORIGINAL),
            folder,
            Target("original", tower="inside"),
        )
    elif to == "hf":
        tiny.save(folder, to, layout=request.param)
    else:
        tiny.save(folder, to)
    return folder, folder / file, load_file(folder / file), options


def refused(victim, name, *also):
    """Opening raises, and the message names the tensor."""
    folder, _, _, options = victim
    with pytest.raises(WeightError) as error:
        open_source(folder, options)
    assert any(n in error.value.message for n in (name, *also)), error.value.message
    assert "\n" not in str(error.value)


@pytest.fixture
def mutate(victim):
    """Writes changed tensors; the file is whole again afterwards."""
    _, path, state, _ = victim
    kept = path.read_bytes()
    yield lambda change: save_file(change(dict(state)), path)
    path.write_bytes(kept)


def test_dropped(victim, mutate):
    for name in victim[2]:
        mutate(lambda s, name=name: {k: v for k, v in s.items() if k != name})
        refused(victim, name, _linear(name))


def test_renamed(victim, mutate):
    for name in victim[2]:
        new = name.replace("weight", "wieght") if "weight" in name else f"{name}x"
        mutate(lambda s, name=name, new=new: {new if k == name else k: v for k, v in s.items()})
        refused(victim, new)


def test_transposed(victim, mutate):
    """Square matrices too: our exports record which way they lie."""
    seen = 0
    for name, value in victim[2].items():
        if value.ndim < 2:
            continue
        turned = np.ascontiguousarray(np.swapaxes(value, -1, -2))
        seen += 1
        mutate(lambda s, name=name, turned=turned: s | {name: turned})
        refused(victim, name, name.removeprefix("base_model.model."))
    assert seen >= 4


def test_cast(victim, mutate):
    for name, value in victim[2].items():
        mutate(lambda s, name=name, value=value: s | {name: value.astype(np.float16)})
        refused(victim, name)
        mutate(lambda s, name=name, value=value: s | {name: value.astype(np.int32)})
        refused(victim, name)


def test_doubled_in_the_header(victim, mutate):
    _, path, state, _ = victim
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = raw[8 : 8 + length].rstrip(), raw[8 + length :]
    entries = json.loads(header)
    for name in state:
        more = json.dumps({name: entries[name]})[1:]
        doubled = header[:-1] + b"," + more.encode()
        path.write_bytes(struct.pack("<Q", len(doubled)) + doubled + data)
        refused(victim, name)


def test_doubled_in_a_second_file(victim, mutate, tmp_path):
    _, path, state, _ = victim
    if path.name != MODEL:
        pytest.skip("adapters are one file")
    second = path.with_name("model-extra.safetensors")
    first = path.rename(path.with_name("model-first.safetensors"))
    try:
        for name, value in state.items():
            save_file({name: value}, second)
            refused(victim, name)
    finally:
        second.unlink()
        shutil.move(first, path)


def test_resized(victim, mutate):
    for name, value in victim[2].items():
        shape = (value.shape[0] + 1, *value.shape[1:])
        mutate(lambda s, name=name, shape=shape: s | {name: np.zeros(shape, np.float32)})
        refused(victim, name)


def _linear(name: str) -> str:
    """How a missing half of an adapter is called in its message."""
    return name.rpartition("_proj.")[2].removesuffix(".weight") if "lora_" in name else name
