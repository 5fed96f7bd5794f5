"""GGUF files read back with the gguf package: every tensor, and what llama.cpp needs to know."""

from dataclasses import replace

import numpy as np
import pytest

from llava_jax.convert import convert
from llava_jax.convert.gguf_out import interleaved, language_tensors, mmproj_tensors, write_gguf
from llava_jax.convert.opening import open_source
from llava_jax.convert.write import Target
from llava_jax.errors import WeightError
from tests.convert import tiny

gguf = pytest.importorskip("gguf")

MLP = replace(tiny.TEXT, language=replace(tiny.TEXT.language, mlp_width=64))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return tiny.save(folder / "a", "jax", MLP, tokenizer=tiny.tokenizer(folder / "t"))


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_tensors_are_read_back(source, kind, tmp_path):
    write_gguf(source, tmp_path / "b", kind=kind)
    opened = open_source(source)
    files = {"model": language_tensors(opened), "mmproj": mmproj_tensors(opened)}
    for stem, wanted in files.items():
        reader = gguf.GGUFReader(tmp_path / "b" / f"{stem}-{kind}.gguf")
        found = {t.name: t for t in reader.tensors}
        assert set(found) == set(wanted)
        for name, lazy in wanted.items():
            tensor, value = found[name], lazy.read().astype(np.float32)
            assert tuple(int(n) for n in tensor.shape[::-1]) == value.shape
            back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
            bound = {"f32": 0, "f16": 1e-3, "q8_0": 1e-2}[kind]
            np.testing.assert_allclose(back, value, atol=bound, rtol=0)
            if value.ndim == 1:
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32


def test_sizes_and_vocabulary(source, tmp_path):
    write_gguf(source, tmp_path / "b")
    reader = gguf.GGUFReader(tmp_path / "b/model-f16.gguf")
    assert reader.fields["llama.attention.head_count_kv"].contents() == 2
    assert reader.fields["llama.vocab_size"].contents() == 320
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert (len(tokens), tokens[:3]) == (320, ["<unk>", "<s>", "</s>"])
    reader = gguf.GGUFReader(tmp_path / "b/mmproj-f16.gguf")
    assert reader.fields["clip.vision.feature_layer"].contents() == [2]
    assert not any("blk.2." in t.name or "post" in t.name for t in reader.tensors)


def test_rope_order():
    """Row 2k of a head is its row k, row 2k + 1 its row k + half."""
    rows = interleaved(np.arange(8)[:, None], heads=2)[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rows_that_hugging_face_added_stay_out(source, tmp_path):
    convert(source, tmp_path / "hf", Target("hf"))
    write_gguf(tmp_path / "hf", tmp_path / "b")
    reader = gguf.GGUFReader(tmp_path / "b/model-f16.gguf")
    assert reader.fields["llama.vocab_size"].contents() == 320


@pytest.mark.parametrize(
    "change", [{"projector": "linear"}, {"feature_select": "cls_patch"}], ids=str
)
def test_what_llama_cpp_cannot_run_is_refused(change, source, tmp_path):
    folder = tiny.save(tmp_path / "a", "jax", replace(MLP, **change), tokenizer=source.parent / "t")
    with pytest.raises(WeightError, match=r"llama\.cpp"):
        write_gguf(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
