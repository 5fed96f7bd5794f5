"""compare and --check: what differs is said, a cast is called one, an adapter is checked as one."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.convert import (
    Checkpoint,
    Options,
    Target,
    compare,
    convert,
    load_checkpoint,
    save_checkpoint,
)
from llava_jax.convert.io.lazy import float_dtype
from llava_jax.errors import LlavaError, WeightError
from tests.convert import tiny


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
    """No model is run where the test does not say so: tests/convert/test_load.py does that."""
    monkeypatch.setattr(compare, "MAX_PROBE", 0)


def check(tmp_path, capsys, source, to, *more):
    """(exit code, what is printed) of a conversion with --check."""
    words = ["convert", str(source), str(tmp_path / "out"), "--to", to, "--check", "--overwrite"]
    code = main([*words, *map(str, more), "--report", str(tmp_path / "r.json")])
    out, error = capsys.readouterr()
    return code, out if code != 2 else error


def last(text):
    return text.strip().splitlines()[-1]


# Casts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["jax", "hf", "original", "projector"])
def test_a_check_of_a_cast_says_that_it_is_one(to, tmp_path, capsys):
    pytest.importorskip("torch")
    params = tiny.random_params(tiny.ORIGINAL)
    source = save_checkpoint(Checkpoint(tiny.ORIGINAL, params), tmp_path / "a")
    code, out = check(tmp_path, capsys, source, to, "--dtype", "bf16")
    assert code == 0
    assert "cast from float32 to bfloat16: " in out
    assert last(out).endswith("tensors as in the source after the cast: the checkpoints are the same but for the cast")  # fmt: skip
    assert "equal" not in last(out)
    of = {n: p for n, p in params.items() if to != "projector" or n.startswith("projector")}
    off = {n: np.abs(p - p.astype(float_dtype("bf16")).astype(np.float32)).max() for n, p in of.items()}  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())["cast"]
    assert report["name"] == max(off, key=off.__getitem__)
    assert report["max_abs"] == pytest.approx(max(off.values()))
    assert f"by up to {max(off.values()):.3g}" in out


def test_a_cast_that_rounds_nothing_and_one_to_the_same_type(tmp_path, capsys):
    source = tiny.save(tmp_path / "a", "hf", dtype="float16")
    code, out = check(tmp_path, capsys, source, "hf", "--dtype", "fp32")
    assert code == 0
    assert "cast from float16 to float32: no value was rounded" in out
    code, out = check(tmp_path, capsys, source, "hf", "--dtype", "fp16")
    assert code == 0
    assert last(out).endswith("tensors equal: the checkpoints are equal")


def test_a_check_of_mixed_types_says_what_became_of_them(tmp_path, capsys):
    params = tiny.random_params()
    name = "language.layers.mlp.up.kernel"
    params[name] = params[name].astype(np.float16)
    source = save_checkpoint(Checkpoint(tiny.CONFIG, params), tmp_path / "a", to="hf")
    code, out = check(tmp_path, capsys, source, "hf", "--dtype", "bf16", "--mixed-types")
    assert code == 0
    assert "cast from mixed types to bfloat16" in out


def test_a_check_of_a_merge_says_what_it_rounded(tmp_path, capsys):
    params = tiny.random_params(tiny.lora())
    half = {n: p if ".lora_" in n else p.astype(np.float16) for n, p in params.items()}
    source = save_checkpoint(Checkpoint(tiny.lora(), half), tmp_path / "a")
    code, out = check(tmp_path, capsys, source, "hf")
    assert code == 0
    assert "merge from float16 to float16: 7 tensors were rounded" in out
    assert "the same but for the merge" in last(out)
    code, out = check(tmp_path, capsys, source, "hf", "--dtype", "bf16")
    assert "the same but for the merge and cast" in last(out)


def test_a_wrong_cast_is_found(tmp_path, capsys):
    source = tiny.save(tmp_path / "a", "jax", tiny.ORIGINAL)
    convert(source, tmp_path / "out", Target("hf"), Options(dtype="bf16"))
    changed = load_checkpoint(tmp_path / "out")
    bias = changed.params["projector.linear_0.bias"].copy()
    bias[0] += 1
    changed.params["projector.linear_0.bias"] = bias
    save_checkpoint(changed, tmp_path / "off", to="hf")
    report = compare.compare(source, tmp_path / "off", Options(dtype="bf16"))
    assert not report["equal"]
    assert "NOT equal" in compare.table(report)


# Adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hf", "original", "jax"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_adapter_is_right_whatever_the_type_of_the_base(kind, dtype, tmp_path, capsys):
    """Training holds a frozen base in bfloat16: the export's kernels are the base's, rounded."""
    pytest.importorskip("torch")
    config = tiny.ORIGINAL
    under = {n: p.astype(np.float16) for n, p in tiny.random_params(config).items()}
    base = save_checkpoint(
        Checkpoint(config, {n: p.astype(float_dtype(dtype)) for n, p in under.items()}),
        tmp_path / "base",
        to=kind,
    )
    trained = {n: p.astype(float_dtype("bf16")) for n, p in under.items()}
    for name, value in tiny.random_params(tiny.lora(), seed=5).items():
        if ".lora_" in name or name.startswith("projector"):
            trained[name] = value
    source = save_checkpoint(Checkpoint(tiny.lora(), trained), tmp_path / "jax")
    tower = ["--vision-tower", base / "vision_tower"] if kind == "original" else []
    for to in ("peft", "lora"):
        code, out = check(tmp_path, capsys, source, to, "--base", base, *tower)
        assert code == 0, out
        assert "the checkpoints are equal" in last(out)
        assert ("of the base are of another type" in out) == (dtype != "bfloat16")


@pytest.mark.parametrize("to", ["peft", "lora"])
def test_an_adapter_over_another_base_is_not_equal(to, tmp_path, capsys):
    pytest.importorskip("torch")
    source = tiny.save(tmp_path / "jax", "jax", tiny.lora())
    base = tiny.save(tmp_path / "base", "hf", tiny.ORIGINAL, seed=1, dtype="float16")
    code, out = check(tmp_path, capsys, source, to, "--base", base)
    assert code == 1
    assert "DIFFERS (types)" in out
    assert "NOT equal" in last(out)


def test_the_answers_of_an_adapter_are_compared_over_one_base(tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(compare, "MAX_PROBE", 10**9)
    under = {n: p.astype(np.float16) for n, p in tiny.random_params(tiny.ORIGINAL).items()}
    base = save_checkpoint(Checkpoint(tiny.ORIGINAL, under), tmp_path / "base", to="hf")
    trained = {n: p.astype(float_dtype("bf16")) for n, p in under.items()}
    trained |= {n: p for n, p in tiny.random_params(tiny.lora()).items() if ".lora_" in n}
    source = save_checkpoint(Checkpoint(tiny.lora(), trained), tmp_path / "jax")
    code, out = check(tmp_path, capsys, source, "peft", "--base", base)
    assert code == 0, out
    assert "the same greedy tokens" in out


# Different models -------------------------------------------------------------------------------


def changed(**language):
    return replace(tiny.ORIGINAL, language=replace(tiny.ORIGINAL.language, **language))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(width=40, head_width=10), "setting language.width: 32 and 40"),
        (changed(layers=3), "setting language.layers: 2 and 3"),
        (changed(vocab_size=100), "setting language.vocab_size: 90 and 100"),
        (changed(rope_theta=5e5), "setting language.rope_theta"),
        (changed(norm_eps=1e-6), "setting language.norm_eps"),
        (replace(tiny.ORIGINAL, projector="linear"), "setting projector: mlp2x_gelu and linear"),
        (replace(tiny.ORIGINAL, feature_layer=-1), "setting feature_layer: -2 and -1"),
        (replace(tiny.ORIGINAL, image_aspect_ratio="square"), "setting image_aspect_ratio"),
        (replace(tiny.ORIGINAL, template="plain"), "setting template"),
        (replace(tiny.ORIGINAL, vision=replace(tiny.ORIGINAL.vision, image_size=42)), "setting vision.image_size"),
    ],
)  # fmt: skip
def test_two_models_that_differ_in_a_setting(config, said, tmp_path, capsys):
    a, b = tiny.save(tmp_path / "a", "jax", tiny.ORIGINAL), tiny.save(tmp_path / "b", "jax", config)
    shapes = config.language.width != 32 or config.language.layers != 2
    for logits in ("yes", "no") if shapes else ("no",):
        assert main(["compare", str(a), str(b), "--logits", logits]) == 1
        out = capsys.readouterr().out
        assert said in out
        assert last(out).endswith("the checkpoints are NOT equal")
        assert logits == "no" or "of different shapes" in out


def test_the_shipped_model_is_itself_and_no_other(tmp_path, capsys):
    assert main(["compare", "tiny", "tiny"]) == 0
    assert last(capsys.readouterr().out).endswith("the checkpoints are equal")
    other = tiny.save(tmp_path / "a", "hf")
    assert main(["compare", "tiny", str(other)]) == 1
    assert last(capsys.readouterr().out).endswith("the checkpoints are NOT equal")


def test_two_models_that_differ_in_the_tokenizer_alone(tmp_path, capsys):
    def save(name, tokenizer):
        return tiny.save(tmp_path / name, "jax", tiny.TEXT, tokenizer=tokenizer)

    one = tiny.tokenizer(tmp_path / "t1")
    smaller = tiny.tokenizer(tmp_path / "t2", size=310)
    a, b, c = save("a", one), save("b", smaller), save("c", None)
    assert main(["compare", str(a), str(a), "--logits", "no"]) == 0
    for other, said in ((b, "setting tokenizer: 320 pieces and 310 pieces"), (c, "setting tokenizer: its files are there and none")):  # fmt: skip
        capsys.readouterr()
        assert main(["compare", str(a), str(other), "--logits", "no"]) == 1
        out = capsys.readouterr().out
        assert said in out
        assert "NOT equal" in last(out)
    assert main(["convert", str(a), str(tmp_path / "hf"), "--to", "hf", "--check"]) == 0


# NaN --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--dtype", "bf16"]])
def test_a_check_names_weights_that_are_not_finite(more, tmp_path, capsys):
    made = tiny.checkpoint(tiny.ORIGINAL)
    made.params["language.layers.mlp.up.kernel"][1, 2, 3] = np.nan
    source = save_checkpoint(made, tmp_path / "a", to="hf")
    code, out = check(tmp_path, capsys, source, "hf", *more)
    assert code == 1
    assert "model.safetensors: language_model.model.layers.1.mlp.up_proj.weight: holds NaN" in out
    assert "not finite" in last(out)
    assert main(["compare", str(source), str(tiny.save(tmp_path / "b", "hf", tiny.ORIGINAL))]) == 1
    assert "NOT equal" in last(capsys.readouterr().out)


@pytest.mark.parametrize("to", ["hf", "original"])
def test_an_adapter_is_compared_with_what_it_was_merged_into(to, tmp_path, capsys):
    """--base belongs to the adapter; the merged model is complete."""
    base = tiny.save(tmp_path / "base", "original")
    adapter = tiny.save(tmp_path / "adapter", "lora", tiny.lora(), seed=4)
    more = ["--base", str(base), "--allow-pickle", "--vision-tower", str(base / "vision_tower")]
    merged = str(tmp_path / "merged")
    assert main(["convert", str(adapter), merged, "--to", to, "--merge", *more]) == 0
    for pair in ([str(adapter), merged], [merged, str(adapter)]):
        assert main(["compare", *pair, *more]) == 0
        assert "NOT equal" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["hf", "original"])
def test_a_base_that_is_not_needed_is_said(kind, tmp_path, caplog):
    whole = tiny.save(tmp_path / "a", kind, tiny.ORIGINAL)
    base = tiny.save(tmp_path / "b", "hf", tiny.ORIGINAL)
    if kind == "original":
        with pytest.raises(WeightError, match="complete, and no delta"):
            load_checkpoint(whole, base=base)
    else:
        load_checkpoint(whole, base=base)
        assert "is complete: nothing is read of" in caplog.text


def test_the_bar_of_logits_grows_with_them_beyond_ordinary_size():
    """Never for logits of ordinary size; beyond, by float32's rounding."""
    ordinary = np.linspace(-compare.ORDINARY, compare.ORDINARY, 7, dtype=np.float32)
    assert compare.logits_atol(ordinary) == compare.logits_atol(ordinary / 100) == 1e-4
    assert compare.logits_atol(ordinary * 2) == 2e-4
    off = compare._against((ordinary * 2, [1]), (ordinary * 2 + 1.5e-4, [1]))
    assert off["ok"]
    assert not compare._against((ordinary, [1]), (ordinary + 1.5e-4, [1]))["ok"]


@pytest.mark.parametrize("damage", ["cut", "empty", "folder"])
def test_a_damaged_tokenizer_is_refused_and_never_equal(tmp_path, damage):
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer")
    whole = tiny.save(tmp_path / "a", "hf", tiny.TEXT, tokenizer=tokenizer)
    damaged = tmp_path / "b"
    shutil.copytree(whole, damaged)
    shutil.rmtree(damaged / "llava_jax")
    model = damaged / "tokenizer.model"
    data = model.read_bytes()
    model.unlink()
    (damaged / "tokenizer.json").unlink()
    model.mkdir() if damage == "folder" else model.write_bytes(
        data[:500] if damage == "cut" else b""
    )
    for to in ("hf", "jax", "original"):
        with pytest.raises(LlavaError, match=r"b/tokenizer\.model"):
            convert(damaged, tmp_path / "out", Target(to))
    assert not (tmp_path / "out").exists()
    for pair in ((whole, damaged), (damaged, damaged)):
        report = compare.compare(*pair, logits="no")
        assert "tokenizer.model" in report["config"]["tokenizer"][1]
        assert not report["equal"]
