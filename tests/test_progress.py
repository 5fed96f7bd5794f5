"""Progress in a log file is lines of text, not a bar drawn over and over."""

from llava_jax.progress import progress


def test_where_the_output_is_no_terminal_a_line_for_each_tenth(capsys):
    with progress(25, "tower", "step") as bar:
        for step in range(25):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert len(lines) == 10
    assert lines[0] == "tower: 3 of 25, loss 2"
    assert lines[-1] == "tower: 25 of 25, loss 24"


def test_quiet_and_empty_work_say_nothing(capsys):
    progress(2, "answers", "answer", quiet=True).update(2)
    progress(0, "answers", "answer").close()
    assert capsys.readouterr().err == ""


def test_a_start_in_the_middle(capsys):
    bar = progress(10, "pope", "q", initial=8)
    bar.update(2)
    bar.close()
    assert capsys.readouterr().err.splitlines() == ["pope: 10 of 10"]
