"""Intervals, flips, and the two pages."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from llava_jax.cli import main
from llava_jax.eval.errors import DataError
from llava_jax.eval.report.charts import bars, radar
from llava_jax.eval.report.collect import (
    asked_object,
    collect,
    comparison_rows,
    comparisons_of,
    run_names,
    summary_rows,
)
from llava_jax.eval.report.stats import (
    Interval,
    answered,
    bootstrap,
    flips,
    headline_of,
    sign_test,
    statistic,
)
from llava_jax.eval.report.text import complete, read_result
from llava_jax.eval.report.write import write_report
from llava_jax.eval.task import get_task
from tests.conftest import shared
from tests.eval.test_vqa_family import dump

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (p := shutil.which(n))), None)  # fmt: skip
# For both widths: whether the page is wider than the screen, rows of the first table that are over 100 pixels high, whether it hides a column, and
# labels of the radar that are cut off.
LOOK = """<script>onload = () => setTimeout(() => { document.title = [0, 1].map(n => {
  const d = frames[n].document, table = d.querySelector(".summary .wide"), svg = d.querySelector("figure svg"),
    box = svg.getBoundingClientRect(), out = r => r.left < box.left || r.right > box.right;
  return [d.documentElement.scrollWidth > frames[n].innerWidth,
    [...table.querySelectorAll("tr")].filter(r => r.offsetHeight > 100).length,
    table.scrollWidth > table.clientWidth,
    [...svg.querySelectorAll("text")].filter(t => out(t.getBoundingClientRect())).length].join(" ")
}).join(", ") }, 300)</script>"""


def rows(scores):
    return {
        str(i): {"score": s, "answer": f"a{i}", "truth": "t", "prompt": "<b>q</b>"}
        for i, s in enumerate(scores)
    }


def result(scores, task="vqav2", **more):
    value = {
        "task": task,
        "headline": "overall",
        "totals": {"overall": 100 * sum(scores) / len(scores)},
        "tables": {"per kind": {"a|b": {"score": 1.0, "n": 2}}},
        "coverage": {"expected": len(scores), "answered": len(scores), "details": []},
        "notes": [],
        "per_sample": rows(scores),
    }
    return value | more


@pytest.mark.parametrize(
    ("task", "folder", "answers"),
    [
        ("vqav2", "vqav2", "predictions.json"),
        ("gqa", "gqa", "answers.jsonl"),
        ("vizwiz", "vizwiz", "predictions.json"),
        ("textvqa", "textvqa", "answers.jsonl"),
        ("pope", "pope", "answers.jsonl"),
        ("mme", "mme", "results"),
        ("scienceqa", "scienceqa/*", "answers.jsonl"),
        ("mmbench", "mmbench", "predictions.jsonl"),
        ("mmbench_cn", "mmbench_cn", "predictions.jsonl"),
        ("coco30", "gpt_review_text", "review_*.jsonl"),
        ("seed", "seedbench", "answers.jsonl"),
        ("llava_wild", "llava_bench", "review_*.jsonl"),
        ("mmvet", "mmvet", "[!e]*grade*.json"),
        ("refcoco", "refcoco", "samples.jsonl"),
        ("chair", "chair", "samples.json"),
    ],
)
def test_statistic_is_the_headline(task, folder, answers):
    """What the bootstrap draws from gives, with every unit once, the scorer's own number."""
    if task == "chair":
        pytest.importorskip("textblob")
    place = shared("benchmarks")
    for path in sorted(place.glob(f"{folder}/{answers}")) or [
        shared(f"benchmarks/{folder}/{answers}")
    ]:
        check_statistic(task, path)


def check_statistic(task, answers):
    import numpy as np

    scored = complete(get_task(task).score(answers, answers.parent))
    units, headline = statistic(task, scored["per_sample"])
    # Owners round to one or two decimals.
    assert headline(np.ones(units)) == pytest.approx(scored["totals"][scored["headline"]], abs=0.06)
    interval = bootstrap(task, scored["per_sample"], draws=50)
    assert interval.low <= interval.value <= interval.high


def test_bootstrap_is_as_wide_as_it_should_be():
    interval = bootstrap("vqav2", rows([1.0, 0.0] * 200))
    assert interval.value == 50.0
    half = (interval.high - interval.low) / 2
    assert half == pytest.approx(1.96 * 50 / 20, rel=0.1)  # 100 sqrt(p q / n)
    assert bootstrap("vqav2", rows([1.0] * 5)) == Interval(100.0, 100.0, 100.0)
    assert bootstrap("vqav2", rows([0.5])) == Interval(50.0, 50.0, 50.0)  # one to draw from
    assert bootstrap("vqav2", {}) == Interval(0.0, 0.0, 0.0)


def test_flips():
    got = flips("pope", rows([1, 1, 0, 0, 1]), rows([1, 0, 1, 0]))
    assert (got.gained, got.lost) == (["2"], ["1"])
    assert (got.both, got.neither, got.only_one) == (1, 1, 1)
    assert got.p == 1.0
    assert sign_test(0, 10) == pytest.approx(2 / 1024)
    assert sign_test(0, 0) == 1.0
    reviews = flips("llava_wild", rows([5, 6, 7]), rows([6, 6, 1]))
    assert (reviews.gained, reviews.lost, reviews.both) == (["0"], ["2"], 1)


def test_answered_headline():
    assert headline_of("vqav2", answered(rows([1, 0, 0]), {"2"})) == 50.0
    groups = rows([1, 0])
    groups["1"]["rows"] = {"1": {}, "1000001": {}}
    assert headline_of("mmbench", answered(groups, {"1000001"})) == 100.0
    assert headline_of("vqav2", answered(rows([1]), {"0"})) == 0.0


class Page(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages(tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 300), "red").save(tmp_path / "a.jpg")
    values = [result([1.0, 0.0, 0.5, 0.0]), result([1.0, 0.0], "gqa"), result([0.3], "textvqa")]
    values[0]["per_sample"]["1"]["image"] = "a.jpg"
    values[0]["per_sample"]["3"]["image"] = "../secret.jpg"
    values[1]["notes"] = ["a note & more"]
    values[1]["coverage"]["details"] = ["2 missing"]
    paths = [dump(tmp_path / "res" / f"{v['task']}.json", v) for v in values]
    html, text = write_report(paths, tmp_path / "out", images=tmp_path, title="Run <1>")
    page = Page()
    page.feed(html.read_text())
    assert page.open == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 1
    assert all(s.startswith("data:") for s in page.sources)
    assert page.tags.count("img") == 1
    source = html.read_text()
    assert "Run &lt;1&gt;" in source
    assert "<b>q</b>" not in source
    assert "a note &amp; more" in source
    markdown = text.read_text()
    assert "| VQAv2 | vqav2 | 37.50 |" in markdown
    assert "4 of the paper's 107,394 questions" in markdown
    assert "| a\\|b | 1.00 | 2 |" in markdown


def test_pictures(tmp_path):
    import base64

    from PIL import Image

    from llava_jax.eval.report.pictures import Pictures

    for name in ("1", "2"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name / "image.png")
    (tmp_path / "secret.png").write_bytes((tmp_path / "in" / "1" / "image.png").read_bytes())
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no")
    png = base64.b64encode((tmp_path / "secret.png").read_bytes()).decode()
    (tmp_path / "in" / "t.tsv").write_text(f"index\timage\n7\t{png}\n8\t\n")
    shown = Pictures(tmp_path / "in")
    for name in ("2/image.png", "in/2/image.png", "t.tsv#7"):
        found = shown.thumbnail(name)
        assert found.startswith("data:image/jpeg") == (name != "in/2/image.png")
    for name in ("image.jpg", "../secret.png", "broken.jpg", "t.tsv#8", "t.tsv#9", "u.tsv#1"):
        assert shown.thumbnail(name) == ""


def test_difference_is_flagged_beyond_noise(tmp_path):
    far = dump(tmp_path / "far.json", result([0.0, 1.0] * 500))
    (entry,) = collect([far], "7B")
    assert entry.difference("7B") == (pytest.approx(-28.5), True)
    near = dump(tmp_path / "near.json", result([1.0] * 785 + [0.0] * 215))
    (entry,) = collect([near])
    assert entry.difference("7B") == (pytest.approx(0.0), False)
    chair = result([1.0], "chair", totals={"overall": 0.0})
    (entry,) = collect([dump(tmp_path / "c.json", chair)])
    assert entry.difference("7B") is None


def test_compare(tmp_path):
    paths = [
        dump(tmp_path / name / "vqav2.json", result(scores))
        for name, scores in (("one", [1, 0, 0, 1, 0]), ("two", [1, 1, 1, 0]))
    ]
    html, text = write_report(paths, tmp_path / "out", compare=True)
    assert "| VQAv2 | one 40.00 | two 75.00 | 1 | 2 | 1 | 0 | 1 |" in text.read_text()
    assert "1 question in one run only, not compared" in text.read_text()
    assert "flips of VQAv2: two" in html.read_text()
    with pytest.raises(DataError, match="nothing to compare"):
        write_report(paths[:1], tmp_path / "out", compare=True)


def test_run_names(tmp_path):
    def names(*files, run=None):
        known = [{"task": "mme" if "mme" in f else "pope", "run": run} for f in files]
        return run_names([tmp_path / f for f in files], known)

    assert names("a.json", "b.json") + names("x/r.json", "y/r.json") == ["a", "b", "x", "y"]
    sweep = [f"{out}/{task}/result.json" for out in ("O", "S") for task in ("mme", "pope")]
    assert names(*sweep, run="tiny") == ["O", "O", "S", "S"]
    assert names(*sweep[:2], run="m") + names(*sweep[:2]) == ["m", "m", "O", "O"]
    one, two = tmp_path / "O" / "pope" / "result.json", dump(tmp_path / "mine.json", result([1.0]))
    assert [e.run for e in collect([dump(one, result([1.0], run="m")), two])] == ["m", "mine"]
    with pytest.raises(DataError, match="is given twice"):
        collect([two, one.parent / "../../mine.json"])


def test_charts():
    values = {"a<b": 1.0, "$\\frac": 0.5}
    assert bars(values, mark=0.7) == bars(values, mark=0.7)  # the same bytes
    assert bars(values).count("&lt;") == 1
    assert "$\\frac" in bars(values)  # a name, not a formula
    series = {"_run": [1.0, 2.0, None], "y": [1.0, 1.0, 1.0], "none": [None] * 3}
    svg = radar(["a", "b", "c"], series)
    assert svg == radar(["a", "b", "c"], series)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert texts == ["a (0.8–1.0)", "b (0.8–2.0)", "c (0.8–1.0)", "_run", "y"]
    lines = re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #(?:1f77b4|d62728)', svg)
    # An area and its closed outline each, over the axes that are known.
    assert [line.count("L") for line in lines] == [1, 2, 2, 3]
    assert asked_object("Is there an orange in the image?") == "orange"
    assert asked_object("Is there a dog in the imange?") == "dog"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: the page was not opened")
def test_a_browser_shows_twenty_results_at_two_widths(tmp_path):
    paper = "vqav2 gqa vizwiz scienceqa textvqa mmbench mmbench_cn seed llava_wild mmvet".split()
    paths = []
    for run in ("llava-v1.5-7b-finetune_lora-2026-11", "served copy"):
        for task in paper:
            value = result([1.0, 0.0, 1.0], task, run=run)
            value["totals"] |= {"groups": 3, "judge": "gpt-4o-mini-2024-07-18"}
            value["coverage"] |= {"expected": 4, "details": ["1 of 4 questions have no answer"]}
            for sample in value["per_sample"].values():
                sample |= {"model": 7.0, "reference": 9.0}
            value["totals"]["overall"] = headline_of(task, value["per_sample"])
            paths.append(dump(tmp_path / run / f"{task}.json", value))
    write_report(paths, tmp_path / "out", compare=True)
    frames = [f'<iframe src="out/index.html" style="border:0;width:{w}px;height:900px"></iframe>'
              for w in (1280, 390)]  # fmt: skip
    (tmp_path / "frames.html").write_text("".join(frames) + LOOK)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=4000",
               (tmp_path / "frames.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    (found,) = re.findall(r"<title>(.*)</title>", done.stdout)
    assert found == "false 0 false 0, false 0 true 0"


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'


def test_hostile_text_stays_text(tmp_path):
    """What models, files and people wrote is shown and never becomes part of the page."""
    samples = {
        HOSTILE + str(i): {
            "score": float(i % 2),
            "answer": HOSTILE,
            "truth": [HOSTILE],
            "parsed": HOSTILE,
            "prompt": HOSTILE,
            "image": HOSTILE,
        }
        for i in range(4)
    }
    flipped = {k: {**s, "score": 1 - s["score"]} for k, s in samples.items()}
    paths = []
    for run, rows_ in (("one", samples), ("two", flipped)):
        for task in ("vqav2", "gqa", "pope"):
            value = result([0.5], task, per_sample=rows_, run=HOSTILE + run)
            value["tables"] = {HOSTILE: {HOSTILE: {HOSTILE: 1.0}}, "per split": {}}
            value["notes"], value["coverage"]["details"] = [HOSTILE], [HOSTILE]
            if task == "pope":
                value["tables"]["per split"] = {HOSTILE: {"Yes ratio": 0.5}}
                asked = f"Is there a {HOSTILE} in the image?"
                groups = {"split": HOSTILE}
                pope = {"truth": "no", "parsed": "yes", "prompt": asked, "groups": groups}
                value["per_sample"] = {k: {**s, **pope} for k, s in rows_.items()}
                value["totals"] = {"overall": 0.0}
            paths.append(dump(tmp_path / run / f"{task}.json", value))
    more = {"images": tmp_path, "compare": True, "title": HOSTILE}
    html, text = write_report(paths, tmp_path / "out", **more)
    page = Page()
    page.feed(html.read_text())
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("svg") == 5  # a radar, and two figures per run of POPE
    assert page.sources == ["data:,"]
    assert "{{ 7 * 7 }}" in html.read_text()
    assert "&lt;script&gt;alert(1)" in html.read_text()
    assert "<script" not in text.read_text()
    assert "<img" not in text.read_text()


def test_hallucination_figures(tmp_path):
    samples = {
        str(i): {
            "score": 0.0,
            "answer": "Yes",
            "truth": "no",
            "parsed": "yes",
            "prompt": "Is there a snake in the image?",
            "groups": {"split": "random"},
        }
        for i in range(3)
    }
    value = result([0.0], "pope", per_sample=samples)
    value["tables"] = {"per split": {"random": {"Yes ratio": 1.0}}}
    html, text = write_report([dump(tmp_path / "pope.json", value)], tmp_path / "out")
    assert "snake" in html.read_text()
    assert "Most often seen where it is not: snake 3" in text.read_text()


def test_not_a_result(tmp_path, capsys):
    with pytest.raises(DataError, match="not a result file"):
        read_result(dump(tmp_path / "x.json", {"task": "pope"}))
    right = {"score": 1.0, "answer": "a", "truth": "a"}
    for more in (
        *({"totals": t} for t in ("x", {}, {"overall": True}, {"overall": 100.0, "groups": "x"})),
        *({"per_sample": value} for value in ({}, [1], {"1": 5})),
        {"per_sample": {"1": {"score": 1.0, "answer": "a"}}},
        {"per_sample": {"1": {"score": "x", "answer": "a", "truth": "a"}}},
        {"headline": "nothing"},
        {"headline": ["overall"]},
        {"coverage": None},
        {"coverage": {"answered": 1, "expected": "1", "details": []}},
        {"coverage": {"answered": 1, "expected": 1, "details": 5}},
        {"notes": 5},
        {"tables": {"a": 5}},
        {"tables": [1]},
        {"task": ["pope"]},
        *({"task": name} for name in ("pope", "mme", "llava_wild", "mmbench")),
        {"run": [1]},
        {"coverage": {"answered": 500, "expected": 20, "details": []}},
        *({"per_sample": {"1": right | {"score": s}}} for s in (7, -1, float("nan"))),
        *({"per_sample": {"1": right | {"weight": w}}} for w in ("x", -1, 0, float("nan"))),
    ):
        wrong = dump(tmp_path / "wrong.json", result([1.0], **more))
        assert main(["eval", "report", str(wrong), "--out", str(tmp_path / "o")]) == 2, more
        assert "wrong.json: not a result file: " in capsys.readouterr().err
    for more in ({"totals": {"overall": 99.9}}, {"headline": "n", "totals": {"n": 1}}):
        with pytest.raises(DataError, match=r"the total .* is .*, but its samples make 100\.00"):
            collect([dump(tmp_path / "edited.json", result([1.0], **more))])
    code = main(["eval", "report", str(tmp_path / "none.json"), "--out", str(tmp_path)])
    assert code == 2
    assert "none.json: cannot be read (No such file" in capsys.readouterr().err
    path = dump(tmp_path / "r.json", result([1.0]))
    assert main(["eval", "report", str(path), "--out", str(tmp_path / "o")]) == 0
    assert json.loads(path.read_text())["task"] == "vqav2"


def test_difference_is_to_the_row_of_the_models_own_size(tmp_path):
    def shown(count, scores, task="vqav2", row=None, **more):
        value = result(scores, task, **more)
        value["settings"] = {"parameters": count}
        value["coverage"]["expected"] = 200_000
        return summary_rows(collect([dump(tmp_path / "r.json", value)], row))[0][-2]

    run = [1.0] * 785 + [0.0] * 215  # the 7B's own number
    assert shown(7_063_427_072, run) == "+0.0 (7B)"
    assert shown(13_351_495_680, run) == "-1.5 (13B)"
    assert shown(13_351_495_680, run, experiment={"base": "x"}) == "-1.5 (13B LoRA)"
    assert shown(796_992, run) == ""
    assert shown(796_992, run, row="7B") == "+0.0 (7B)"
    value = result(run)  # a set that was made, or a part of the paper's
    value["settings"] = {"parameters": 7_063_427_072}
    assert summary_rows(collect([dump(tmp_path / "r.json", value)]))[0][-2] == ""


def test_questions_about_one_picture_are_drawn_together():
    scores = [float(n % 2) for n in range(200) for _ in range(9)]
    alone = rows(scores)
    together = {k: {**r, "image": f"{n // 9}.jpg"} for n, (k, r) in enumerate(alone.items())}
    wide, narrow = (bootstrap("gqa", r) for r in (together, alone))
    assert wide.value == narrow.value == 50.0
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(3, rel=0.1)
    assert statistic("gqa", together)[0] == 200


def test_compare_tests_what_the_headline_counts(tmp_path):
    def mme(right):
        value = result([1.0], "mme", headline="perception", totals={"perception": 1.0})
        value["per_sample"] = {
            f"{task}{n}": {
                "score": float(task in right),
                "answer": "Yes",
                "truth": "yes",
                "groups": {"task": task, "pair": str(n // 2)},
            }
            for task in ("existence", "code_reasoning")
            for n in range(4)
        }
        value["totals"]["perception"] = headline_of("mme", value["per_sample"])
        return value

    paths = [
        dump(tmp_path / n / "mme.json", mme(right))
        for n, right in (("a", ()), ("b", ("existence",)))
    ]
    cells = comparison_rows(comparisons_of(collect(paths)))
    assert [(c[0], c[4], c[5]) for c in cells] == [
        ("MME perception", "4", "0"),
        ("MME cognition", "0", "0"),
    ]
