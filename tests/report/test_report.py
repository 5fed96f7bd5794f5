"""The report of work directories: what is on the page, damaged and running ones, and how a browser takes it."""

import json
import re
import shutil
import subprocess

import pytest

from llava_jax.cli import main
from llava_jax.report.page import report_page
from llava_jax.report.runs import POINTS, curves, find_runs, read_run

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome", "chrome")
                 if (p := shutil.which(n))), None)  # fmt: skip


def make_run(folder, steps=60, rate=1e-3):
    """A work directory as a run leaves it."""
    folder.mkdir(parents=True)

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def step(i):
        row = {"step": i, "loss": 3 / i, "grad_norm": 1.0, "lr": rate, "real": 0.8, "seconds": 1.0}
        norms = {name: {"language": 1.0, "projector": 0.5} for name in ("lrs", "grad_norms")}
        return {**row, **norms, "update_norms": {"language": 0.1, "projector": 0.2}, "ok": i != 7}

    write("metrics.jsonl", map(step, range(1, steps + 1)))
    sets = {"vqa": {"loss": 0.5, "samples": 9, "tokens": 90, "exact_match": 0.25, "asked": 8}}
    best = {"step": 10, "value": 0.5}
    write("eval.jsonl", [{"step": 10, "sets": sets, "value": 0.5, "best": best, "waited": 0}])
    said = {"set": "vqa", "id": "s<1>", "question": "What </script> is it?", "truth": "a cat"}
    write(
        "samples.jsonl", [{"step": s, **said, "answer": a} for s, a in ((10, "<b>"), (20, "a cat"))]
    )
    system = {"step": 50, "time": 1, "started": 0, "tokens_per_second": 1234.0, "goodput": 0.9}
    write("system.jsonl", [{**system, "elapsed_seconds": 66.7, "host_memory": 2e9, "mfu": 0.41}])
    write("bad.jsonl", [{"id": "s9", "reason": "no such image file"}])
    write("skipped.jsonl", [{"step": 7, "ids": ["s3", "s4"]}])
    (folder / "config.json").write_text(json.dumps({"lr": rate, "data": {"path": "mix.json"}}))
    facts = {"steps": 100, "commit": "abc", "versions": {"jax": "9"}, "recipe": "finetune_7b"}
    (folder / "run.json").write_text(json.dumps({**facts, "recipe_settings": {"lr": 2e-5}}))
    return folder


def text_of(page):
    return re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.S)


def test_the_page_says_how_a_run_stands_and_what_it_was(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    assert main(["report", str(run), "--png", str(tmp_path / "curves.png")]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    shown = text_of(page)
    for words in ("60 of 100", "0.5 at 10", "1,234", "41.0%", "2.0 GB", "no such image file"):
        assert words in shown, words
    for words in (
        "abc",
        "jax 9",
        "finetune_7b",
        "mix.json",
        "2e-05",
        "0.001",
        "step 7",
        "its samples: s3, s4",
    ):
        assert words in shown, words
    assert "What &lt;/script&gt; is it?" in shown
    assert "&lt;b&gt;" in shown
    assert not re.findall(r"(?:src|href)=.?(?!data:)\w+:", page), "nothing is fetched"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_is_no_png_is_refused_before_anything_is_written(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    for name in ("curves.gif", "curves"):
        assert main(["report", str(run), "--png", str(tmp_path / name)]) == 2
        assert "curves.png" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_runs_are_compared(tmp_path):
    one, two = make_run(tmp_path / "a" / "one"), make_run(tmp_path / "b" / "two", rate=2e-3)
    shown = text_of(report_page(find_runs([one, two]), "both"))
    (row,) = re.findall(r"<tr><th scope=row>lr</th>(.*?)</tr>", shown)
    assert re.findall(r"<td>(.*?)</td>", row) == ["2e-05", "2e-05", "0.001", "0.002"]
    assert "Samples: one" in shown
    same = [make_run(tmp_path / x / "same") for x in "cd"]
    assert [run.name for run in find_runs(same)] == ["c/same", "d/same"]


def test_a_run_with_stages_is_a_run_for_each(tmp_path):
    make_run(tmp_path / "run" / "stage1")
    make_run(tmp_path / "run" / "stage2")
    assert [r.name for r in find_runs([tmp_path / "run"])] == ["stage1", "stage2"]


def test_a_damaged_or_running_work_directory_is_shown_as_far_as_it_goes(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "system.jsonl", "bad.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 61, "lo')
    (run / "run.json").write_text('{"steps": ')
    (run / "config.json").unlink()
    found = read_run(run, "run")
    assert len(found.metrics) == 60
    page = text_of(report_page([found], "x"))
    assert "run.json is damaged" in page
    assert "no such image file" in page
    (run / "samples.jsonl").write_text('{"step": 1, "picture": "../run.json"}\n')
    assert "data:image/jpeg" not in report_page([read_run(run, "run")], "x")


@pytest.mark.parametrize("bad", [None, "x", [1], {"a": 1}, float("nan"), True, -1e400, 10**400])
def test_any_damaged_value_leaves_the_rest(tmp_path, bad):
    run = make_run(tmp_path / "run", steps=2)
    before = {path: path.read_text() for path in run.glob("*.json*")}
    for path, text in before.items():
        first = json.loads(text.splitlines()[0])
        for key in first:
            rest = text.splitlines()[1:]
            path.write_text("\n".join([json.dumps({**first, key: bad}), *rest]) + "\n")
            assert "What ran" in report_page([read_run(run, "run")], "x"), (path.name, key)
        path.write_text(text)
    (run / "eval.jsonl").write_text(
        json.dumps({"step": 1, "sets": {"vqa": bad, "b": {"loss": bad}}, "best": {"value": bad}})
    )
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "loss": bad}) + "\n" + json.dumps({"loss": bad})
    )
    assert main(["report", str(run), "--png", str(tmp_path / "x.png")]) == 0


def test_rates_over_no_time_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    row = {"step": 1, "seconds": 0.0, "tokens_per_second": 3.1e11, "data": 5.7e7, "goodput": 0.5}
    (run / "system.jsonl").write_text(json.dumps(row) + "\n")
    found = curves(read_run(run, "run"))
    assert "system/goodput" in found
    assert not {"system/tokens_per_second", "system/data"} & found.keys()


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": NaN}\n[1]\n"x"\n{"step": 5, "loss": 2.0, "lrs": 3}\n')
    found = read_run(run, "run")
    assert curves(found)["loss"]["x"] == [1, 2, 3, 5]
    report_page([found], "x")


def test_a_long_curve_keeps_its_extremes(tmp_path):
    run = make_run(tmp_path / "run", steps=POINTS * 3)
    loss = curves(read_run(run, "run"))["loss"]
    assert len(loss["y"]) <= POINTS
    assert max(loss["y"]) == 3.0
    assert loss["x"] == sorted(loss["x"])


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no run was started here" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed: the page was not opened")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_draws_the_curves_without_a_complaint(tmp_path, width):
    runs = find_runs([make_run(tmp_path / "one"), make_run(tmp_path / "two", rate=2e-3)])
    (tmp_path / "page.html").write_text(report_page(runs, "both"))
    # A window is at least 500 pixels wide; what is in a frame is not.
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
    probe = """<script>onload = () => setTimeout(() => { const d = frames[0].document;
      document.title = [d.querySelectorAll("svg.plot path").length,
      d.documentElement.scrollWidth].join(" ") }, 300)</script>"""
    (tmp_path / "frame.html").write_text(frame + probe)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
               "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=4000",
               (tmp_path / "frame.html").as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []
    ((paths, wide),) = re.findall(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert int(paths) >= 2 * 12  # a line for each run in each chart, at least
    assert int(wide) <= width, "the page is wider than the screen"
