"""What stands in for the weights, data and sites that documents name: small, and made on the spot."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from examples.benchmark_sets import write_sets
from llava_jax.convert import Target, convert, save_checkpoint
from llava_jax.eval.judge.endpoint import JudgeReply
from llava_jax.eval.task import get_task
from llava_jax.quickstart.dataset import make_dataset
from tests.convert import tiny

TOWER = "openai/clip-vit-large-patch14-336"
# Repositories of the hub that the documents name -> the kind of model that stands in.
HUB = {
    "llava-hf/llava-1.5-7b-hf": "hf",
    "llava-hf/llava-1.5-13b-hf": "hf",
    "liuhaotian/llava-v1.5-7b": "original",
    "liuhaotian/llava-v1.5-13b": "original",
    "lmsys/vicuna-7b-v1.5": "vicuna",
    "lmsys/vicuna-13b-v1.5": "vicuna",
    TOWER: "clip",
}
# Names of folders in the documents that no earlier line of the page makes; any other is "jax".
FOLDERS = {
    "my-llava-hf": "hf",
    "hf-folder": "hf",
    "lora": "lora",
    "adapter": "peft",
    "stage1": "projector",
    "vicuna": "vicuna",
    "llama": "vicuna",
    "clip": "clip",
    "delta": "delta",
}
CONFIG = tiny.TEXT
END = 2  # </s>
PICTURES = 60  # of a data set: enough that a twentieth is some


class Models:
    """Small checkpoints of every kind with the same weights, each made once, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = tiny.tokenizer(folder / "tokenizer", CONFIG.language.vocab_size)

    def of(self, kind: str) -> Path:
        path = self.folder / kind
        if not path.exists():
            self._make(kind, path)
        return path

    def _make(self, kind: str, path: Path) -> None:
        match kind:
            case "jax":
                made = tiny.checkpoint(CONFIG, tokenizer=self.tokenizer)
                made.params["language.head.kernel"][:, END] *= 5  # so that answers end soon
                save_checkpoint(made, path)
            case "jax_lora":
                tiny.save(path, "jax", tiny.lora(CONFIG), tokenizer=self.tokenizer)
            case "peft":
                convert(self.of("jax_lora"), path, Target("peft"))
            case "lora" | "projector":
                convert(self.of("jax_lora" if kind == "lora" else "jax"), path, Target(kind))
                change_config(path, mm_vision_tower=TOWER)
            case "vicuna":
                tiny.language_model(path, CONFIG)
                shutil.copytree(self.tokenizer, path, dirs_exist_ok=True)
            case "clip":
                tiny.clip(path, CONFIG)
            case "original":  # as published: its tower is a repository of its own
                convert(self.of("jax"), path, Target("original", tower="none"))
                change_config(path, mm_vision_tower=TOWER)
            case "delta":
                save_delta(path)
            case _:
                convert(self.of("jax"), path, Target(kind))

    def fill_hub_cache(self, cache: Path) -> None:
        """The hub's own cache layout, as if everything had been downloaded before."""
        for repository, kind in HUB.items():
            place = cache / f"models--{repository.replace('/', '--')}"
            (place / "refs").mkdir(parents=True)
            (place / "refs" / "main").write_text("0" * 40)
            shutil.copytree(self.of(kind), place / "snapshots" / ("0" * 40))


def save_delta(path: Path) -> None:
    """Another model minus the language model that stands in for "llama"."""
    base, target = tiny.random_params(CONFIG), tiny.random_params(CONFIG, seed=8)
    target["language.norm.scale"] = base["language.norm.scale"] + 0.01
    made = tiny.checkpoint(CONFIG)
    made.params = {n: v - base[n] if n.startswith("language.") else v for n, v in target.items()}
    save_checkpoint(made, path, to="original")


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Data ---------------------------------------------------------------------------------------------


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def image_folder(path: Path) -> None:
    for i in range(PICTURES):
        picture(path / f"{i}.png", i)


def records(path: Path, captions: bool = False) -> None:
    """LLaVA JSON (or JSON lines) of two samples per picture; without `captions` every sixth has no picture."""
    rows = []
    for i in range(2 * PICTURES):
        turns = [("What is this?", "a red disc"), ("Is it on the left?", f"yes, {i}")]
        row = {"id": f"s{i}", "conversations": []}
        if captions or i % 6:
            row["image"] = f"{i % PICTURES}.png"
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        for who_says in turns[:1] if captions else turns:
            for who, said in zip(("human", "gpt"), who_says, strict=True):
                row["conversations"].append({"from": who, "value": said})
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


def made_set(path: Path) -> None:
    """The folder of configs/quickstart.py and configs/easy_vqa.py."""
    make_dataset(path, train=96, held_out=4)


# Benchmarks ---------------------------------------------------------------------------------------

TEXTVQA = {
    "data": [
        {
            "question_id": i,
            "image_id": f"t{i}",
            "question": "what is written?",
            "answers": ["red"] * 10,
            "ocr_tokens": ["red"],
        }
        for i in range(4)
    ]
}
MMVET = {
    f"v1_{i}": {
        "imagename": f"m{i}.png",
        "question": "what is it?",
        "answer": "a disc",
        "capability": ["rec"],
    }
    for i in range(3)
}


def benchmark(folder: Path, task: str) -> None:
    """The owner's files of one benchmark, small, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if task == "textvqa":
        (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(TEXTVQA))
        (folder / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps(TEXTVQA))
    elif task == "mmvet":
        (folder / "mm-vet.json").write_text(json.dumps(MMVET))
        for row in MMVET.values():
            picture(folder / "images" / row["imagename"])
    else:
        made = folder.parent / ".scenes"
        write_sets(made, 4)
        shutil.copytree(made / task, folder, dirs_exist_ok=True)
        shutil.rmtree(made)


def answers(path: Path, task: str, data: Path) -> None:
    """Somebody's answer file: the same word to every question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [q.record | {"text": "yes"} for q in get_task(task).questions(data)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judge(endpoint, body: dict) -> JudgeReply:
    """In place of Endpoint._post, which asks a judge."""
    assert body["messages"]
    return JudgeReply("0.5", "judge")


def download(pooch, url: str, path: Path, sha256: str | None) -> None:
    """In place of eval.fetch._download: the file of a benchmark."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train_images/t0.jpg", b"")
    elif re.search(r"TextVQA.*\.json$", url):
        path.write_text(json.dumps(TEXTVQA))
    else:
        raise AssertionError(f"no stand-in for {url}")
