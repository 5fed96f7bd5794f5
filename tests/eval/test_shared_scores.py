"""Every reference score of the shared benchmark set, per sample and in total."""

import json

import pytest

from llava_jax.eval.judge.reviews import parse_score
from llava_jax.eval.task import TaskSettings, get_task
from tests.conftest import SHARED, json_lines, named, shared


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def scored(task, folder, answers="answers.jsonl"):
    folder = shared(f"benchmarks/{folder}")
    return get_task(task).score(folder / answers, folder), load(folder / "expected.json")


def submitted(task, folder, answers, tmp_path):
    folder = shared(f"benchmarks/{folder}")
    return load(get_task(task).submission(folder / answers, folder, tmp_path / "upload.json"))


def test_vqav2(tmp_path):
    result, want = scored("vqav2", "vqav2", "predictions.json")
    for name, field, get in (
        ("official_vqaEval", "overall", lambda s: s.score),
        (
            "official_after_llava_submission_normalisation",
            "after_llava_submission",
            lambda s: s.details["after_submission"],
        ),
    ):
        assert result.totals[field] == want[name]["accuracy"]["overall"]
        assert {k: round(100 * get(s), 2) for k, s in result.samples.items()} == want[name][
            "per_question"
        ]
    official = want["official_vqaEval"]["accuracy"]
    for title, field in (
        ("per question type", "perQuestionType"),
        ("per answer type", "perAnswerType"),
    ):
        assert {k: v["score"] for k, v in result.tables[title].items()} == official[field]
    always = want["always_normalise_variant"]
    assert result.totals["always_normalised"] == pytest.approx(always["overall"], abs=1e-9)
    assert {
        k: pytest.approx(100 * s.details["always_normalised"]) for k, s in result.samples.items()
    } == always["per_question"]
    upload = submitted("vqav2", "vqav2", "predictions.json", tmp_path)
    assert upload == load(shared("benchmarks/vqav2") / "llava_submission_expected.json")


def test_gqa(tmp_path):
    result, want = scored("gqa", "gqa")
    official = want["official"]
    for name in ("accuracy", "binary", "open", "distribution"):
        assert result.totals[name] == pytest.approx(official[name], abs=1e-4)
    consistency = want["official_with_consistency"]["consistency"]
    assert result.totals["consistency"] == pytest.approx(consistency, abs=1e-4)
    lenient = want["lmms_eval_exact_match"]
    assert result.totals["lmms_eval_exact_match"] == pytest.approx(lenient, abs=1e-9)
    for name, table in official["detail"].items():
        ours = result.tables[f"per {name}"]
        assert {k: (pytest.approx(v["score"], abs=1e-4), v["n"]) for k, v in ours.items()} == {
            k: tuple(v) for k, v in table.items()
        }
    assert {k: s.score for k, s in result.samples.items()} == want["per_sample_official"]
    for key, sample in result.samples.items():
        assert sample.details["lmms_eval"] == want["per_sample_lmms"][key]
    upload = submitted("gqa", "gqa", "answers.jsonl", tmp_path)
    assert upload == load(shared("benchmarks/gqa") / "predictions_expected.json")


def test_vizwiz(tmp_path):
    result, want = scored("vizwiz", "vizwiz", "predictions.json")
    assert [s.score for s in result.samples.values()] == want["per_sample_official"]
    assert [s.details["normalised_gt"] for s in result.samples.values()] == want[
        "per_sample_normalised_gt"
    ]
    assert result.totals["overall"] == want["official_overall"]
    normalised = want["lmms_eval_normalised_gt"]
    assert result.totals["lmms_eval_normalised_gt"] == pytest.approx(normalised)
    assert result.totals["unanswerable_share"] == 100 * want["unanswerable_share_pred"]
    assert result.totals["unanswerable_f1"] == want["unanswerable_f1"]
    assert result.totals["unanswerable_ap"] == want["unanswerable_ap"]
    (answers,) = named("benchmarks/vizwiz", "answers*.jsonl")
    upload = submitted("vizwiz", "vizwiz", answers, tmp_path)
    assert upload == load(shared("benchmarks/vizwiz") / "answers_upload_expected.json")
    share = sum(row["answer"] == "unanswerable" for row in upload) / len(upload)
    assert [share] == [v for k, v in want.items() if k.endswith("upload_unanswerable_share")]


def test_textvqa():
    result, want = scored("textvqa", "textvqa")
    assert [s.score for s in result.samples.values()] == want["per_sample"]
    assert result.totals["accuracy"] == pytest.approx(want["accuracy_percent"], abs=1e-9)
    assert len(result.samples) == want["samples"]


def test_pope():
    result, want = scored("pope", "pope")
    for split in ("random", "popular", "adversarial"):
        # The script's rates are from 0 to 1, ours in percent.
        whole = ("TP", "FP", "TN", "FN")
        scores = {
            k: v if k in whole else pytest.approx(100 * v, rel=1e-15)
            for k, v in want["scores"][split].items()
        }
        assert result.tables["per split"][split] == scores
        assert result.tables["LLaVA script (zip by position)"][split] == scores
    assert result.totals["f1"] == pytest.approx(100 * want["scores"]["mean_f1"], rel=1e-15)
    assert {k: s.parsed for k, s in result.samples.items()} == want["per_sample_pred"]


def test_mme():
    result, want = scored("mme", "mme", "results")
    assert result.totals["perception"] == want["perception"]
    assert result.totals["cognition"] == want["cognition"]
    assert {k: v["score"] for k, v in result.tables["per task"].items()} == want["per_task"]
    assert {k: s.parsed for k, s in result.samples.items()} == want["per_line_parse"]


def science_folders() -> list[str]:
    found = sorted((SHARED / "benchmarks/scienceqa").glob("*/expected.json"))
    return [p.parent.name for p in found] or ["any"]


@pytest.mark.parametrize("folder", science_folders())
def test_scienceqa(folder):
    result, want = scored("scienceqa", f"scienceqa/{folder}")
    for name in ("acc", "correct", "count", "img_acc", "img_count"):
        assert result.totals[name] == pytest.approx(want[name], abs=1e-9)
    ours = {k: [s.parsed, s.truth, bool(s.score)] for k, s in result.samples.items()}
    assert ours == want["per_sample_[parsed,gt,correct]"]


@pytest.mark.parametrize("task", ["mmbench", "mmbench_cn"])
def test_mmbench(task):
    result, want = scored(task, task, "predictions.jsonl")
    assert result.totals["vanilla_acc"] == pytest.approx(want["vanilla_acc"], abs=1e-9)
    assert result.totals["circular_acc"] == pytest.approx(want["circular_acc"], abs=1e-9)
    assert {k: int(s.score) for k, s in result.samples.items()} == want["per_group_circular_hit"]
    rows = {k: r["inferred"] for s in result.samples.values() for k, r in s.details["rows"].items()}
    assert rows == want["per_row_inferred"]


def test_seed():
    result, want = scored("seed", "seedbench")
    script = want["llava_exact_string"]
    assert result.totals["all"] == script.pop("Total accuracy")
    assert result.totals["image"] == script.pop("image accuracy")
    assert result.totals["video"] == script.pop("video accuracy")
    assert {k: v["score"] for k, v in result.tables["per question type"].items()} == script
    lenient = want["lmms_eval_first_char_all"]
    assert result.totals["lmms_eval_first_char_all"] == pytest.approx(lenient, abs=1e-9)


def summary(result) -> dict[str, list[float]]:
    table = result.tables["per category"]
    return {k: [v["relative"], v["reference"], v["model"]] for k, v in table.items()}


@pytest.mark.parametrize("name", named("benchmarks/llava_bench", "review_*.jsonl"))
def test_llava_wild(name):
    """The summary of a review file stands under the end of the file's name."""
    result, want = scored("llava_wild", "llava_bench", name)
    summaries = want["summary_[relative,gpt4x10,modelx10]"]
    (run,) = [k for k in summaries if name.removesuffix(".jsonl").endswith(k)]
    assert summary(result) == summaries[run]
    for review, scores in want["parse_score_cases"]:
        assert parse_score(review) == scores


@pytest.mark.parametrize("name", named("benchmarks/gpt_review_text", "review_*.jsonl"))
def test_reviews_of_text(name):
    result, want = scored("llava_wild", "gpt_review_text", name)
    assert want[name].items() <= summary(result).items()


def test_coco30_requests():
    folder = shared("benchmarks/coco30")
    requests = get_task("coco30").requests(folder / "model_answers.jsonl", folder)
    assert [message for _, message in requests] == load(folder / "expected_requests.json")


@pytest.mark.parametrize("name", named("benchmarks/mmvet", "expected_*.json"))
def test_mmvet_grades(name):
    folder = shared("benchmarks/mmvet")
    name = name.removeprefix("expected_")
    result, want = get_task("mmvet").score(folder / name, folder), load(folder / f"expected_{name}")
    for field in ("total", "std", "runs", "n"):
        assert result.totals[field] == want[field]
    for title, field in (("per capability", "cap"), ("per integration", "cap_integration")):
        assert {k: v["score"] for k, v in result.tables[title].items()} == want[field]


def test_mmvet_upload(tmp_path):
    (answers,) = named("benchmarks/mmvet", "answers*.jsonl")
    upload = submitted("mmvet", "mmvet", answers, tmp_path)
    assert upload == load(shared("benchmarks/mmvet/convert_expected.json"))


def test_refcoco():
    result, want = scored("refcoco", "refcoco", "samples.jsonl")
    for name, scale in (("acc@0.5", 1), ("mean_iou", 100), ("center_acc", 1)):
        assert result.totals[name] == pytest.approx(scale * want[name], abs=1e-9)
    for key, row in want["per_sample"].items():
        sample = result.samples[key]
        assert sample.parsed == row["pred"]
        assert sample.details["iou"] == row["iou"]
        assert (bool(sample.score), sample.details["center"]) == (row["acc@0.5"], row["center"])


def test_chair():
    pytest.importorskip("nltk")
    pytest.importorskip("textblob")
    result, want = scored("chair", "chair", "samples.json")
    assert result.totals["CHAIRs"] == pytest.approx(100 * want["CHAIRs"])
    assert result.totals["CHAIRi"] == pytest.approx(100 * want["CHAIRi"])
    assert {k: s.details for k, s in result.samples.items()} == want["per_sample"]


def test_mmbench_prompts(tmp_path):
    """The prompts of our tsv reader are LLaVA's (rows without a hint, which the set lacks)."""
    folder = shared("benchmarks/mmbench")
    rows = json_lines(folder / "predictions.jsonl")
    table = tmp_path / "mmbench_dev_20230712.tsv"
    names = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
    lines = ["\t".join(names)]
    for row in rows:
        cells = [*(row.get(n) for n in names[:-1]), "aW1n"]
        quoted = ('"' + str(c).replace('"', '""') + '"' if c is not None else "" for c in cells)
        lines.append("\t".join(quoted))
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    asked = {q.key: q for q in get_task("mmbench").questions(tmp_path)}
    for want in json_lines(folder / "llava_prompts.jsonl"):
        got = asked[str(want["index"])]
        if got.record["prompt"] != want["prompt_without_suffix"]:
            assert want["prompt_without_suffix"].endswith(got.record["prompt"])  # a hint before it
        assert got.record["options"] == want["options"]
        assert got.prompt == got.record["prompt"] + (
            "\nAnswer with the option's letter from the given choices directly."
        )


def test_prompts_are_llavas():
    """Prompts built from the owners' files equal those in LLaVA's own question and answer files."""
    folder = shared("benchmarks/gqa")
    ours = {q.record["question_id"]: q.prompt for q in get_task("gqa").questions(folder)}
    for row in json_lines(folder / "answers.jsonl"):
        assert ours[row["question_id"]] == row["prompt"]
    folder = shared("benchmarks/pope")
    theirs = {(q.images, q.prompt) for q in get_task("pope").questions(folder)}
    ours = {(q.images, q.prompt) for q in get_task("pope").questions(folder / "labels")}
    assert ours == theirs
    folder = shared("benchmarks/textvqa")
    rows = get_task("textvqa").questions(folder, TaskSettings(options={"ocr": "no"}))
    ours = {(q.record["question_id"], q.prompt.split("\n")[0]) for q in rows}
    for row in json_lines(folder / "answers.jsonl"):
        assert (row["question_id"], row["prompt"].split("\n")[0]) in ours
