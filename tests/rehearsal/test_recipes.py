"""Both stages on the mixture, by the documented commands, then everything a user does with the model.

Only model, paths, batch and number of steps differ from the recipes.
"""

import json
import math
from pathlib import Path

import pytest

from tests.rehearsal.command import ROOT, losses, metrics, ok, refused, report, run, train_words

ONES_OWN_COMMAND = {"easy_vqa", "quickstart"}  # rehearsed in test_own_commands.py
STAGES = {
    "pretrain": ("captions", "vicuna"),
    "finetune": ("instruct", "hugging_face"),
    "finetune_lora": ("instruct", "original"),
    "finetune_task": ("instruct", "hugging_face"),
    "finetune_task_lora": ("instruct", "original"),
    "finetune_qlora": ("instruct", "original"),
    "v1_pretrain": ("captions", "vicuna"),
}
KINDS = (
    "finetune_qlora_7b",
    "v1_pretrain_7b",
)  # of configs/variants.py; the others differ in numbers
ELSEWHERE = {"pretrain_7b", "finetune_7b", "finetune_lora_7b", "finetune_task_lora_7b", KINDS[0]}
# The first two are stage1 and stage2 below, the next test_interrupted.py and README.md's line; the last:
# tests/train/test_loop.py::test_qlora_leaves_the_base_to_the_bit_and_exports_the_moving_average.


def _recipe(name: str):
    """A parameter; slow where another test of these folders runs the same commands."""
    again = (
        name in ELSEWHERE or name.endswith("_13b") or name == "finetune_task_7b"
    )  # of tiny models: like finetune_7b
    return pytest.param(name, marks=pytest.mark.slow) if again else name


RECIPES = [
    _recipe(path.stem)
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in {"__init__", "common", "variants", *ONES_OWN_COMMAND}
]


def check(workdir: Path, part: dict) -> None:
    """Every record of a part of the mixture is accounted for after an epoch; losses are finite."""
    rows, told = metrics(workdir), report(workdir)
    assert all(math.isfinite(row["loss"]) and row["ok"] for row in rows)
    reasons = {row["index"]: row["reason"] for row in told["bad"]}
    assert sorted(reasons) == [row["index"] for row in part["bad"]]
    for row in part["bad"]:
        assert row["why"] in reasons[row["index"]], row
    ids = {row["index"]: row["id"] for row in told["bad"]}
    assert ids == {row["index"]: row["id"] for row in part["bad"]}
    assert told["bad_count"] == len(part["bad"])
    assert told["records"] == part["records"]
    assert told["seen"] == told["given"] == told["samples"], "once each, and none lost"
    malformed = told["records"] - told["samples"]
    assert malformed + told["replaced"] + told["empty"] == told["bad_count"]
    assert sum(row["samples"] for row in rows) == told["given"]
    for note, count in part["notes"].items():
        assert told["notes"].get(note) == count, (note, told["notes"])
    assert told["cut"] == len(part["long"])


@pytest.fixture(scope="module")
def stage1(mix, model, tmp_path_factory) -> Path:
    """The workdir of pretrain_7b over one epoch, from folders as the hub has them."""
    workdir = tmp_path_factory.mktemp("stage1") / "pretrain_7b"
    pytest.importorskip("torch")
    settings = {
        "model.init": model("vicuna", pickled=True),
        "model.vision_tower": model("clip", pickled=True),
        "model.allow_pickle": True,
        "batch_size": 32,
        **mix.settings("captions"),
    }
    ok(*train_words("configs/pretrain_7b.py", workdir, settings))
    return workdir


@pytest.fixture(scope="module")
def stage2(mix, stage1, tmp_path_factory) -> Path:
    """The workdir of finetune_7b over one epoch, from stage 1's export."""
    workdir = tmp_path_factory.mktemp("stage2") / "finetune_7b"
    settings = {
        "model.init": stage1 / "export",
        "batch_size": 16,
        **mix.settings("instruct"),
    }
    ok(*train_words("configs/finetune_7b.py", workdir, settings))
    return workdir


def test_pickles_are_read_only_when_allowed(mix, model, tmp_path):
    pytest.importorskip("torch")
    settings = {
        "model.init": model("vicuna", pickled=True),
        "model.vision_tower": model("clip", pickled=True),
        **mix.settings("captions"),
    }
    done = run(*train_words("pretrain_7b", tmp_path, settings))
    refused(done, "vicuna", "pickle", "--config.model.allow_pickle=True")


def test_stage_1_accounts_for_every_record(stage1, mix):
    check(stage1, mix.manifest["captions"])
    assert losses(stage1)[-1] < losses(stage1)[0]


def test_stage_2_accounts_for_every_record(stage2, mix):
    check(stage2, mix.manifest["instruct"])


@pytest.mark.parametrize("config", [*RECIPES, *map(_recipe, KINDS)])
def test_every_recipe_runs_on_the_mixture(config, mix, model, tmp_path):
    name = config.rpartition("_")[0]
    assert name in STAGES, f"say in STAGES what {config} starts from"
    part, kind = STAGES[name]
    settings = {"model.init": model(kind), "batch_size": 16, "steps": 2, **mix.settings(part)}
    if kind in ("vicuna", "original"):
        settings["model.vision_tower"] = model("clip")
    file = config if config in KINDS else f"configs/{config}.py"
    ok(*train_words(file, tmp_path / config, settings))
    assert len(losses(tmp_path / config)) == 2
    assert all(map(math.isfinite, losses(tmp_path / config)))
    assert (tmp_path / config / "export" / "llava_jax.json").is_file()


# What is done with the model ----------------------------------------------------------------------


QUESTION = "What color is the dog?\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def hf_folder(stage2, tmp_path_factory) -> Path:
    """The export of stage 2, converted and checked as README says."""
    folder = tmp_path_factory.mktemp("hf") / "finetune_7b-hf"
    done = ok("convert", stage2 / "export", folder, "--to", "hf", "--check")
    assert "equal" in done.out + done.err
    return folder


def test_converted_it_is_the_same_model(stage2, hf_folder):
    done = ok("compare", stage2 / "export", hf_folder)
    assert "equal" in done.out


def test_transformers_gives_the_same_answer(hf_folder, stage2, mix):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    import llava_jax

    picture = mix.folder / "images" / "00000" / "000000000.jpg"
    ours = llava_jax.load(stage2 / "export", dtype="float32")
    reply = ours.generate(QUESTION, picture, max_new_tokens=24)

    processor = transformers.AutoProcessor.from_pretrained(hf_folder)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        hf_folder, dtype=torch.float32
    ).eval()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(picture), text=prompt, return_tensors="pt")
    with torch.no_grad():
        ids = theirs.generate(**inputs, max_new_tokens=24, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(reply.ids) == new


def test_it_answers_on_the_command_line(stage2, mix):
    picture = mix.folder / "images" / "00000" / "000000000.jpg"
    done = ok("chat", "--model", stage2 / "export", "--image", picture, "--prompt", QUESTION)
    assert done.out.strip()


@pytest.mark.slow  # quick: tests/documents runs README's line, tests/eval/test_run_model.py the rest
def test_it_is_evaluated(stage2, mix, tmp_path):
    folder = _pope(tmp_path / "benchmarks" / "pope", mix)
    out = tmp_path / "eval"
    ok(
        "eval",
        "--model",
        stage2 / "export",
        "--tasks",
        "pope",
        "--data",
        folder.parent,
        "--out",
        out,
    )
    answers = [p for p in out.rglob("*.jsonl") if p.stat().st_size]
    assert sum(len(p.read_text().splitlines()) for p in answers) >= 8
    assert list(out.rglob("*.json")) or list(out.rglob("*.html"))


def _pope(folder: Path, mix) -> Path:
    """POPE in small: its three splits with questions about pictures of the mixture."""
    images = sorted((mix.folder / "images").rglob("*0000.jpg"))[:4]
    (folder / "val2014").mkdir(parents=True)
    rows = []
    for n, image in enumerate(images):
        (folder / "val2014" / image.name).write_bytes(image.read_bytes())
        for label in ("yes", "no"):
            rows.append(
                {
                    "question_id": len(rows) + 1,
                    "image": image.name,
                    "text": f"Is there a {'dog' if n % 2 else 'cat'} in the image?",
                    "label": label,
                }
            )
    for split in ("random", "popular", "adversarial"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(lines + "\n")
    return folder
