"""Recipes built into a training file: counts, weights, manifest, and what goes wrong."""

import io
import json
import shutil

import pytest
from PIL import Image

from llava_jax.cli import main
from llava_jax.data.check import open_data
from llava_jax.datasets.build import _is_built, build, manifest_of, report
from llava_jax.datasets.prompts import kind_of
from llava_jax.datasets.recipe import read_recipe, shipped
from llava_jax.datasets.shapes import saver
from llava_jax.datasets.writer import open_writer
from llava_jax.errors import ConfigError, LlavaError, SampleError
from tests.datasets import owners

SETS = {
    "llava_instruct": 4,
    "sharegpt": 3,
    "vqav2": 3,
    "gqa": 6,
    "okvqa": 3,
    "ocrvqa": 5,
    "aokvqa": 12,
    "textcaps": 3,
    "refcoco": 8,
    "visual_genome": 3,
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return owners.small(tmp_path_factory.mktemp("raw"))


def recipe(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_stage_2_from_its_owners_files(raw, tmp_path, capsys):
    text = shipped()["stage2"].read_text().replace("80000", "5")
    mine, out = recipe(tmp_path, text), tmp_path / "out" / "mix.json"
    assert main(["data", "build", str(mine), "--raw", str(raw), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "visual_genome" in shown
    assert "-86,414" in shown  # 3 of the 86,417 published
    records = json.loads(out.read_text())
    manifest = json.loads(manifest_of(out).read_text())
    assert {row["source"]: row["records"] for row in manifest["sets"]} == SETS
    assert manifest["records"] == len(records) == sum(SETS.values())
    assert manifest["bytes"] == out.stat().st_size
    assert len(manifest["sets"][2]["inputs"][0]["sha256"]) == 64
    assert manifest["sets"][1]["skipped"] == {"later part of a conversation": 3}
    kinds = [kind_of(r["conversations"][0]["value"]) for r in records]
    assert {k: kinds.count(k) for k in ("short answer", "option letter", "caption", "free")} == {
        "short answer": 3 + 6 + 3 + 5,
        "option letter": 12,
        "caption": 3,
        "free": 4 + 3,
    }
    data = open_data({"path": str(out), "bad_limit": 1.0, "bad_samples": "skip"}, say=False)
    assert data.total == len(records)  # every record is one that training takes
    assert set(data.bad.kinds()) <= {k for k in data.bad.kinds() if "exist" in k}


def test_equal_inputs_make_equal_files(raw, tmp_path):
    text = '[[set]]\nsource = "ocrvqa"\ncount = 5\n'
    made = []
    for seed in (0, 0, 1):
        mine = recipe(tmp_path, f"seed = {seed}\n{text}")
        out = tmp_path / f"{len(made)}.json"
        build(read_recipe(str(mine), raw), out, quiet=True)
        made.append(out.read_bytes())
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(("weight", "count"), [(1, 8), (0.5, 4), (2.5, 20), (3, 24)])
def test_weights_say_how_often(raw, tmp_path, weight, count):
    mine = recipe(tmp_path, f'[[set]]\nsource = "ocrvqa"\nweight = {weight}\n')
    build(read_recipe(str(mine), raw), tmp_path / "x.json", quiet=True)
    ids = [r["id"] for r in json.loads((tmp_path / "x.json").read_text())]
    assert len(ids) == count
    assert max(map(ids.count, ids)) - min(map(ids.count, ids)) <= 1


def own_set(field, *records):
    """The text of a set of one's own: a field, and the lines of `records`."""
    return (
        "from dataclasses import dataclass\n"
        "from llava_jax.datasets.source import Source, about_image\n\n\n"
        "@dataclass(kw_only=True)\n"
        "class Pets(Source):\n"
        "    name = 'pets'\n"
        "    prompt: str = 'Say one word.'\n"
        f"    {field}\n\n"
        "    def records(self):\n" + "".join(f"        {line}\n" for line in records) + "\n\n"
        "SOURCE = Pets\n"
    )


def test_a_set_of_ones_own(raw, tmp_path):
    made = "yield about_image('1', 'cat.jpg', [('What is it?', f'{self.share}')], self.prompt)"
    (tmp_path / "pets.py").write_text(own_set("share: float = 0.5", made))
    text = '[[set]]\nsource = "pets.py"\nprompt = "Be brief."\nshare = 1\n'
    build(read_recipe(str(recipe(tmp_path, text)), raw), tmp_path / "x.json", quiet=True)
    (record,) = json.loads((tmp_path / "x.json").read_text())
    assert [turn["value"] for turn in record["conversations"]] == [
        "<image>\nWhat is it?\nBe brief.",
        "1.0",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no sets"),
        ("x = 1\n[[set]]\nsource='gqa'", "'x' is neither seed nor set"),
        ("[[set]]\nsource='gqq'", "no source 'gqq' (did you mean gqa?)"),
        ("[[set]]\nsource='no.py'", "no such source file"),
        (
            "[[set]]\nsource='gqa'\npromt='x'",
            "gqa: 'promt' is not a field of it (did you mean prompt?)",
        ),
        ("[[set]]\nsource='gqa'\nprompt=3", "gqa: prompt is 3, not text"),
        ("[[set]]\nsource='gqa'\nweight=0", "weight is 0, not a number above 0"),
        (
            "[[set]]\nsource='gqa'\ncount=2\nweight=2.0",
            "count is a whole number from 1, without weight",
        ),
        ("[[set]]\nsource='refcoco'\nrefs=['x']", "refs has 'x', not refcoco"),
        ("[[set]]\nsource='refcoco'\nrefs=[1, 'a']", "refs is [1, 'a'], not a list of names"),
        ("[[set]]\nsource='refcoco'\nrefs=[['refcoco']]", "refs is [['refcoco']], not a list of"),
        ("[[set]]\nsource='refcoco'\nrefs=['refcoco', 'refcoco']", "refs has 'refcoco' twice"),
        ("[[set]]\nsource='visual_genome'\nregions=0", "regions is 0, not a number from 1"),
        ("[[set]]\nsource='share.py'\nshare='x'", "share is 'x', not a number"),
        ("[[set]]\nsource='share.py'\nshare=true", "share is True, not a number"),
        ("[[set", "not TOML"),
        ("set = [1]", "a set has no source"),
        ("seed='x'\n[[set]]\nsource='gqa'", "seed is 'x', not a whole number"),
        ("seed=true\n[[set]]\nsource='gqa'", "seed is True"),
        ("[[set]]\nsource='gqa'\nweight=999999", "weight is 999999"),
        ("[[set]]\nsource='gqa'\nfolder=['x']", "folder is ['x'], not text"),
        ("[[set]]\nsource='gqa'\nimage='same.jpg'", "image is 'same.jpg', and needs {}"),
        ("[[set]]\nsource='gqa'\nimage='{'", "image is '{'"),
        ("[[set]]\nsource='scienceqa'\nimage='{file}'", "needs {id} and {file}"),
        ("[[set]]\nsource='records'\npaths=['a']\nprompt='x'", "'prompt' is not a field"),
        ("[[set]]\nsource='records'\npaths=[5]", "paths is [5], not a list of names"),
        ("[[set]]\nsource='records'\npaths=['a']\npictures='../..'", "not the name of a folder"),
        ("[[set]]\nsource='records'\npaths=['a', 'b', 'a']", "paths has 'a' twice"),
        ("[[set]]\nsource='gqa'\nimage='{}{}'", "image is '{}{}', and needs {}"),
        ("[[set]]\nsource='none.py'", "none.py has no SOURCE"),
        ("[[set]]\nsource='raises.py'", "raises.py: ZeroDivisionError"),
    ],
)
def test_recipes_that_are_wrong(tmp_path, text, said):
    (tmp_path / "none.py").write_text("SOURCE = 1\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "share.py").write_text(own_set("share: float = 0.5", "yield from ()"))
    with pytest.raises(ConfigError) as info:
        read_recipe(str(recipe(tmp_path, text)), tmp_path)
    assert said in str(info.value)
    assert "\n" not in str(info.value)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe 'stage3' \(did you mean stage"):
        read_recipe("stage3", tmp_path)
    with pytest.raises(ConfigError, match="no set 'gqq'"):
        read_recipe("stage2", tmp_path, ("gqq",))


def test_nothing_is_replaced_and_nothing_is_left_half(raw, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    with pytest.raises(Exception, match="is not replaced"):
        build(read_recipe("stage2", raw), tmp_path / "there.json", quiet=True)
    owners.write_list(tmp_path / "gqa" / "train_balanced_questions.json", [])
    (tmp_path / "gqa" / "train_balanced_questions.json").write_text('{"1": {"imageId": "1"}')
    mine = recipe(tmp_path, '[[set]]\nsource = "gqa"\n')
    with pytest.raises(SampleError, match="not in the owner's form: no 'question'"):
        build(read_recipe(str(mine), tmp_path), tmp_path / "x.json", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gqa", "mine.toml", "there.json"]


def test_one_process_writes_a_file_and_its_leftover_is_taken_over(tmp_path):
    out = tmp_path / "x.json"
    (tmp_path / ".x.json.tmp").write_text("of a killed one")
    with open_writer(out) as first:
        first.write({"id": "1"})
        with pytest.raises(LlavaError, match="another process is writing it"), open_writer(out):
            pass
        first.finish()
    assert json.loads(out.read_text()) == [{"id": "1"}]
    with open_writer(tmp_path / "y.json") as late:
        (tmp_path / "y.json").write_text("mine")
        with pytest.raises(LlavaError, match="is not replaced"):
            late.finish()
    assert (tmp_path / "y.json").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "y.json"]


def test_a_manifest_is_there_before_its_file_and_belongs_to_one(raw, tmp_path, monkeypatch):
    made = read_recipe(str(recipe(tmp_path, '[[set]]\nsource = "gqa"\n')), raw)
    out = tmp_path / "m.json"
    with monkeypatch.context() as patch:
        patch.setattr("os.link", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build(made, out, quiet=True)
    assert manifest_of(out).exists()
    assert not out.exists()
    build(made, out, quiet=True)
    assert manifest_of(out) != manifest_of(tmp_path / "m.jsonl")
    with pytest.raises(LlavaError, match=r"m\.manifest\.json is there already"):
        build(made, tmp_path / "m", quiet=True)


def test_what_was_built_is_packed_only_while_it_is_what_it_was(raw, tmp_path):
    made = read_recipe(str(recipe(tmp_path, '[[set]]\nsource = "gqa"\n')), tmp_path)
    shutil.copytree(raw / "gqa", tmp_path / "gqa")
    out = tmp_path / "m.json"
    build(made, out, quiet=True)
    assert _is_built(out, made)
    out.write_text(out.read_text() + " ")
    with pytest.raises(LlavaError, match="with a file that was changed since"):
        _is_built(out, made)
    file = tmp_path / "gqa" / "train_balanced_questions.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(LlavaError, match="with other sets or input files and a file that"):
        _is_built(out, made)
    manifest_of(out).unlink()
    with pytest.raises(LlavaError, match="with no m.manifest.json"):
        _is_built(out, made)


def test_a_set_that_gives_nothing(raw, tmp_path):
    mine = recipe(tmp_path, '[[set]]\nsource = "ocrvqa"\nweight = 0.001\n')
    with pytest.raises(SampleError, match="ocrvqa: no record is taken of it"):
        build(read_recipe(str(mine), raw), tmp_path / "x.json", quiet=True)
    skips = own_set("kind: str = ''", "self.skipped['too short'] += 2", "yield from ()")
    (tmp_path / "pets.py").write_text(skips)
    for part in ("weight = 1", "weight = 2.5", "count = 3"):
        mine = recipe(tmp_path, f'[[set]]\nsource = "pets.py"\n{part}\n')
        with pytest.raises(SampleError, match="pets: no record is taken of it: 2 left out: too sh"):
            build(read_recipe(str(mine), raw), tmp_path / "x.json", quiet=True)


def test_pictures_of_a_json_are_not_asked_for(raw, tmp_path, capsys):
    words = ["data", "build", "stage2", "--raw", str(raw), "--out", str(tmp_path / "x.json")]
    assert main([*words, "--images", str(tmp_path)]) == 2
    assert "--images is of --format arrayrecord" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_picture_inside_of_a_record_is_kept_whole(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    path = saver(tmp_path / "in")(buffer.getvalue())
    (tmp_path / path).write_bytes(b"junk")
    with pytest.raises(SampleError, match="is not the picture that its name is a digest of"):
        saver(tmp_path / "in")(buffer.getvalue())


def test_more_than_there_are(raw, tmp_path):
    mine = recipe(tmp_path, '[[set]]\nsource = "ocrvqa"\ncount = 9\n')
    with pytest.raises(SampleError, match="ocrvqa: there are 8 records, fewer than count 9"):
        build(read_recipe(str(mine), raw), tmp_path / "x.json", quiet=True)


def test_packed_into_shards(raw, tmp_path, capsys):
    pytest.importorskip("array_record")
    pytest.importorskip("tensorflow_datasets")
    images = tmp_path / "images" / "coco" / "train2017"
    images.mkdir(parents=True)
    for n in range(4):
        Image.new("RGB", (8, 8)).save(images / f"{n:012d}.jpg")
    out = tmp_path / "packed"
    words = ["data", "build", "stage2", "--raw", str(raw), "--only", "llava_instruct"]
    words += ["--format", "arrayrecord", "--images", str(tmp_path / "images"), "--out", str(out)]
    assert main(words) == 0
    assert "4 records in 1 shards" in capsys.readouterr().out
    assert main(words) == 0  # again: what is there stays
    data = open_data({"path": str(out)}, say=False)
    assert [data.records[i] for i in range(4)] == json.loads((tmp_path / "packed.json").read_text())


@pytest.mark.slow  # quick: the same rules on small files, in test_sources.py
def test_counts_at_the_real_sizes(tmp_path):
    owners.vqa(tmp_path / "vqav2", owners.VQAV2, 82_783, 443_757)
    owners.gqa(tmp_path / "gqa", 72_140, 943_000)
    owners.vqa(tmp_path / "okvqa", owners.OKVQA, 8_998, 9_009)
    owners.ocrvqa(tmp_path / "ocrvqa", 207_572, 166_022)
    owners.aokvqa(tmp_path / "aokvqa", 16_540, 17_056)
    owners.textcaps(tmp_path / "textcaps", 21_953)
    owners.refcoco(tmp_path / "refcoco", 16_995, 2)
    owners.visual_genome(tmp_path / "visual_genome", 108_077, 50)
    exact = ("vqav2", "gqa", "okvqa", "ocrvqa", "aokvqa", "textcaps")
    text = shipped()["stage2"].read_text()
    text = text.replace('"refcoco"', '"refcoco"\nrefs = ["refcoco"]')
    sets = (*exact, "refcoco", "visual_genome")
    made = read_recipe(str(recipe(tmp_path, text)), tmp_path, sets)
    manifest = build(made, tmp_path / "mix.json", quiet=True)
    print(report(manifest), f"\npeak {manifest['peak_mb']} MB")
    counts = {row["source"]: row["records"] for row in manifest["sets"]}
    assert all(row["records"] == row["published"] for row in manifest["sets"][:6])
    assert counts["refcoco"] == 16_994  # six sentences of each picture: one conversation
    assert counts["visual_genome"] == 108_077
    assert manifest["peak_mb"] < 2_500
