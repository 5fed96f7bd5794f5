"""The whole path on a real (untrained) model and on an oracle, over sets made of scenes."""

import json
from types import SimpleNamespace

import jax
import pytest

from examples.benchmark_sets import write_sets
from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.eval.answers import read_answers
from llava_jax.eval.run.command import RunSettings, image_folders, run_task
from llava_jax.eval.run.model import load_model, parse_mesh
from llava_jax.eval.run.predict import image_paths
from llava_jax.eval.task import get_task
from llava_jax.text.prompt import build_prompt
from llava_jax.text.show import text_of
from tests.generate.tiny import model, tokenizer

TASKS = ("vqav2", "pope", "mme", "scienceqa", "mmbench")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert [f.name for f in write_sets(folder, count=6)] == list(TASKS)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return model().save(tmp_path_factory.mktemp("model") / "tiny")


class Oracle:
    """Knows the answer to every prompt about every picture."""

    config = SimpleNamespace(template="vicuna_v1")

    def __init__(self, sets):
        self.known = {}
        for name in TASKS:
            task, folder = get_task(name), sets / name
            folders = image_folders(RunSettings(sets, sets, ""), folder, task)
            truths = truth_of(task, folder)
            for q in task.questions(folder):
                self.known[q.prompt, pixels(image_paths(q, folders))] = truths[q.key]

    def generate_batch(self, requests, batch_size, on_error="raise"):
        texts = [self.known[r.messages, pixels(r.images)] for r in requests]
        return [SimpleNamespace(text=text) for text in texts]


def pixels(images):
    return b"".join(i if isinstance(i, bytes) else i.read_bytes() for i in images)


def truth_of(task, folder):
    """Question key -> the right answer, as scoring answers of "?" tells it."""
    asked = task.questions(folder)
    answers = folder.parent / f"{task.name}.jsonl"
    answers.write_text("".join(json.dumps({**q.record, "text": "?"}) + "\n" for q in asked))
    samples = task.score(answers, folder).samples
    if task.name == "mmbench":
        return {k: r["truth"] for s in samples.values() for k, r in s.details["rows"].items()}
    return {q.key: s.truth for q, s in zip(asked, samples.values())}


def test_oracle_is_right_everywhere(sets, tmp_path):
    oracle, totals = Oracle(sets), {}
    for name in TASKS:
        run = RunSettings(sets, tmp_path, "oracle", show_progress=False)
        totals[name] = run_task(oracle, get_task(name), run)["totals"]
    assert totals["vqav2"]["overall"] == 100.0
    assert totals["pope"]["f1"] == 100.0
    assert totals["mme"]["perception"] == 400.0
    assert totals["scienceqa"]["img_acc"] == totals["scienceqa"]["acc"] == 100.0
    assert totals["mmbench"]["circular_acc"] == 100.0


def answers_of(asked, sets, out, batch, tasks=("pope", "scienceqa")):
    texts = {}
    for name in tasks:
        run = RunSettings(
            sets, out, "tiny", batch=batch, max_new_tokens=5, limit=4, show_progress=False
        )
        run_task(asked, get_task(name), run)
        for a in read_answers(out / name / "answers.jsonl").rows:
            texts[name, a.row["metadata"]["key"]] = a.text
    return texts


def test_batches_change_no_answer(sets, tmp_path):
    asked = model()
    one = answers_of(asked, sets, tmp_path / "1", 1)
    assert len(one) == 8
    assert len(set(one.values())) > 4
    assert answers_of(asked, sets, tmp_path / "32", 32) == one


@pytest.mark.slow
def test_devices_change_no_answer(sets, checkpoint, tmp_path):
    assert jax.device_count() == 8
    spread = load_model(str(checkpoint), mesh="4,2,1")
    found = answers_of(spread, sets, tmp_path / "8", 32)
    assert found == answers_of(model(), sets, tmp_path / "1", 1)


def test_prompt_is_the_papers():
    content = [{"type": "image", "image": b""}, {"type": "text", "text": " Is it?\nAnswer."}]
    prompt = build_prompt([{"role": "user", "content": content}], tokenizer())
    assert text_of(prompt.ids, tokenizer()).endswith(
        "questions. USER: <image> \n Is it?\nAnswer. ASSISTANT:"
    )


def test_template_in_place_of_the_models_own(caplog):
    assert load_model("tiny", template="llava_v0").config.template == "llava_v0"
    assert "template llava_v0; the paper's is vicuna_v1" in caplog.text


def test_mesh():
    assert parse_mesh("2,-1,1") == (2, -1, 1)
    with pytest.raises(LlavaError, match="expected DATA,FSDP,TENSOR"):
        parse_mesh("2x4")
    with pytest.raises(LlavaError, match="at least 1, or -1"):
        parse_mesh("0,0,0")


def words(checkpoint, sets, out, *more):
    return [
        "eval",
        *("--model", str(checkpoint), "--tasks", "pope,vqav2", "--data", str(sets)),
        *("--out", str(out), "--batch-size", "2", "--max-new-tokens", "4", *more),
    ]


def test_command(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llava_jax.eval.run.model.load_model", lambda path, **_: model())
    assert main(words("any/tiny-model", sets, tmp_path, "--limit", "2")) == 0
    out = capsys.readouterr().out
    assert "overall_of_answered" in out
    assert "report: " in out
    assert (tmp_path / "report" / "report.md").exists()
    run = json.loads((tmp_path / "pope" / "run.json").read_text())
    assert (run["model"], run["max_new_tokens"], run["parts"]) == ("tiny-model", 4, 1)
    assert main(words("m", sets, tmp_path, "--chunk", "2/2")) == 2
    assert main(words("m", sets, tmp_path, "--batch-size", "0")) == 2
    assert "must be at least 1" in capsys.readouterr().err


def test_an_adapter_without_a_tower_is_evaluated(tmp_path, sets, capsys):
    """--vision-tower, --base and --allow-pickle are those of convert and chat."""
    from dataclasses import replace

    from llava_jax.config import LoraConfig
    from llava_jax.convert import Checkpoint, load_checkpoint, save_checkpoint
    from tests.convert.tiny import random_params

    pytest.importorskip("torch")
    made = load_checkpoint("tiny")
    unnamed = Checkpoint(made.config, made.params, made.tokenizer)  # tiny's tower is a shipped one
    base = save_checkpoint(unnamed, tmp_path / "base", to="original")
    tower = (base / "vision_tower").rename(tmp_path / "clip")
    config = replace(made.config, lora=LoraConfig(2, 4.0, 0.0))
    trained = Checkpoint(config, random_params(config), made.tokenizer)
    pair = save_checkpoint(trained, tmp_path / "pair", to="lora")
    words = ["eval", "--model", str(pair), "--tasks", "pope", "--data", str(sets)]
    words += ["--out", str(tmp_path / "out"), "--limit", "1", "--batch-size", "1"]
    for option in (["--allow-pickle"], ["--base", str(base)], ["--vision-tower", str(tower)]):
        assert main(words) == 2
        assert option[0] in capsys.readouterr().err
        words += option
    assert main([*words, "--max-new-tokens", "2"]) == 0
    assert "answered 1 of 1" in capsys.readouterr().out
