"""Answers belong to one model, one prompt and one picture: nothing else is taken for theirs."""

import argparse
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from llava_jax.errors import LlavaError
from llava_jax.eval import cli
from llava_jax.eval.answers import read_answers
from llava_jax.eval.benchmarks.mme import mme_answer
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import Question
from llava_jax.eval.report.collect import collect, summary_rows
from llava_jax.eval.run.command import RunSettings, run_task, task_folder
from llava_jax.eval.run.experiment import experiment_of, resolve, tasks_of
from llava_jax.eval.run.identity import Digests, model_identity
from llava_jax.eval.run.predict import choose
from llava_jax.eval.task import TaskSettings, get_task
from llava_jax.generate.request import Reply
from llava_jax.model import LlavaModel
from tests.eval.test_choice_family import ROWS, mmbench_table
from tests.eval.test_report import result
from tests.eval.test_run import Echo, right, settings, vqa  # noqa: F401
from tests.eval.test_vqa_family import dump
from tests.generate.tiny import model, params


def test_a_model_is_its_numbers():
    one, changed = model_identity(model()), model()
    leaves = changed.generator.leaves
    paths, tree = jax.tree_util.tree_flatten(leaves)
    biggest = max(range(len(paths)), key=lambda n: paths[n].size)
    last = paths[biggest].at[(-1,) * paths[biggest].ndim]
    for other, same in ((last.add(0.0), True), (last.add(1e-3), False)):
        new = [other if n == biggest else x for n, x in enumerate(paths)]
        asked = SimpleNamespace(
            config=changed.config,
            tokenizer=changed.tokenizer,
            generator=SimpleNamespace(leaves=jax.tree_util.tree_unflatten(tree, new)),
        )
        assert (model_identity(asked) == one) == same


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_model_in_few_bits_has_its_own_size(quantize):
    """By which the report finds its row of the paper: codes and scales are no parameters."""
    plain = model()
    few = LlavaModel(
        replace(plain.config, quantize=quantize), params(plain.config), plain.tokenizer
    )
    held, own = model_identity(few), model_identity(plain)
    assert held["parameters"] == own["parameters"] == sum(x.size for x in plain.generator.leaves)
    assert held["fingerprint"] != own["fingerprint"]


def again(folder, **more):
    return RunSettings(**settings(folder).__dict__ | more)


def test_answers_of_another_model_of_the_same_name_are_refused(vqa):  # noqa: F811
    task = get_task("vqav2")
    run_task(Echo(right), task, again(vqa, identity={"fingerprint": "a" * 64}))
    kept = run_task(Echo(dies_after=0), task, again(vqa, identity={"fingerprint": "a" * 64}))
    assert kept["totals"]["overall"] == 100.0
    with pytest.raises(AnswerError, match="another run .fingerprint was aaaaaaaaaaaa…, is bbbb"):
        run_task(Echo(), task, again(vqa, identity={"fingerprint": "b" * 64}))
    with pytest.raises(AnswerError, match="max_new_tokens was 128, is 5"):
        run_task(Echo(), task, again(vqa, identity={"fingerprint": "a" * 64}, max_new_tokens=5))


def test_other_pictures_and_prompts_are_refused(vqa):  # noqa: F811
    task, picture = get_task("vqav2"), vqa / "images" / f"COCO_val2014_{3:012d}.jpg"
    run_task(Echo(right), task, settings(vqa))
    picture.write_bytes(b"other")
    with pytest.raises(
        AnswerError, match="1 answer to another prompt or about other pictures.*'3'"
    ):
        run_task(Echo(right), task, settings(vqa))
    picture.write_bytes(b"")
    assert run_task(Echo(dies_after=0), task, settings(vqa))["totals"]["overall"] == 100.0
    path = vqa / "data" / "vqav2" / "v2_questions.json"
    path.write_text(path.read_text().replace("number x4", "the number x4"))
    with pytest.raises(AnswerError, match="another prompt"):
        run_task(Echo(right), task, settings(vqa))


def test_parts_about_other_pictures_are_not_joined(vqa):  # noqa: F811
    """A machine of an array may have another copy of the data."""
    task, parts = get_task("vqav2"), [again(vqa, chunk=(k, 2)) for k in (0, 1)]
    assert run_task(Echo(right), task, parts[0]) is None
    first = task.questions(vqa / "data" / "vqav2")[0].images[0]
    kept = (vqa / "images" / first).read_bytes()
    (vqa / "images" / first).write_bytes(b"another")
    with pytest.raises(AnswerError, match="answers-0-of-2.jsonl: 1 answer .* about other pictures"):
        run_task(Echo(right), task, parts[1])
    (vqa / "images" / first).write_bytes(kept)
    assert run_task(Echo(right), task, parts[1])["totals"]["overall"] == 100.0


def test_a_limit_is_raised_without_asking_again(vqa):  # noqa: F811
    task, echo = get_task("vqav2"), Echo(right)
    assert len(run_task(echo, task, settings(vqa, limit=2))["per_sample"]) == 2
    assert len(run_task(echo, task, settings(vqa, limit=4))["per_sample"]) == 4
    assert run_task(echo, task, settings(vqa))["totals"]["overall"] == 100.0
    assert echo.batches == [2, 2, 2]
    parts = [again(vqa, limit=n, chunk=(k, 2), out=vqa / "p") for n in (2, 6) for k in (0, 1)]
    found = [run_task(echo, task, p) for p in parts]
    assert [f and len(f["per_sample"]) for f in found] == [None, 2, None, 6]
    assert sum(echo.batches) == 6 + 6
    # And lowered, or drawn anew: the result is over what its settings say.
    for more in ({"limit": 2}, {"limit": 2, "shuffle_seed": 1}, {"limit": 2, "shuffle_seed": 2}):
        found = run_task(Echo(dies_after=0), task, settings(vqa, **more))
        asked = choose(task.questions(vqa / "data" / "vqav2"), **more)
        assert [*found["per_sample"]] == sorted(q.key for q in asked)
    assert len(read_answers(vqa / "out" / "vqav2" / "answers.jsonl").rows) == 6


def test_answers_without_run_json_are_nobodys(vqa):  # noqa: F811
    task = get_task("vqav2")
    run_task(Echo(right), task, settings(vqa))
    (vqa / "out" / "vqav2" / "run.json").unlink()
    with pytest.raises(AnswerError, match="holds answers, but no run.json"):
        run_task(Echo(right), task, settings(vqa))
    (vqa / "out" / "vqav2" / "answers.jsonl").unlink()  # the figure of another may be left
    with pytest.raises(AnswerError, match="holds answers, but no run.json"):
        run_task(Echo(right), task, settings(vqa))


class Refuses(Echo):
    """A server that knows no such model, or refuses every request."""

    def __init__(self, gone):
        super().__init__()
        self.gone = gone

    def generate_batch(self, requests, batch_size, on_error="raise"):
        if self.gone:
            raise AnswerError("HTTP 404")
        return [Reply("", (), "error", error="HTTP 400") for _ in requests]


@pytest.mark.parametrize("gone", [True, False])
def test_a_folder_without_a_single_answer_belongs_to_nobody(vqa, gone):  # noqa: F811
    task, folder = get_task("vqav2"), vqa / "out" / "vqav2"
    with pytest.raises(AnswerError, match="HTTP 40"):
        run_task(Refuses(gone), task, again(vqa, identity={"served": "tinyy"}))
    # Killed, so that nothing was tidied; then asked with other settings.
    (folder / "run.json").write_text('{"task": "vqav2", "max_new_tokens": 8}')
    row = json.dumps({"question_id": 9, "text": "", "metadata": {"key": "9", "error": "HTTP 401"}})
    (folder / "answers.jsonl").write_text(f"{row}\n")
    kept = run_task(Echo(right), task, again(vqa, identity={"served": "tiny"}))
    assert kept["totals"]["overall"] == 100.0
    # A part that has no answer yet may be about to: its settings stand while it lives.
    other = again(vqa, out=vqa / "parts", chunk=(1, 2), identity={"served": "tiny"})

    class First(Echo):
        def generate_batch(self, requests, batch_size, on_error="raise"):
            with pytest.raises(AnswerError, match="another run"):
                run_task(Echo(right), task, replace(other, identity={"served": "tinyy"}))
            return super().generate_batch(requests, batch_size)

    run_task(First(right), task, replace(other, chunk=(0, 2)))
    assert run_task(Echo(right), task, other)["totals"]["overall"] == 100.0


def test_two_processes_do_not_write_one_file(vqa):  # noqa: F811
    task, inner = get_task("vqav2"), []

    class Second(Echo):
        def generate_batch(self, requests, batch_size, on_error="raise"):
            with pytest.raises(AnswerError, match="another process asks the same questions") as e:
                run_task(Echo(right), task, settings(vqa))
            inner.append(e)
            return super().generate_batch(requests, batch_size)

    assert run_task(Second(right), task, settings(vqa))["totals"]["overall"] == 100.0
    assert inner


@pytest.mark.parametrize("damage", ["{", "[]", '{"PATH": [SIZE, TIME, "zz"]}', '{"PATH": 5}'])
def test_damaged_digests_are_taken_anew(tmp_path, damage):
    picture, cache = tmp_path / "a.png", tmp_path / "pictures.json"
    picture.write_bytes(b"x")
    state = picture.stat()
    for name, value in (("PATH", picture), ("SIZE", state.st_size), ("TIME", state.st_mtime_ns)):
        damage = damage.replace(name, str(value))
    cache.write_text(damage)
    asked = Question("k", "q", ("a.png",), {})
    assert Digests(cache).of(asked, [picture]) == Digests().of(asked, [picture])


def test_limits_take_whole_groups(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    task = get_task("mmbench")
    truth = {q.prompt: row["answer"] for q, row in zip(task.questions(tmp_path), ROWS)}
    run = RunSettings(tmp_path, tmp_path / "out", "m", limit=2, show_progress=False)
    result = run_task(Echo(lambda r: truth[r.messages]), task, run)
    assert result["totals"][result["headline"]] == 100.0  # was 0.00: no rotation had been asked
    mme = tmp_path / "mme"
    for kind in ("existence", "OCR"):
        for n in range(2):
            dump(mme / kind / f"{n}.json", 0)
            (mme / kind / f"{n}.jpg").touch()
            (mme / kind / f"{n}.txt").write_text("Is it? Please answer yes or no.\tYes\nOr?\tNo\n")
    task = get_task("mme")
    for limit, count in ((1, 2), (2, 2), (3, 2), (5, 4), (None, 8)):
        for seed in (None, 0, 1):
            part = choose(
                task.questions(mme), limit=limit, shuffle_seed=seed, group_of=task.group_of
            )
            assert len(part) == count
            assert {task.group_of(q) for q in part} == {str(q.images[0]) for q in part}
    run = RunSettings(tmp_path, tmp_path / "o", "m", limit=4, shuffle_seed=3, show_progress=False)
    result = run_task(Echo(lambda r: "Yes" if "Is it" in r.messages else "No"), task, run)
    kinds = {s["groups"]["task"] for s in result["per_sample"].values()}
    assert result["totals"]["perception_of_answered"] == 200 * len(kinds)
    # The owner's calculation.py goes by adjacent lines: the file has the pairs in this order.
    rows = [a.row for a in read_answers(tmp_path / "o" / "mme" / "answers.jsonl").rows]
    for one, two in zip(rows[::2], rows[1::2]):
        assert one["question_id"] == two["question_id"]
        assert [mme_answer(r["text"]) for r in (one, two)] == ["yes", "no"]


def test_a_corrupt_picture_is_counted_and_named(vqa):  # noqa: F811
    class Eyes(Echo):
        def generate_batch(self, requests, batch_size, on_error="raise"):
            assert on_error == "reply"
            bad = [r.images[0].read_bytes() == b"bad" for r in requests]
            found = super().generate_batch(requests, batch_size)
            return [
                Reply("", (), "error", error="not an image") if b else f for b, f in zip(bad, found)
            ]

    task, picture = get_task("vqav2"), vqa / "images" / f"COCO_val2014_{3:012d}.jpg"
    picture.write_bytes(b"bad")
    result = run_task(Eyes(right), task, settings(vqa))
    assert result["totals"]["overall"] == pytest.approx(100 * 5 / 6, abs=0.01)
    assert (result["coverage"]["answered"], result["coverage"]["expected"]) == (5, 6)
    (note,) = result["notes"]
    assert note == "1 question got no answer, and the next run asks again: 3 (not an image)"
    again = Eyes(right)
    assert run_task(again, task, settings(vqa))["notes"] == [note]
    assert again.batches == [1]
    part = run_task(Eyes(right), task, settings(vqa, limit=4))
    assert part["headline"] == "overall_of_asked"
    assert part["totals"]["overall_of_asked"] == pytest.approx(75)
    assert part["coverage"] | {"details": 0} == {
        **dict.fromkeys(("duplicated", "unknown", "bad_lines", "details"), 0),
        **{"expected": 4, "answered": 3, "missing": 1},
    }
    picture.write_bytes(b"mended")
    mended = Eyes(right)
    assert run_task(mended, task, settings(vqa))["totals"]["overall"] == 100.0
    assert mended.batches == [1]
    assert len(read_answers(vqa / "out" / "vqav2" / "answers.jsonl").rows) == 6


def test_no_task_reads_the_folder_of_another(tmp_path):
    (tmp_path / "pope").mkdir()
    with pytest.raises(DataError, match="mme: no such folder; .* is the folder of pope"):
        task_folder(tmp_path / "pope", get_task("mme"))
    assert task_folder(tmp_path / "pope", get_task("pope")) == tmp_path / "pope"
    (tmp_path / "mine").mkdir()
    assert task_folder(tmp_path / "mine", get_task("mme")) == tmp_path / "mine"
    with pytest.raises(DataError, match="is asked for several benchmarks"):
        task_folder(tmp_path / "mine", get_task("mme"), alone=False)


def test_splits_and_options_per_task():
    found = {
        task.name: (own.split, own.options)
        for task, own in tasks_of(
            "vqav2:val2014,scienceqa,textvqa,pope", "val", {"ocr": "no", "scienceqa.gpt4": "f"}
        )
    }
    assert found == {
        "vqav2": ("val2014", {}),
        "scienceqa": ("val", {"gpt4": "f"}),
        "textvqa": ("val", {"ocr": "no"}),
        "pope": (None, {}),
    }
    written = {"textvqa": {"set": {"ocr": "no"}}, "gqa": {"split": "val"}}
    assert [(t.name, s.split, s.options) for t, s in tasks_of(written, None, {})] == [
        ("textvqa", None, {"ocr": "no"}),
        ("gqa", "val", {}),
    ]
    sets = ({"set": {"ocr": False}}, {"set": ["ocr"]}, {"split": 5}, {"split": ["val"]})
    for wrong in (
        "pope:val",
        {"pope": 5},
        {"pope": {"sets": 1}},
        ["mne"],
        *({"textvqa": s} for s in sets),
    ):
        with pytest.raises(LlavaError):
            tasks_of(wrong, None, {})


def test_one_task_twice_is_asked_once_or_refused():
    """Its two results would be one file, and the second refused after the first was asked."""
    assert [task.name for task, _ in tasks_of("sqa,pope,scienceqa", None, {})] == [
        "scienceqa",
        "pope",
    ]
    for both in (
        "vqav2:val2014,vqav2:test2015",
        ["vqav2", "vqav2:val"],
        {"vqa:a": {}, "vqav2": {}},
    ):
        with pytest.raises(LlavaError, match="names vqav2 twice.*an --out of its own"):
            tasks_of(both, None, {})


def test_a_result_carries_what_asks_it_again(vqa):  # noqa: F811
    run = again(vqa, experiment={"tasks": {"vqav2": {}}, "model": "m"}, identity={"parameters": 7})
    run_task(Echo(right), get_task("vqav2"), run)
    written = json.loads((vqa / "out" / "vqav2" / "result.json").read_text())
    assert written["settings"]["parameters"] == 7
    assert written["experiment"] == {"tasks": {"vqav2": {}}, "model": "m"}
    assert "jax" in written["versions"]


def test_the_command_line_has_precedence_over_the_file(tmp_path):
    (config := tmp_path / "e.yaml").write_text(
        "shuffle_seed: 5\nlimit: 3\nquantize: int8\ntasks: pope\n"
    )
    cli.add_arguments(parser := argparse.ArgumentParser())
    args = parser.parse_args(["--config", str(config), "--shuffle-seed", "0"])
    assert resolve(args) == "pope"
    assert (args.shuffle_seed, args.limit, args.quantize, args.dtype) == (0, 3, "int8", None)
    assert args.allow_pickle is False
    told = experiment_of(args, get_task("pope"), TaskSettings())
    assert told["shuffle_seed"] == 0
    assert "dtype" not in told


def test_what_was_not_asked_as_the_paper_did_is_remarked(tmp_path):
    run = {
        "model": "m",
        "quantize": "nf4",
        "template": "plain",
        "tasks": {"textvqa": {"set": {"ocr": "no"}}},
    }
    for experiment, remark in (
        (run, "quantize nf4, template plain, ocr=no"),
        ({"model": "m", "tasks": {"textvqa": {"split": "val"}}}, ""),
        ({"tasks": 5, "max_new_tokens": 5}, "max_new_tokens 5"),
    ):
        value = result([1.0], "textvqa", experiment=experiment)
        value["coverage"] |= {"answered": 5_000, "expected": 5_000}
        assert summary_rows(collect([dump(tmp_path / "r.json", value)]))[0][-1] == remark


def test_a_later_set_of_fewer_questions_is_not_the_papers(tmp_path):
    """SEED-Bench's file of today has fewer video questions than the paper's 5,009."""
    value = result([1.0], "seed", settings={"parameters": 7_063_427_072})
    value["coverage"] |= {"answered": 17_990, "expected": 17_990}
    (row,) = summary_rows(collect([dump(tmp_path / "r.json", value)]))
    assert row[-2:] == ["", "17,990 of the paper's 19,242 questions"]
