"""Progress in a log file is lines of text, not a bar drawn over and over."""

import time

from llava_jax.progress import progress


def test_where_the_output_is_no_terminal_a_line_for_each_tenth(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress(25, "tower", "step") as bar:
        for step in range(25):
            now[0] += 1
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert len(lines) == 10
    assert lines[0] == "tower: 3 of 25, loss 2"
    assert lines[-1] == "tower: 25 of 25, loss 24"


def test_quick_work_is_one_line_and_slow_work_is_heard_of(capsys, monkeypatch):
    with progress(100, "answers", "answer") as bar:
        for _ in range(100):
            bar.update()
    assert capsys.readouterr().err.splitlines() == ["answers: 100 of 100"]
    bar = progress(100, "answers", "answer")
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    bar.update(3)
    assert capsys.readouterr().err.splitlines() == ["answers: 3 of 100"]


def test_quiet_and_empty_work_say_nothing(capsys):
    progress(2, "answers", "answer", quiet=True).update(2)
    progress(0, "answers", "answer").close()
    assert capsys.readouterr().err == ""


def test_a_start_in_the_middle(capsys):
    bar = progress(10, "pope", "q", initial=8)
    bar.update(2)
    bar.close()
    assert capsys.readouterr().err.splitlines() == ["pope: 10 of 10"]
