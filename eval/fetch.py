"""Gets a benchmark's files from their owners, checked by hash and remembered.

pooch downloads and checks; ours is what it lacks: hashes are ours to give only where the file is
fixed in a public repository, so any other file's hash is noted in fetched.json when it first
arrives, and a file that differs later is refused (pooch would silently download it again).
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_jax.errors import LlavaError
from llava_jax.eval.task import get_task
from llava_jax.util import need, read_object, write_json

RECORD = "fetched.json"
_GITHUB = "https://raw.githubusercontent.com"
_POPE = f"{_GITHUB}/AoiDragon/POPE/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
_LLAVA = f"{_GITHUB}/haotian-liu/LLaVA/c121f0432da27facab705978f83c4ada465e46fd"
_SQA = f"{_GITHUB}/lupantech/ScienceQA/2cbf8318e07b9ece895bb2ae605e71e38d623264/data/scienceqa"
_MMBENCH = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
_GQA = "https://downloads.cs.stanford.edu/nlp/data/gqa"
_HUB = "https://huggingface.co/datasets"
_COCO = "http://images.cocodataset.org"


_WILD = f"{_HUB}/{{org}}/llava-bench-in-the-wild/resolve/main"
_SEED = f"{_HUB}/{{org}}/SEED-Bench/resolve/main"
_TABLES = f"{_LLAVA}/llava/eval/table"
_QA90 = f"{_LLAVA}/playground/data/coco2014_val_qa_eval"

# Addresses; {org} is the hub organisation.
FILES: dict[str, tuple[str, ...]] = {
    "vqav2": (
        f"{_VQA}/v2_Questions_Val_mscoco.zip",
        f"{_VQA}/v2_Annotations_Val_mscoco.zip",
        f"{_VQA}/v2_Questions_Test_mscoco.zip",
    ),
    "gqa": (f"{_GQA}/questions1.2.zip",),
    "vizwiz": (f"{_VIZWIZ}/vqa_data/Annotations.zip",),
    "scienceqa": (f"{_SQA}/problems.json", f"{_SQA}/pid_splits.json"),
    "textvqa": (
        f"{_TEXTVQA}/data/TextVQA_0.5.1_val.json",
        f"{_TEXTVQA}/data/TextVQA_Rosetta_OCR_v0.2_val.json",
    ),
    "pope": tuple(f"{_POPE}/coco_pope_{s}.json" for s in ("random", "popular", "adversarial")),
    "mmbench": (f"{_MMBENCH}/mmbench_dev_20230712.tsv",),
    "mmbench_cn": (f"{_MMBENCH}/mmbench_dev_cn_20231003.tsv",),
    "seed": (f"{_SEED}/SEED-Bench.json",),
    "llava_wild": (
        f"{_WILD}/questions.jsonl",
        f"{_WILD}/context.jsonl",
        f"{_WILD}/answers_gpt4.jsonl",
        f"{_TABLES}/rule.json",
    ),
    "mmvet": ("https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",),
    "coco30": (
        f"{_QA90}/qa90_questions.jsonl",
        f"{_QA90}/qa90_gpt4_answer.jsonl",
        f"{_TABLES}/caps_boxes_coco2014_val_80.jsonl",
        f"{_TABLES}/rule.json",
    ),
    "chair": (
        f"{_GITHUB}/LisaAnne/Hallucination/master/data/synonyms.txt",
        f"{_COCO}/annotations/annotations_trainval2014.zip",
    ),
}
# Large, and only on request.
IMAGES: dict[str, tuple[str, ...]] = {
    "vqav2": (f"{_COCO}/zips/test2015.zip",),
    "gqa": (f"{_GQA}/images.zip",),
    "vizwiz": (f"{_VIZWIZ}/images/val.zip", f"{_VIZWIZ}/images/test.zip"),
    "scienceqa": ("https://scienceqa.s3.us-west-1.amazonaws.com/images/test.zip",),
    "textvqa": (f"{_TEXTVQA}/images/train_val_images.zip",),
    "pope": (f"{_COCO}/zips/val2014.zip",),
    "seed": (f"{_SEED}/SEED-Bench-image.zip",),
    "llava_wild": tuple(f"{_WILD}/images/{n:03d}.jpg" for n in range(1, 25)),
    "chair": (f"{_COCO}/zips/val2014.zip",),
}
# Of the files that are fixed in a public repository.
SHA256 = {
    "rule.json": "dd7345a44ce9f7a24e51a30ee030cdab32346f9d08e3359c80545ff1312b1e07",
    "pid_splits.json": "85c7820b9f136e572579a01dab2c77a7f8140b59211e421fa5182491d45ee3a7",
    "coco_pope_random.json": "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35",
    "coco_pope_popular.json": "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc",
    "coco_pope_adversarial.json": "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
    "qa90_questions.jsonl": "2a77196696b5602b544244ace9aeac21300513be85b5e53eb2414d00cddbe1c7",
    "qa90_gpt4_answer.jsonl": "5fd1a760483fb54e62a717a406add8a986f3e03a40d037b5d6515828cc90dbc5",
    "caps_boxes_coco2014_val_80.jsonl": (
        "818d3df2b52784699bbdc129b6bc68e035d78ff8f5093c3e2ce5e0f726549b15"
    ),
}
# Owners' organisations on the hub, where --org names no other.
ORGS = {"seed": "AILab-CVPR", "llava_wild": "liuhaotian"}
BY_HAND = {
    "mme": "its images are given out by its authors on request (BradyFU/Awesome-Multimodal-Large-"
    "Language-Models); put MME_Benchmark_release_version into the data folder",
    "refcoco": "get refs(unc).p and instances.json from lichengunc/refer and put them into the folder",
}
# Sets whose owners keep them in one repository of the hub, or (last) elsewhere.
BY_HAND |= {
    name: f"get it with: hf download --repo-type dataset {repository} --local-dir DATA/{name}"
    for name, repository in {
        "mmstar": "Lin-Chen/MMStar",
        "mmmu": "MMMU/MMMU",
        "mmvp": "MMVP/MMVP",
        "cvbench": "nyu-visionx/CV-Bench",
        "realworldqa": "xai-org/RealworldQA",
        "naturalbench": "BaiqiL/NaturalBench",
        "ocrbench": "echo840/OCRBench",
        "chartqa": "lmms-lab/ChartQA",
        "docvqa": "lmms-lab/DocVQA",
        "infovqa": "lmms-lab/DocVQA",
        "ai2d": "lmms-lab/ai2d",
        "blink": "BLINK-Benchmark/BLINK",
        "mathvista": "AI4Math/MathVista",
    }.items()
}
BY_HAND["hallusion"] = "get HallusionBench.json and its images from tianyi-lab/HallusionBench"


def fetch(task: str, out: Path, *, org: str | None = None, images: bool = False) -> Iterator[Path]:
    """Downloads what a benchmark needs into `out` and unpacks archives; yields each path.

    Args:
      org: hub organisation, where files come from the hub; by default their owner's.
      images: image archives too (gigabytes).
    Raises:
      LlavaError: no network, a gated or vanished file, another hash, or a set that is only given
        out by hand.
    """
    name = get_task(task).name
    if name in BY_HAND:
        raise LlavaError(f"{name}: cannot be downloaded: {BY_HAND[name]}")
    out.mkdir(parents=True, exist_ok=True)
    owner = org or ORGS.get(name, "")
    for url in (*FILES[name], *(IMAGES.get(name, ()) if images else ())):
        yield _get(url.format(org=owner), out)


def _get(url: str, out: Path) -> Path:
    pooch = need("pooch", "to fetch a benchmark's files", "llava_jax[eval]")
    path, record = out / url.rsplit("/", 1)[-1], out / RECORD
    known = read_object(record) if record.exists() else {}
    wanted = SHA256.get(path.name) or known.get(path.name, {}).get("sha256")
    if not path.exists():
        _download(pooch, url, path, wanted)
        digest = pooch.file_hash(str(path))
        known[path.name] = {"url": url, "sha256": digest, "bytes": path.stat().st_size}
        write_json(record, known, indent=1)
    elif wanted and (digest := pooch.file_hash(str(path))) != wanted:
        raise LlavaError(
            f"{path}: has hash {digest[:12]}…, not {wanted[:12]}…", fix="remove it and fetch again"
        )
    if path.suffix == ".zip":
        _unpack(path, out)
    return path


def _download(pooch: Any, url: str, path: Path, sha256: str | None) -> None:
    """Writes `path` once the whole file is there and has the hash, if one is known."""
    from requests import exceptions

    by_hand = f"or download {url} elsewhere and put it into {path.parent}"
    pooch.get_logger().setLevel("WARNING")
    download = pooch.HTTPDownloader(timeout=60)
    try:
        pooch.retrieve(url, sha256, fname=path.name, path=path.parent, downloader=download)
    except exceptions.HTTPError as e:
        code = e.response.status_code if e.response is not None else 0
        words, fix = f"HTTP {code}", "try --org"
        if code in (401, 403):
            words, fix = f"is gated ({words})", "ask for access"
        raise LlavaError(f"{url}: {words}", fix=f"{fix}, {by_hand}") from None
    except exceptions.ChunkedEncodingError:
        raise LlavaError(f"{url}: the connection ended early", fix="fetch again") from None
    except exceptions.RequestException as e:
        reason = str(getattr(e.args[0], "reason", e) if e.args else e).rpartition(": ")[2]
        words = f"{urlsplit(url).netloc} cannot be reached ({reason})"
        raise LlavaError(words, fix=f"go online, {by_hand}") from None
    except ValueError:  # pooch's, of the hash
        words = f"{url}: the file has another hash than {str(sha256)[:12]}…"
        raise LlavaError(words, fix="fetch again; or the owner changed it") from None


def _unpack(path: Path, out: Path) -> None:
    """Unpacks what is not there yet. Ours and not pooch's: a member outside `out` is an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                target = (out / member.filename).resolve()
                if not target.is_relative_to(out.resolve()):
                    raise LlavaError(f"{path}: holds a file outside itself: {member.filename!r}")
                if not member.is_dir() and not target.exists():
                    archive.extract(member, out)
    except zipfile.BadZipFile:
        raise LlavaError(f"{path}: is not a zip archive", fix="remove it and fetch again") from None
