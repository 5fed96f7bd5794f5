"""ScienceQA, MMBench and SEED-Bench on hand-checked cases of odd answers."""

import base64
import csv
import sys

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.eval.benchmarks.scienceqa import read_choice
from llava_jax.eval.benchmarks.seed import VIDEOS
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import read_rows
from llava_jax.eval.report.text import complete
from llava_jax.eval.rules import read_letter
from llava_jax.eval.task import TaskSettings, check_settings, get_task
from tests.eval.test_vqa_family import dump, lines


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", "FAILED"),
        ("A.", "FAILED"),  # two characters: not "X. …"
        ("A. cat", "A"),
        ("B) cat", "FAILED"),
        ("a", "FAILED"),
        (" A", "FAILED"),
        ("The answer is B.", "B"),
        ("The answer is F.", "F"),
        ("The answer is B", "FAILED"),  # the period of the pattern is any character, but one
        ("The answer is B,", "B"),
        ("The answer is A. The answer is B.", "FAILED"),
        ("LECTURE … The answer is C.", "C"),
        ("", "FAILED"),
        ("AB", "FAILED"),
    ],
)
def test_scienceqa_letter(text, want):
    assert read_choice(text) == want


def sqa(tmp_path, problems, rows, **options):
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"test": list(problems), "val": []})
    given = lines(tmp_path / "a.jsonl", rows)
    return get_task("scienceqa").score(given, tmp_path, TaskSettings(**options))


def problem(answer=0, image=None, hint="", grade="grade2", subject="natural science", choices=2):
    return {
        "question": "Which?",
        "choices": [f"c{i}" for i in range(choices)],
        "answer": answer,
        "image": image,
        "hint": hint,
        "grade": grade,
        "subject": subject,
    }


def test_scienceqa_letter_beyond_the_choices_is_wrong(tmp_path):
    result = sqa(
        tmp_path, {"1": problem(1)}, [{"question_id": "1", "text": "C", "prompt": "Which?"}]
    )
    assert (result.totals["acc"], result.samples["1"].parsed) == (0.0, "C")


def test_scienceqa_image_accuracy_and_missing(tmp_path):
    problems = {
        "1": problem(0, "image.png"),
        "2": problem(0, "image.png"),
        "3": problem(1, hint="h", grade="grade8", subject="social science"),
    }
    rows = [
        {"question_id": "1", "prompt": "<image>\nWhich?", "text": "A"},
        {"question_id": "3", "prompt": "Which?", "text": "B"},
    ]
    result = sqa(tmp_path, problems, rows)
    assert result.totals["count"] == 3
    assert result.totals["acc"] == pytest.approx(200 / 3)
    # The script loses the missing image question from its denominator; the second number keeps it.
    assert (result.totals["img_acc"], result.totals["img_count"]) == (100.0, 1)
    assert result.totals["img_acc_missing_wrong"] == 50.0
    assert result.coverage.missing == ["2"]
    table = result.tables["official categories"]
    assert table["NAT"] == {"score": 50.0, "n": 2}
    assert table["TXT"] == table["SOC"] == table["G7-12"] == {"score": 100.0, "n": 1}
    assert table["IMG"] == {"score": 50.0, "n": 2}
    assert "NO" not in table


def test_scienceqa_results_file(tmp_path):
    dump(tmp_path / "problems.json", {"1": problem(1, "image.png")})
    dump(tmp_path / "pid_splits.json", {"test": ["1"]})
    given = dump(tmp_path / "r.json", {"acc": 0, "results": {"1": 1}, "outputs": {"1": "B"}})
    assert get_task("sqa").score(given, tmp_path).totals["img_acc"] == 100.0


def test_scienceqa_prompt(tmp_path):
    problems = {
        "1": problem(0, "image.png", hint="Some\ntext."),
        "2": problem(0) | {"choices": ["two\nlines", "b"]},
    }
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"test": ["1", "2"]})
    one, two = get_task("scienceqa").questions(tmp_path)
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert one.prompt == "Context: Some\ntext.\nWhich?\nA. c0\nB. c1" + letter
    assert one.record["prompt"] == "<image>\n" + one.prompt
    assert one.images == ("1/image.png",)
    assert two.prompt == two.record["prompt"] == "Which?\nA. two\nlines\nB. b" + letter
    assert two.images == ()
    with pytest.raises(DataError, match="dev is missing, not a list"):
        get_task("scienceqa").questions(tmp_path, TaskSettings(split="dev"))


def test_scienceqa_ensemble(tmp_path):
    problems = {str(i): problem(0) for i in range(4)}
    says = "The answer is {}.".format
    ours = [says("A"), says("B"), says("A"), "unsure"]
    rows = [{"question_id": str(i), "text": t, "prompt": ""} for i, t in enumerate(ours)]
    gpt4 = {"outputs": {"0": says("B"), "1": says("A"), "2": "unsure", "3": says("A")}}
    again = [{"question_id": "0", "text": says("A")}, {"question_id": "1", "text": says("A")}]
    extra = {
        "gpt4": str(dump(tmp_path / "gpt4.json", gpt4)),
        "requery": str(lines(tmp_path / "requery.jsonl", again)),
    }
    table = sqa(tmp_path, problems, rows, options=extra).tables["GPT-4 ensemble"]
    assert table["ours"]["score"] == 100 * (1 + 0 + 1 + 0.5) / 4  # "unsure" is a guess among two
    assert table["gpt4"]["score"] == 100 * (0 + 1 + 0.5 + 1) / 4
    assert table["gpt4, else ours"]["score"] == 100 * (0 + 1 + 1 + 1) / 4
    assert table["requery, else ours"]["score"] == 100 * (1 + 1 + 1 + 0.5) / 4
    assert table["gpt4 gives no answer"] == {"score": 25.0, "n": 1}
    with pytest.raises(AnswerError, match="needs an answer from both"):
        sqa(tmp_path, problems, rows[:3], options=extra)


CHOICES = {"A": "a cat", "B": "a dog", "C": "None of the above"}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("b", "Z"),
        ("D", "Z"),
        ("A dog", "A"),  # the article: one letter near the end settles it
        ("A dog is what one can see there", "B"),  # far from the end: the words do
        ("It shows a dog", "B"),
        ("a cat and a dog", "Z"),
        ("A or B", "Z"),
        ("The correct answer is **B**.", "B"),
        ("The answer is B because of the long tail that it has", "B"),
        ("the answer is c", "C"),
        ("Cannot determine the answer", "Z"),
        ("Failed to obtain answer via API B", "Z"),
        ("Z", "Z"),
        ("", "Z"),
        ("选B。", "Z"),
        ("答案是 B", "B"),
        ("none of the above", "C"),
        ("x" * 60 + "a cat", "Z"),  # too long to be an option
    ],
)
def test_mmbench_inference(text, want):
    assert read_letter(text, CHOICES) == want


PNG = base64.b64encode(b"png").decode()


def mmbench_table(path, rows):
    names = (
        "index question hint A B C D answer category image source l2-category comment split".split()
    )
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, names, delimiter="\t")
        table.writeheader()
        table.writerows([{"split": "dev", "category": "c", "image": PNG, **r} for r in rows])
    return path


ROWS = [
    {"index": 7, "question": "Which?", "hint": "Look.", "A": "cat", "B": "dog", "answer": "A"},
    {"index": 1000007, "question": "Which?", "A": "dog", "B": "cat", "answer": "B"},
    {"index": 8, "question": "How many?", "A": "1", "B": "None", "C": "3", "answer": "A"},
]


def test_mmbench_circular_counts_all_rotations(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    rows = [{"question_id": i, "text": t} for i, t in ((7, "A"), (1000007, "A"), (8, "1"))]
    result = get_task("mmbench").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert result.totals["vanilla_acc"] == 100.0
    assert result.totals["circular_acc"] == 50.0
    assert result.tables["per category"] == {"c": {"score": 50.0, "n": 2}}
    assert result.samples["7"].details["rows"]["1000007"] == {
        "inferred": "A",
        "truth": "B",
        "answer": "A",
    }
    part = get_task("mmbench").score(lines(tmp_path / "a.jsonl", rows[:1]), tmp_path)
    assert part.totals["circular_acc"] == 0.0
    assert part.coverage.missing == ["1000007", "8"]


def test_mmbench_prompt_stops_at_an_option_without_value(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    one, _, three = get_task("mmbench").questions(tmp_path)
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert one.prompt == "Look.\nWhich?\nA. cat\nB. dog" + letter
    assert one.record["option_char"] == ["A", "B"]
    assert one.images == (b"png",)
    assert three.prompt == "How many?\nA. 1" + letter


def test_mmbench_cn_prompt(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_cn_20231003.tsv", ROWS[1:2])
    (q,) = get_task("mmbench-cn").questions(tmp_path)
    assert q.prompt.endswith("B. cat\n请直接回答选项字母。")


@pytest.mark.parametrize("name", ["up.xlsx", "up.csv"])
def test_mmbench_upload(tmp_path, name):
    pytest.importorskip("openpyxl")
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    given = lines(tmp_path / "a.jsonl", [{"question_id": 7, "text": "A"}])
    out = get_task("mmbench").submission(given, tmp_path, tmp_path / name)
    rows = [row for _, row in read_rows(out)]
    want = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(rows[0]) == want
    assert (str(rows[0]["index"]), rows[0]["prediction"]) == ("7", "A")
    assert rows[1]["prediction"] is None
    assert rows[2]["B"] is None  # as pandas, which reads "None" as no value
    # The upload carries options and answers, so it can be scored by itself.
    empty = tmp_path / "empty"
    empty.mkdir()
    assert get_task("mmbench").score(out, empty).totals["vanilla_acc"] == 50.0


def test_mmbench_says_what_is_missing(tmp_path):
    given = lines(tmp_path / "a.jsonl", [{"question_id": 7, "text": "A"}])
    with pytest.raises(AnswerError, match="line 1, index 7: no tsv under"):
        get_task("mmbench").score(given, tmp_path)
    (tmp_path / "x.tsv").write_text("index\tquestion\n1\tq\n")
    with pytest.raises(DataError, match="no columns index, question, A, B"):
        get_task("mmbench").score(given, tmp_path)


def seed_data(tmp_path):
    rows = [
        ("1", "B", "image", 1),
        ("2", "B", "image", 1),
        ("v3", "C", "video", 10),
        ("4", "A", "image", 2),
    ]
    questions = [
        {
            "question_id": i,
            "answer": a,
            "data_type": d,
            "question_type_id": t,
            "question": "Which?",
            "data_id": f"pic{i}",
            **{f"choice_{c}": c * 2 for c in "abcd"},
        }
        for i, a, d, t in rows
    ]
    kinds = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    dump(tmp_path / "SEED-Bench.json", {"questions": questions, "question_type": kinds})


def test_seed_exact_string(tmp_path):
    seed_data(tmp_path)
    rows = [{"question_id": i, "text": t} for i, t in ((1, "B"), (2, "B."), ("v3", " c "))]
    result = get_task("seedbench").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert result.totals["all"] == 25.0
    assert result.totals["image"] == 33.33
    assert result.totals["video"] == 0.0
    assert result.totals["lmms_eval_first_char_all"] == 75.0
    assert list(result.tables["per question type"]) == [
        "Scene Understanding",
        "Instance Identity",
        "Action Recognition",
    ]
    assert result.coverage.missing == ["4"]
    with pytest.raises(AnswerError, match="1 of 4 questions have no answer"):
        get_task("seed").submission(tmp_path / "a.jsonl", tmp_path, tmp_path / "up.jsonl")


def test_seed_prompt_and_frames(tmp_path):
    seed_data(tmp_path)
    one, _, video, _ = get_task("seed").questions(tmp_path)
    assert one.prompt == (
        "Which?\nA. aa\nB. bb\nC. cc\nD. dd"
        "\nAnswer with the option's letter from the given choices directly."
    )
    assert one.images == ("SEED-Bench-image/pic1",)
    assert video.images == ("SEED-Bench-video-image/10_v3.png",)


def test_seed_pictures_only(tmp_path):
    seed_data(tmp_path)
    alone = TaskSettings(options={"videos": "no"})
    assert [q.key for q in get_task("seed").questions(tmp_path, alone)] == ["1", "2", "4"]
    rows = [{"question_id": i, "text": t} for i, t in ((1, "B"), ("v3", "C"), (4, "a"))]
    result = complete(get_task("seed").score(lines(tmp_path / "a.jsonl", rows), tmp_path, alone))
    assert (result["headline"], result["totals"]["image"]) == ("image", 33.33)
    assert result["totals"]["lmms_eval_first_char_image"] == pytest.approx(200 / 3)
    assert (result["coverage"]["answered"], result["coverage"]["expected"]) == (2, 3)
    assert "all" not in result["totals"]
    assert result["notes"] == ["pictures only: the video questions were left out"]
    with pytest.raises(LlavaError, match="--set videos=maybe: not yes or no"):
        check_settings([get_task("seed")], TaskSettings(options={"videos": "maybe"}))


def test_seed_needs_pyav_or_the_frames(tmp_path, monkeypatch):
    seed_data(tmp_path)
    folder = tmp_path / "videos"
    folder.mkdir()
    with pytest.raises(
        DataError, match=r"question v3: no video .*20bn-something-something-v2/picv3"
    ):
        get_task("seed").questions(tmp_path)
    (folder / "picv3").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(LlavaError, match="av is needed to take the frames") as error:
        get_task("seed").questions(tmp_path)
    assert "llava_jax[video]" in str(error.value)
    (tmp_path / "SEED-Bench-video-image").mkdir()
    (tmp_path / "SEED-Bench-video-image" / "10_v3.png").touch()
    assert len(get_task("seed").questions(tmp_path)) == 4


def test_the_middle_frame_of_each_kind_of_video(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    seed_data(tmp_path)

    def write(path, codec, count=31):
        """Frames that are as bright as their number is high, with differences between key frames."""
        path.parent.mkdir(parents=True)
        with av.open(str(path), "w") as out:
            stream = out.add_stream(codec, rate=10)
            stream.width = stream.height = 32
            stream.pix_fmt, stream.gop_size = "yuv420p", 6
            for n in range(count):
                frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * n, np.uint8), "rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())

    base = {"data_type": "video", "question": "Which?", "answer": "A"}
    base |= {f"choice_{c}": c for c in "abcd"}
    kinds = {10: ("webm", "libvpx", None, 14), 11: ("mp4", "mpeg4", [0.5, 2.55], 14),
             12: ("avi", "mpeg4", [10, 99], 20)}  # fmt: skip
    questions = []
    for kind, (ending, codec, segment, _) in kinds.items():
        write(tmp_path / "videos" / VIDEOS[kind] / f"v.{ending}", codec)
        row = {"question_id": f"v{kind}", "question_type_id": kind, "data_id": f"v.{ending}"}
        questions.append({**base, **row, **({"segment": segment} if segment else {})})
    dump(tmp_path / "SEED-Bench.json", {"questions": questions, "question_type": {"x": 10}})
    get_task("seed").questions(tmp_path)
    for kind, (*_, number) in kinds.items():
        with Image.open(tmp_path / f"SEED-Bench-video-image/{kind}_v{kind}.png") as picture:
            assert np.asarray(picture).mean() == pytest.approx(8 * number, abs=3.5), kind
    (tmp_path / "SEED-Bench-video-image/10_v10.png").unlink()
    (tmp_path / "videos" / VIDEOS[10] / "v.webm").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"v\.webm: no middle frame can be read"):
        get_task("seed").questions(tmp_path)


def test_a_table_of_the_other_language_is_refused(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_cn_20231003.tsv", ROWS)
    with pytest.raises(DataError, match="not the table of MMBench .--tasks mmbench is"):
        get_task("mmbench").questions(tmp_path)
    (tmp_path / "mmbench_dev_cn_20231003.tsv").rename(tmp_path / "MMBench_DEV_EN.tsv")
    with pytest.raises(DataError, match="not the table of MMBench-CN"):
        get_task("mmbench_cn").questions(tmp_path)
