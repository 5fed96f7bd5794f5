"""load_checkpoint onto meshes, hub ids, the command line, and the report."""

import errno
import json
import os
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.convert import load_checkpoint, open_source, save_checkpoint
from llava_jax.convert.io import hub, lazy, safetensors, torch_file
from llava_jax.errors import WeightError
from llava_jax.sharding import make_mesh
from tests.convert import tiny


@pytest.mark.parametrize("to", ["jax", "hf"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (8, 1, 1)])
def test_on_a_mesh(to, shape, tmp_path):
    from llava_jax.llava import param_shardings

    folder = tiny.save(tmp_path / "a", to)
    mesh = make_mesh(*shape)
    host, there = load_checkpoint(folder), load_checkpoint(folder, mesh=mesh)
    shardings = param_shardings(host.config, mesh)
    assert set(there.params) == set(host.params)
    for name, value in host.params.items():
        assert there.params[name].sharding.is_equivalent_to(shardings[name], value.ndim), name
        assert np.array_equal(np.asarray(there.params[name]), value), name


@pytest.mark.parametrize("threaded", [False, True])
def test_a_stack_of_transposed_matrices_is_read_whole_and_in_parts(threaded, monkeypatch):
    monkeypatch.setattr(lazy, "THREADED", 0 if threaded else 2**40)
    layers = np.random.default_rng(0).normal(size=(3, 37, 50)).astype(ml_dtypes.bfloat16)
    leaf = lazy.Leaf(tuple(lazy.of_array(layer.T) for layer in layers), stacked=True)
    want = layers.swapaxes(1, 2)
    for index in (np.s_[:, :, :], np.s_[1:, 5:45, 3:], np.s_[:2, ::2, :1]):
        np.testing.assert_array_equal(leaf.read(index), want[index])


def test_sharded_arrays_are_saved(tmp_path):
    folder = tiny.save(tmp_path / "a", "jax", dtype="bfloat16")
    there = load_checkpoint(folder, mesh=make_mesh(1, 4, 2))
    save_checkpoint(there, tmp_path / "b")
    tiny.same_tensors(folder, tmp_path / "b")


def test_trained_params_go_out_in_the_sources_names(tmp_path):
    """Load, change the weights, save: names, settings and buffers are the source's."""
    folder = tiny.save(tmp_path / "a", "hf", layout="hf5")
    loaded = load_checkpoint(folder)
    loaded.params["language.norm.scale"] = loaded.params["language.norm.scale"] + 1
    save_checkpoint(loaded, tmp_path / "b", to="hf")
    again = load_checkpoint(tmp_path / "b")
    assert again.metadata["hf"]["layout"] == "hf5"
    assert np.array_equal(again.params["language.norm.scale"], loaded.params["language.norm.scale"])


# Hub --------------------------------------------------------------------------------------------


def test_what_looks_like_a_hub_id():
    for name in ("llava-hf/llava-1.5-7b-hf", "a/b@main", "openai/clip-vit-large-patch14-336"):
        assert hub.looks_like_id(name)
    for name in ("a", "/a/b", "a/b/c", "../b", "a/..", "a b/c", ""):
        assert not hub.looks_like_id(name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "neither"),
        ("LocalEntryNotFoundError", "network"),
        ("OfflineModeIsEnabled", "network"),
    ],
)
def test_hub_errors_are_one_line(error, words, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_, **__):
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(WeightError, match=words) as caught:
        load_checkpoint("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_no_fault_of_the_network(number, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError(number, os.strerror(number), "cache/blobs/1")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="cache/blobs/1"):
        hub.resolve("nobody/nothing")


def test_pickles_are_not_even_fetched_unasked(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def fetch(repo, revision=None, allow_patterns=()):
        asked.append((repo, revision, list(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert hub.resolve("a/b@v1") == tmp_path
    hub.resolve("a/b", allow_pickle=True)
    assert asked[0][:2] == ("a/b", "v1")
    assert ["*.bin" in patterns for *_, patterns in asked] == [False, True]


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out, and no network: add(repo, folder).

    It holds of the folder what would have been fetched.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import filter_repo_objects

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repo, folder):
        root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        revision, blobs = "0" * 39 + "1", root / "blobs"
        (root / "refs").mkdir(parents=True)
        (root / "refs/main").write_text(revision)
        files = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
        for i, name in enumerate(filter_repo_objects(files, allow_patterns=hub.SAFE)):
            path, place = folder / name, root / "snapshots" / revision / name
            place.parent.mkdir(parents=True, exist_ok=True)
            blobs.mkdir(exist_ok=True)
            (blobs / str(i)).write_bytes(path.read_bytes())
            place.symlink_to(blobs / str(i))
        return repo

    return add


@pytest.mark.parametrize("kind", ["jax", "hf", "original"])
def test_a_hub_id_is_converted_like_a_folder(kind, hub_cache, tmp_path, capsys):
    folder = tiny.save(tmp_path / "here", kind, tiny.ORIGINAL)
    repo = hub_cache(f"someone/my-{kind}", folder)
    for to in ("hf", "jax", "original"):
        words = ["convert", repo, str(tmp_path / to), "--to", to]
        assert main(words) == 0, capsys.readouterr().err
        assert main(["convert", str(folder), str(tmp_path / f"{to}_here"), "--to", to]) == 0
        tiny.same_tensors(tmp_path / to, tmp_path / f"{to}_here")
    assert main(["compare", repo, str(folder), "--logits", "no"]) == 0


def test_a_hub_id_s_chat_template_is_found(hub_cache, tmp_path):
    config = replace(tiny.CONFIG, template="mistral_instruct")
    folder = tiny.save(tmp_path / "here", "hf", config)
    shutil.rmtree(folder / "llava_jax")  # which names it too
    (folder / "chat_template.json").unlink()
    for name in (folder, hub_cache("someone/my-model", folder)):
        assert open_source(name).config.template == "mistral_instruct"


def test_a_changed_checkpoint_of_the_hub_is_not_converted(hub_cache, tmp_path, capsys):
    folder = tiny.save(tmp_path / "here", "jax")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    repo = hub_cache("someone/damaged", folder)
    for to in ("hf", "gguf"):
        assert main(["convert", repo, str(tmp_path / "out"), "--to", to]) == 2
        assert "model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["hf", "original", "jax", "projector"])
def test_the_shipped_model_is_converted_by_its_name(to, tmp_path, capsys):
    words = ["convert", "tiny", str(tmp_path / "out"), "--to", to]
    whole = to != "projector"  # whose tower and language model are the base's
    assert main([*words, *["--check"] * (to == "hf")]) == 0, capsys.readouterr().err
    assert not whole or main(["compare", "tiny", str(tmp_path / "out"), "--logits", "no"]) == 0


# Command line -----------------------------------------------------------------------------------


def test_convert_with_a_check(tmp_path, capsys):
    source = tiny.save(tmp_path / "a", "jax", tiny.ORIGINAL)
    words = ["convert", str(source), str(tmp_path / "b"), "--to", "hf", "--check"]
    assert main([*words, "--report", str(tmp_path / "r.json")]) == 0
    assert "tensors equal: the checkpoints are equal" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["equal"]
    assert len(report["tensors"]) == len(load_checkpoint(source).params)


@pytest.mark.parametrize("to", ["projector", "lora", "peft"])
def test_parts_are_checked_over_their_base(to, tmp_path, capsys):
    """The tower lies beside the source, not beside what is written."""
    tiny.clip(tmp_path / "in/vision_tower")
    base = tiny.language_model(tmp_path / "base")
    tiny.save(tmp_path / "in/pair", "lora" if to != "projector" else "projector", tiny.lora())
    words = ["convert", str(tmp_path / "in/pair"), str(tmp_path / "out"), "--to", to]
    words += ["--base", str(base), "--allow-pickle", "--check"]
    code = main(words)
    out, error = capsys.readouterr()
    if to == "peft":
        assert code == 2
        assert "--base" in error
        assert not (tmp_path / "out").exists()
    else:
        assert code == 0, error
        assert "the checkpoints are equal" in out


def test_a_base_that_only_the_check_reads_needs_allow_pickle_too(tmp_path, capsys):
    pytest.importorskip("torch")
    source = tiny.save(tmp_path / "a", "jax", tiny.lora())
    base = tiny.save(tmp_path / "base", "hf", tiny.ORIGINAL)
    made = safetensors.read(base / "model.safetensors")
    torch_file.write(base / "pytorch_model.bin", made)
    (base / "model.safetensors").unlink()
    words = ["convert", str(source), str(tmp_path / "b"), "--to", "lora", "--check"]
    assert main([*words, "--base", str(base)]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_check_of_gguf_is_refused_before_anything_is_written(tmp_path, capsys):
    source = tiny.save(tmp_path / "a", "jax", tiny.ORIGINAL)
    assert main(["convert", str(source), str(tmp_path / "b"), "--to", "gguf", "--check"]) == 2
    assert "--check cannot read GGUF back" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_compare_finds_one_changed_value(tmp_path, capsys):
    made = tiny.checkpoint()
    save_checkpoint(made, tmp_path / "a")
    changed = made.params["projector.linear_1.bias"]
    changed[2] += 0.25
    save_checkpoint(made, tmp_path / "b", to="hf")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--logits", "no"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 1
    out = capsys.readouterr().out
    assert "projector.linear_1.bias  DIFFERS (values), by up to 0.25" in out
    off = [r for r in json.loads((tmp_path / "r.json").read_text())["tensors"] if not r["equal"]]
    assert [r["name"] for r in off] == ["projector.linear_1.bias"]


def test_compare_sees_other_settings(tmp_path, capsys):
    from dataclasses import replace

    save_checkpoint(tiny.checkpoint(), tmp_path / "a")
    save_checkpoint(
        tiny.checkpoint(replace(tiny.CONFIG, feature_select="cls_patch")), tmp_path / "b"
    )
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--logits", "no"]) == 1
    assert "feature_select" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    for words in (["no-such-folder"], [str(tmp_path / "x")], [str(tmp_path)]):
        assert main(["convert", *words, str(tmp_path / "out"), "--to", "jax"]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert error.startswith("llava-jax convert: ")


def test_a_shipped_tower_s_name_is_never_a_folder_of_an_export(tmp_path):
    """Wherever it is read, the name means the shipped model; an export's tower may be trained."""
    checkpoint = load_checkpoint("tiny")
    name = "vision.patch_embed.kernel"
    checkpoint.params[name] = np.asarray(checkpoint.params[name]) + 1
    folder = save_checkpoint(checkpoint, tmp_path / "export", to="original")
    assert (folder / "vision_tower" / "config.json").is_file()
    again = load_checkpoint(folder).params[name]
    assert np.array_equal(np.asarray(again), checkpoint.params[name])
