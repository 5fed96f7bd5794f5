"""The whole command with the shipped model, as processes: weights, our own server, kills, two at once."""

import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from examples.benchmark_sets import write_sets
from llava_jax.eval.run.predict import answered_lines
from llava_jax.eval.task import get_task
from tests.eval.test_sweep import SETS, TSV, write_set

pytestmark = pytest.mark.slow
COMMAND = [sys.executable, "-m", "llava_jax"]
MADE = "vqav2,pope,mme,scienceqa,mmbench"


def picture(name):
    """A picture of its own for each name."""
    made, rng = Image.new("RGB", (64, 48)), random.Random(name)
    for _ in range(3):
        box = sorted(rng.sample(range(48), 2))
        made.paste(tuple(rng.randbytes(3)), (box[0], box[0], box[1], box[1]))
    made.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A folder with a set of each benchmark in its owner's form, with pictures."""
    folder = tmp_path_factory.mktemp("every")
    for name in SETS:
        data = write_set(name, folder / name)
        for table in data.glob("*.tsv"):
            table.write_text(TSV.replace("cG5n", base64.b64encode(picture(name)).decode()))
        for q in get_task(name).questions(data):
            for image in (i for i in q.images if isinstance(i, str)):
                path = data / "images" / image
                path = path if path.suffix else path.with_suffix(".jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(f"{name} {image}"))
    (folder / "mme/MME_Benchmark_release_version/existence/1.jpg").unlink()
    return folder


@pytest.fixture(scope="module")
def served():
    """The address of `llava-jax serve`."""
    environment = {**os.environ, "LLAVA_JAX_API_KEY": "k"}
    words = [*COMMAND, "serve", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        told = ""
        while not (found := re.search(r"answers at (http://\S+/v1)", told)):
            line = process.stdout.readline()
            assert line, told
            told += line
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def words(data, out, tasks, *more):
    return [*COMMAND, "eval", "--tasks", tasks, "--data", str(data), "--out", str(out), *more]


def weights(*words):
    return ["--model", "tiny", *words]


def endpoint(url, *words):
    return ["--model", "tiny", "--endpoint", url, *words]


def start(command):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **quiet, env={**os.environ, "OPENAI_API_KEY": "k"})


def finish(*started):
    for process in started:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-2000:]


def answers(out, name="answers.jsonl"):
    """(task, key) -> text; answered_lines refuses a key that is there twice."""
    return {
        (path.parent.name, key): json.loads(line.text)["text"]
        for path in sorted(out.glob(f"*/{name}"))
        for key, line in answered_lines(path, repair=False).items()
    }


def test_weights_and_a_server_give_one_set_of_answers(every, served, tmp_path):
    pytest.importorskip("textblob", reason="textblob is not installed")
    tasks, few = ",".join(SETS), ("--max-new-tokens", "12")
    finish(start(words(every, tmp_path / "w", tasks, *weights(*few))))
    finish(start(words(every, tmp_path / "e", tasks, *endpoint(served, *few))))
    one, two = answers(tmp_path / "w"), answers(tmp_path / "e")
    assert {task for task, _ in one} == set(SETS)
    assert len(one) == sum(len(get_task(n).questions(every / n)) for n in SETS)
    assert one == two
    assert sum(map(bool, one.values())) > 30, "the model says nothing"
    judged = {name for name in SETS if get_task(name).judge}
    for out in ("w", "e"):
        results = {path.parent.name for path in (tmp_path / out).glob("*/result.json")}
        assert results == set(SETS) - judged
    scores = [json.loads((tmp_path / o / "pope/result.json").read_text())["totals"] for o in "we"]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(("by", "kills"), [("endpoint", 20), ("weights", 2)])
def test_no_kill_loses_or_doubles_an_answer(by, kills, request, tmp_path):
    write_sets(tmp_path / "sets", count=6)
    more = ("--max-new-tokens", "4", "--batch-size", "2")
    model = (
        weights(*more) if by == "weights" else endpoint(request.getfixturevalue("served"), *more)
    )
    killed, rng, there = tmp_path / "killed", random.Random(1), {}
    for n in range(kills):
        process = start(words(tmp_path / "sets", killed, MADE, *model))
        while process.poll() is None and len(answers(killed)) <= len(there):
            time.sleep(0.002)
        assert process.poll() is None, (
            f"it ended before kill {n}: {process.communicate()[1][-500:]}"
        )
        time.sleep(rng.random() / 20)
        process.kill()
        process.communicate()
        found = answers(killed)
        assert there.items() <= found.items()
        there = found
    finish(start(words(tmp_path / "sets", killed, MADE, *model)))
    finish(start(words(tmp_path / "sets", tmp_path / "whole", MADE, *weights(*more))))
    whole = answers(tmp_path / "whole")
    assert there.items() <= whole.items()
    assert answers(killed) == whole
    assert (killed / "report" / "index.html").exists()


def test_two_processes_at_once_give_the_answers_of_one(tmp_path):
    write_sets(tmp_path / "sets", count=6)
    both, one = tmp_path / "both", tmp_path / "one"
    more = weights("--max-new-tokens", "4")
    finish(*[
        start(words(tmp_path / "sets", both, MADE, *more, "--chunk", f"{k}/2")) for k in range(2)
    ])  # fmt: skip
    finish(start(words(tmp_path / "sets", one, MADE, *more)))
    assert answers(both) == answers(one)
    for name in MADE.split(","):
        order = [[*answered_lines(out / name / "answers.jsonl")] for out in (both, one)]
        assert order[0] == order[1]
        totals = [json.loads((o / name / "result.json").read_text()) for o in (both, one)]
        assert totals[0]["totals"] == totals[1]["totals"]
        parts = answers(both, "answers-*-of-2.jsonl")
        assert len([key for task, key in parts if task == name]) == len(order[0])
