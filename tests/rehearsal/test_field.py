"""The inputs of ../shared/data/field: each is right as its README says, by the same commands."""

import json
import math
import shutil

import numpy as np
import pytest

from tests.rehearsal.command import here, losses, refused, report
from tests.rehearsal.field import open_field

DESCRIBE = "Describe the image."


@pytest.fixture(scope="session")
def field_out(tmp_path_factory):
    return tmp_path_factory.mktemp("field")


@pytest.fixture
def field(request, field_out, monkeypatch):
    """The input that the test is named after."""
    return open_field(request.function.__name__.removeprefix("test_"), field_out, monkeypatch)


def _ok(done):
    assert done.code == 0, f"exit code {done.code}\n{done.out}\n{done.err}"
    return done


def test_every_input_has_a_test():
    from tests.conftest import shared

    names = {p.name for p in shared("field").iterdir() if (p / "README.md").is_file()}
    assert names <= {n.removeprefix("test_") for n in globals()}


# Talking ------------------------------------------------------------------------------------------


def test_chat_vision_tower(field):
    field.script()
    model = field.out / "elsewhere"
    refused(here("chat", "--model", model, "--prompt", "hi"), "--vision-tower")
    tower = field.out / "clip_elsewhere"
    _ok(here("chat", "--model", model, "--vision-tower", tower, "--prompt", "hi"))


def test_image_address(field, tmp_path):
    done = here("chat", "--image", "https://example.org/x/a.jpg", "--prompt", "hi")
    refused(done, "addresses are not fetched", "download it first")
    done = field.train(tmp_path / "run", field.case / "url.json", **{"data.bad_limit": 1.0})
    told = [line for line in done.err.splitlines() if "addresses are not fetched" in line]
    assert told, done.err


def test_own_chat_template(field):
    field.script()
    for n, words in enumerate((("inspect",), ("convert",), ("chat", "--prompt", "hi", "--model"))):
        # A folder of its own for each: the warning stands once in a process.
        model = field.out / f"owntemplate_{n}"
        shutil.copytree(field.out / "owntemplate", model, dirs_exist_ok=True)
        to = (field.out / "owntemplate_hf", "--to", "hf", "--overwrite")
        done = _ok(here(*words, model, *(to if words == ("convert",) else ())))
        assert "vicuna_v1" in done.err, done.err
        assert "--template" in done.err, done.err


def test_pad_token_beyond_vocabulary(field, tmp_path):
    field.script()
    _ok(here("chat", "--model", field.out / "padtok", "--prompt", "hi"))
    data = field.out / "eight.json"
    done = _ok(field.train(tmp_path, data, **{"model.init": field.out / "padtok", "steps": 1}))
    _ok(here("chat", "--model", tmp_path / "export", "--prompt", "hi"))
    assert math.isfinite(losses(tmp_path)[0]), done.err


def test_png_with_long_text(field):
    image = field.case / "long_text.png"
    assert _ok(here("chat", "--image", image, "--prompt", DESCRIBE)).out.strip()


def test_saved_by_transformers_5(field):
    field.script()
    for name in ("tf5", "tf5_with_tokenizer_model"):
        done = here("chat", "--model", field.out / name, "--prompt", "hi")
        if done.code and name == "tf5":
            refused(done, "tokenizer.model")
        else:
            _ok(done)


def test_several_end_tokens(field):
    """The answer ends at the second id too; which one that is follows from the model's own answer."""
    field.script()
    import llava_jax

    image = field.out / "img" / "shape.png"
    whole = llava_jax.load(field.out / "base_hf").generate(DESCRIBE, image)
    assert len(whole.ids) > 3, whole
    generation = field.out / "eoslist" / "generation_config.json"
    kept = json.loads(generation.read_text())
    assert kept["eos_token_id"] == [2, 300]
    generation.write_text(json.dumps(kept | {"eos_token_id": [2, whole.ids[2]]}))
    first = whole.ids.index(whole.ids[2])
    model = llava_jax.load(field.out / "eoslist")
    assert model.generate(DESCRIBE, image).ids == whole.ids[: first + 1]
    words = ("--model", field.out / "eoslist", "--image", image, "--prompt", DESCRIBE)
    said = _ok(here("chat", *words)).out.strip()
    assert whole.text.startswith(said)
    assert len(said) < len(whole.text)


def test_weights_with_nan(field, tmp_path):
    field.script()
    model = field.out / "nan"
    image = field.out / "img" / "shape.png"
    done = here("chat", "--model", model, "--image", image, "--prompt", DESCRIBE)
    refused(done, "not finite")
    data = field.out / "eight.json"
    data.write_text(json.dumps([_record(str(k)) for k in range(8)]))
    done = field.train(tmp_path, data, **{"model.init": model})
    refused(done, "not finite")
    assert "up" in done.last or "inspect" in done.last


def _record(id_: str) -> dict:
    turns = [("human", "<image>\nWhat colour is it?"), ("gpt", "red")]
    told = [{"from": who, "value": text} for who, text in turns]
    return {"id": id_, "image": "a.jpg", "conversations": told}


# Training -----------------------------------------------------------------------------------------


def test_continue_adapter(field, tmp_path):
    """Continued, an adapter keeps its own alpha and rank, or says that they differ."""
    field.script()
    changes = {"model.init": field.out / "adapter", "trainable": "('projector','lora')", "steps": 1}
    data = field.out / "eight.json"
    _ok(field.train(tmp_path / "a", data, lora_rank=0, **changes))
    same = field.train(tmp_path / "b", data, lora_rank=8, **changes)
    if same.code:
        refused(same, "alpha", "16", "256")
    else:
        assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-6)


def test_image_without_tag(field, tmp_path):
    done = _ok(field.train(tmp_path, field.case / "notes.json"))
    notes = report(tmp_path)["notes"]
    counts = {k: v if isinstance(v, int) else v["count"] for k, v in notes.items()}
    want = {"unanswered question": 1, "leading answer": 1, "image without tag": 1}
    assert counts == want
    assert "WARNING: image without tag: 1 of 12 samples" in done.err, done.err


def test_images_key(field, tmp_path):
    for done in (
        here("data", "show", field.case / "images.json"),
        field.train(tmp_path, field.case / "images.json"),
    ):
        if done.code:
            refused(done, "images")
        else:
            assert any("images" in x for x in done.err.splitlines() if x[:4] == "WARN"), done.err


def test_json_or_lines(field):
    for name in ("array.jsonl", "lines.json", "pretty.jsonl"):
        done = here("data", "show", field.case / name)
        if done.code:
            refused(done, name, ".json")
        else:
            assert "<image>" in done.out or "human" in done.out or done.out


def test_jsonl_line_separator(field):
    done = _ok(here("data", "show", field.case / "ls.jsonl"))
    assert done.out.strip()


def test_lora_rank_not_trained(field, tmp_path):
    field.script()
    done = field.train(tmp_path, field.out / "eight.json", lora_rank=8, steps=1)
    if done.code:
        refused(done, "lora_rank", "trainable")
    else:
        warned = [x for x in done.err.splitlines() if x.startswith("WARNING")]
        assert any("lora_rank" in x and "trainable" in x for x in warned), done.err


def test_several_data_files(field):
    for name in ("one", "two"):
        (field.out / f"{name}.json").write_text(json.dumps([_record(name)]))
    one, two = (str(field.out / f"{name}.json") for name in ("one", "two"))
    ways = (
        ["--config", field.case / "two.py"],
        ["--config", "finetune_7b", f"--config.data.path=('{one}','{two}')"],
        ["--config", "finetune_7b", f"--config.data.path={one},{two}"],
    )
    for way in ways:
        done = _ok(here("train", *way, "--show"))
        line = next(x for x in done.out.splitlines() if x.startswith("data.path"))
        assert one in line
        assert two in line


@pytest.mark.parametrize("name", ["mix", "text"])
def test_text_only_batch(field, tmp_path, name):
    _ok(field.train(tmp_path, field.case / f"{name}.json"))
    assert len(losses(tmp_path)) == 4
    assert all(map(math.isfinite, losses(tmp_path)))


def test_train_without_tokenizer(field, tmp_path):
    field.script()
    model = field.out / "notok"
    done = field.train(tmp_path, field.out / "eight.json", **{"model.init": model})
    refused(done, "notok", "tokenizer.model")


def test_wrong_image_folder(field, tmp_path):
    for n, folder in enumerate((field.out / "img", "")):
        changes = {"batch_size": 32, "data.image_folder": folder}
        done = field.train(tmp_path / str(n), field.case / "coco.json", **changes)
        refused(done, "data.image_folder")
        first = json.loads((field.case / "coco.json").read_text())[0]["image"]
        assert str(folder) in done.last, done.last
        assert first.rpartition("/")[0] in done.last, done.last
        assert len(done.err.strip().splitlines()) <= 3, done.err


# Weights ------------------------------------------------------------------------------------------


def test_convert_shipped_name(field):
    _ok(here("convert", "tiny", field.out / "shipped", "--to", "hf", "--overwrite"))
    assert (field.out / "shipped" / "config.json").is_file()


def test_dtype_in_config(field):
    lines = [x.split() for x in field.script().splitlines() if x.startswith(("hf ", "original "))]
    names = {"BF16": "bfloat16", "F32": "float32"}
    assert len(lines) == 4
    for kind, dtype, _, have, _, config in lines:
        assert names[have] == config, (kind, dtype)


def test_merge_at_fp32(field):
    line = next(x for x in field.script().splitlines() if "largest difference" in x)
    assert float(line.split()[-1]) < 1e-7


def test_new_token_lost(field):
    """The token and its rows are in the export, or the export is refused."""
    for line in (x for x in field.script().splitlines() if " rc " in x):
        kind, _, code = line.split()
        folder = field.out / f"newtok_{kind}"
        if int(code):
            assert int(code) == 2
            assert not folder.exists()
            continue
        rows = _rows_of_gguf(folder) if kind == "gguf" else _rows_of_original(folder)
        np.testing.assert_allclose(rows["[SEG]"], np.arange(96) / 96, atol=1e-3)


def _rows_of_original(folder) -> dict[str, np.ndarray]:
    """Input embeddings of the tokens that added_tokens.json names."""
    from safetensors.numpy import load_file

    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    added = json.loads((folder / "added_tokens.json").read_text())
    return {token: rows[i].astype(np.float32) for token, i in added.items()}


def _rows_of_gguf(folder) -> dict[str, np.ndarray]:
    """Input embeddings of every token of the language model's file."""
    gguf = pytest.importorskip("gguf")
    for path in folder.glob("*.gguf"):
        reader = gguf.GGUFReader(path)
        field = reader.fields.get("tokenizer.ggml.tokens")
        if field is not None:
            rows = next(t.data for t in reader.tensors if t.name == "token_embd.weight")
            names = [bytes(field.parts[i]).decode() for i in field.data]
            return dict(zip(names, rows.astype(np.float32)))
    raise AssertionError(f"no GGUF with a tokenizer in {folder}")


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "olora"])
def test_pissa_adapter(field, method):
    shutil.rmtree(field.out / "pissa_merged", ignore_errors=True)
    assert "rc 2" in field.script("make.py", method)
    done = here("convert", field.out / "pissa", field.out / "p2", "--to", "hf", "--merge")
    refused(done, "adapter_config.json", "init_lora_weights", method)
    assert not (field.out / "pissa_merged").exists()


@pytest.mark.parametrize("method", ["gaussian", "eva", "orthogonal"])
def test_adapters_that_leave_the_base_alone(field_out, method, monkeypatch):
    found = open_field("pissa_adapter", field_out, monkeypatch)
    assert "rc 0" in found.script("make.py", method)


def test_preprocessor_settings(field):
    """Those pixels, or a refusal that names file and key."""
    from llava_jax.errors import LlavaError

    try:
        line = field.script().splitlines()[-1]
    except LlavaError as error:
        assert "preprocessor_config.json" in str(error)
    else:
        assert line.endswith(" 0"), line


def test_quantised_checkpoint(field):
    field.script()
    done = here("inspect", field.out / "bnb4")
    refused(done, "config.json", "quantization_config", "bitsandbytes", "not supported")


def test_stale_index(field):
    field.script()
    done = _ok(here("inspect", field.out / "stale_index"))
    assert "index" in done.err, done.err
