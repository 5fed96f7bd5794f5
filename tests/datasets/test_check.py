"""`llava-jax data check`: everything that is wrong is found and named, and nothing is changed."""

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.cli import main
from llava_jax.datasets import check as module
from llava_jax.datasets.check import check, clean
from llava_jax.datasets.findings import Looks, look_of, picture_job, record_job
from llava_jax.errors import LlavaError
from llava_jax.store.write import pack
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.tokenizer import Tokenizer

ASSETS = Path(llava_jax.__file__).parent / "assets"


def picture(seed, size=(64, 48)):
    """A picture that looks like no other."""
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)


def encoded(image, kind, **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def record(id_, image, *turns, roles=("human", "gpt")):
    turns = turns or ("<image>\nWhat?", "A cat.")
    made = {"id": id_, "conversations": []}
    made["conversations"] = [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]
    return made | ({"image": image} if image else {})


LONG = " ".join(["and so on"] * 300)
RECORDS = {
    record("good", "good.png")["id"]: record("good", "good.png"),
    "malformed": {"id": "malformed", "conversations": "no"},
    "roles": {
        "id": "roles",
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "human", "value": "b"},
            {"from": "gpt", "value": "c"},
        ],
    },
    "unanswered": record("unanswered", None, "Hi", ""),
    "nothing": record("nothing", None, LONG, "Yes"),
    "long": record("long", None, "Tell me.", LONG),
    "missing": record("missing", "nowhere.png"),
    "case": record("case", "GOOD.png"),
    "text": record("text", "text.jpg"),
    "cut": record("cut", "cut.jpg"),
    "huge": record("huge", "huge.png"),
    "extension": record("extension", "photo.png"),
    "empty answers": record("empty answers", None, "a", "", "b", "c"),
    "open": record("open", None, "a", "b", "c"),
    "tag": record("tag", None),
    "no tag": record("no tag", "good.png", "What?", "A cat."),
    "twice": record("twice", "good.png"),
    "same bytes": record("same bytes", "copy.png", "<image>\nOther?", "Yes"),
    "alike": record("alike", "smaller.jpg", "<image>\nAnother?", "Yes"),
    "pictures": record("pictures", ["good.png"] * 14, "<image>" * 14 + "\nWhat?", "A cat."),
}
FOUND = {
    "malformed": {"malformed record"},
    "roles": {"roles out of order"},
    "unanswered": {"no answer"},
    "nothing": {"nothing to train"},
    "long": {"too long"},
    "missing": {"missing picture"},
    "case": {"missing picture"},
    "text": {"not a picture"},
    "cut": {"corrupt picture"},
    "huge": {"oversize picture"},
    "extension": {"wrong extension"},
    "empty answers": {"empty answers"},
    "open": {"unanswered question"},
    "tag": {"tag without image"},
    "no tag": {"image without tag"},
    "twice": {"record twice"},
    "same bytes": {"picture twice"},
    "alike": {"pictures look alike"},
    "pictures": {"nothing to train", "too long", "cut at a picture"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check")
    images = folder / "images"
    images.mkdir()
    good = encoded(picture(1), "PNG")
    (images / "good.png").write_bytes(good)
    (images / "copy.png").write_bytes(good)
    (images / "smaller.jpg").write_bytes(encoded(picture(1).resize((48, 36)), "JPEG", quality=90))
    (images / "text.jpg").write_text("<html>not found</html>")
    (images / "cut.jpg").write_bytes(encoded(picture(2), "JPEG")[:-300])
    (images / "huge.png").write_bytes(encoded(Image.new("1", (9000, 10)), "PNG"))
    (images / "photo.png").write_bytes(encoded(picture(3), "JPEG"))
    (folder / "data.json").write_text(json.dumps(list(RECORDS.values())))
    return folder


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def found(data):
    """(exit code, check.json) of a run with the tiny model, at 208 positions."""
    before = state(data)
    report = data.parent / f"{data.name}-report"
    words = ["data", "check", str(data / "data.json"), "--images", str(data / "images")]
    code = main([*words, "--workers", "2", "--report", str(report)])
    assert state(data) == before  # nothing is changed on disk
    assert (report / "check.html").read_text().count("<details>") >= 15
    return code, json.loads((report / "check.json").read_text())


def test_everything_is_found_and_named(found):
    code, told = found
    assert code == 1
    of = {}
    for row in told["findings"]:
        of.setdefault(row["id"], set()).add(row["kind"])
    for name, kinds in FOUND.items():
        assert kinds <= of.pop(name, set()), name
    assert set(of) <= {"good"}
    assert told["records"] == len(RECORDS)
    assert told["worker_peak_mb"] < 300
    detail = {row["id"]: row["detail"] for row in told["findings"]}
    assert detail["extension"] == "photo.png: it is a JPEG"
    assert "max_side" in detail["huge"]
    of_pictures = [row["detail"] for row in told["findings"] if row["kind"] == "cut at a picture"]
    assert len(of_pictures) == 1
    assert "is inside of a picture: " in of_pictures[0]


def test_a_cleaned_file_is_what_training_takes(data, tmp_path, capsys):
    out = tmp_path / "clean.json"
    words = ["data", "check", str(data / "data.json"), "--images", str(data / "images")]
    assert main([*words, "--clean", str(out)]) == 1
    kept = [r["id"] for r in json.loads(out.read_text())]
    bad = {"malformed record", "roles out of order", "no answer", "nothing to train"}
    bad |= {"missing picture", "not a picture", "corrupt picture", "oversize picture"}
    assert kept == [name for name in RECORDS if not FOUND.get(name, set()) & bad]
    capsys.readouterr()
    assert main([*words, "--clean", str(out)]) == 2
    assert "is not replaced" in capsys.readouterr().err
    again = ["data", "check", str(out), *words[3:]]
    assert main([*again, "--clean", str(tmp_path / "unique.json"), "--unique"]) == 0
    assert "twice" not in [r["id"] for r in json.loads((tmp_path / "unique.json").read_text())]


def test_of_doubles_the_first_stays_in_whatever_order_chunks_are_done(tmp_path, monkeypatch):
    def last_first(job, setup, chunks, *_):
        work = (record_job if job == module.RECORD_JOB else picture_job)(*setup)
        return reversed([(chunk, work(chunk)) for chunk in chunks])

    monkeypatch.setattr(module, "in_processes", last_first)
    monkeypatch.setattr(module, "RECORDS", 1)
    (tmp_path / "a.png").write_bytes(encoded(picture(1), "PNG"))
    rows = [record("other", None, "Hi", "You"), *(record(name, "a.png") for name in "abc")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    make = ExampleMaker(Tokenizer.load(ASSETS / "tiny"), image_tokens=4)
    told = check(str(tmp_path / "data.json"), str(tmp_path), make)
    found = [(index, name, finding.detail) for index, name, finding in told.rows]
    assert found == [(2, "b", "as record 1"), (3, "c", "as record 1")]
    assert clean(told, tmp_path / "clean.json", unique=True) == 2
    assert [r["id"] for r in json.loads((tmp_path / "clean.json").read_text())] == ["other", "a"]


def test_what_is_only_of_a_cleaned_file_needs_one(tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps([record("a", None, "what?", "x")]))
    assert main(["data", "check", str(tmp_path / "mine.json"), "--unique"]) == 2
    assert "--unique leaves records out of --clean, which is not given" in capsys.readouterr().err


def test_what_an_evaluation_shares_is_found(data, tmp_path, capsys):
    theirs = tmp_path / "eval"
    theirs.mkdir()
    (theirs / "x.jpg").write_bytes(encoded(picture(1).resize((80, 60)), "JPEG"))
    question = "What is the man with the red hat doing there?"
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 1, "question": question}))
    records = [
        record("seen", "good.png"),
        record(
            "asked", None, f"{question}\nAnswer the question using a single word or phrase.", "x"
        ),
        record("new", None, "What is the man with the blue hat doing there?", "x"),
    ]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    words = ["data", "check", str(tmp_path / "mine.json"), "--images", str(data / "images")]
    words += ["--against", str(theirs), str(tmp_path / "q.jsonl")]
    assert main([*words, "--clean", str(tmp_path / "out.json"), "--unique"]) == 0
    shown = capsys.readouterr().out
    assert "1  picture of an evaluation" in shown
    assert "1  question of an evaluation" in shown
    assert [r["id"] for r in json.loads((tmp_path / "out.json").read_text())] == ["new"]
    assert main([*words[:-2], str(tmp_path / "nowhere")]) == 2
    assert "--against" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "role"),
    [
        ("<image> {}", "Human"),
        ("<image>{}", "user"),
        ("Look at this.\n  {}", "human"),
        ("Question: {} Answer the question using a single word or phrase.", "human"),
    ],
)
def test_a_question_of_an_evaluation_is_known_in_any_form(tmp_path, said, role):
    question = "What is the man with the red hat doing there?"
    (tmp_path / "eval" / "sub").mkdir(parents=True)
    (tmp_path / "eval" / "sub" / "q.tsv").write_text(f"index\tquestion\n1\t{question}\n")
    (tmp_path / "eval" / "no_name").write_bytes(encoded(picture(1), "PNG"))
    (tmp_path / "eval" / "broken.jfif").write_bytes(b"junk")
    turns = [{"from": role, "value": said.format(question.upper())}, {"from": "gpt", "value": "x"}]
    (tmp_path / "mine.json").write_text(json.dumps([{"conversations": turns}]))
    make = ExampleMaker(Tokenizer.load(ASSETS / "tiny"), image_tokens=4)
    told = check(str(tmp_path / "mine.json"), "", make, against=[str(tmp_path / "eval")])
    assert told.seen_records == {0}
    assert told.against[0].endswith("1 files with 1 questions of 8 words or more, 1 pictures")


def test_an_evaluation_that_compares_nothing_is_an_error(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([record("a", None, "what?", "x")]))
    make = ExampleMaker(Tokenizer.load(ASSETS / "tiny"), image_tokens=4)
    (tmp_path / "eval").mkdir()
    for name, text in (("a.txt", "x"), ("a.jsonl", '{"question": "Is it a dog?"}')):
        (tmp_path / "eval" / name).write_text(text)
        with pytest.raises(LlavaError, match="no picture that can be read and no question of 8"):
            check(str(tmp_path / "mine.json"), "", make, against=[str(tmp_path / "eval")])


def test_a_report_is_not_replaced(tmp_path, capsys):
    (tmp_path / "check.json").write_text("mine")
    (tmp_path / "mine.json").write_text(json.dumps([record("a", None, "what?", "x")]))
    assert main(["data", "check", str(tmp_path / "mine.json"), "--report", str(tmp_path)]) == 2
    assert "check.json is there already, and is not replaced" in capsys.readouterr().err


def test_a_killed_worker_is_named_and_no_hang(tmp_path, monkeypatch, caplog):
    names = ["a.png", "deadly.png", "once.png", "b.png"]
    for n, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(picture(n), "PNG"))
    (tmp_path / "once.flag").touch()
    (tmp_path / "data.json").write_text(json.dumps([record(name, name) for name in names]))
    monkeypatch.setattr(module, "PICTURE_JOB", "tests.datasets.deadly:picture_job")
    monkeypatch.setattr(module, "PICTURES", 2)
    make = ExampleMaker(Tokenizer.load(ASSETS / "tiny"), image_tokens=4)
    told = check(str(tmp_path / "data.json"), str(tmp_path), make, workers=1)
    rows = [(name, finding.kind, finding.detail) for _, name, finding in told.rows]
    killed = "deadly.png: its process was killed by SIGKILL"
    assert rows == [("deadly.png", "deadly picture", killed)]
    assert "its work is done again" in caplog.text


def test_of_packed_data_the_records_are_looked_at(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes(encoded(picture(1), "PNG"))
    rows = [record("good", "good.png"), record("unanswered", None, "Hi", "")]
    rows.append(record("lacking", "gone.png"))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    pytest.importorskip("array_record")
    pack(str(tmp_path / "data.json"), str(tmp_path / "images"), str(tmp_path / "packed"))
    for name in ("packed", "packed/records.jsonl"):
        assert main(["data", "check", str(tmp_path / name)]) == 1
        said = capsys.readouterr().out
        assert "3 records, 0 pictures" in said
        assert "no answer" in said
        assert "BAD         1  missing picture" in said
        assert "[2] lacking: when the data were packed" in said
    assert main(["data", "stats", str(tmp_path / "packed")]) == 0
    assert main(["data", "show", str(tmp_path / "packed"), "0"]) == 0


def test_a_broken_file_is_one_line(tmp_path, capsys):
    (tmp_path / "data.json").write_text('[{"id": 1},\n')
    assert main(["data", "check", str(tmp_path / "data.json")]) == 2
    assert "data.json: not JSON at line" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "data.json").write_text("[]")
    assert main(["data", "check", str(tmp_path / "data.json")]) == 2
    assert "there are no samples" in capsys.readouterr().err


def test_looks():
    looks = Looks()
    a, b = picture(1, (640, 480)), picture(2, (640, 480))
    looks.add(look_of(a), "a")
    for seed in range(3, 200):
        looks.add(look_of(picture(seed)), str(seed))
    for same in (a.resize((200, 150)), Image.open(io.BytesIO(encoded(a, "JPEG", quality=40)))):
        assert looks.find(look_of(same)) == "a"
    for other in (b, a.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        assert looks.find(look_of(other)) is None
    assert look_of(Image.new("RGB", (64, 64), "red")) == b""
    assert look_of(Image.linear_gradient("L").convert("RGB")) == b""
    assert looks.find(b"") is None


def test_every_bad_image_is_found(bad_images, tmp_path):
    rows = [json.loads(x) for x in (bad_images / "manifest.jsonl").read_text().splitlines()]
    good = [f"good{n}.png" for n in range(20)]
    for n, name in enumerate(good):
        (tmp_path / name).write_bytes(encoded(picture(n), "PNG"))
    for row in rows:
        target = tmp_path / row["file"]
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(bad_images.resolve() / row["file"])
    names = good + [row["file"] for row in rows]
    random.Random(0).shuffle(names)
    (tmp_path / "data.json").write_text(json.dumps([record(name, name) for name in names]))
    report = tmp_path / "report"
    words = ["data", "check", str(tmp_path / "data.json"), "--images", str(tmp_path)]
    assert main([*words, "--workers", "2", "--report", str(report)]) == 1
    told = json.loads((report / "check.json").read_text())
    bad_kinds = {row["kind"] for row in told["kinds"] if row["bad"]}
    bad = {row["id"] for row in told["findings"] if row["kind"] in bad_kinds}
    assert {row["file"] for row in rows if row["expect"] == "reject"} <= bad
    assert not bad & {row["file"] for row in rows if row["expect"] == "ok"}
    assert not bad & set(good)
    extension = {row["id"] for row in told["findings"] if row["kind"] == "wrong extension"}
    assert "syn/syn_mismatch_A.png" in extension
    assert told["worker_peak_mb"] < 300
