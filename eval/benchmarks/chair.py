"""CHAIR: which COCO objects a caption names that are not in the image (lower is better).

Not in the LLaVA-1.5 paper. Scorer: LisaAnne/Hallucination utils/chair.py. Objects of an image are
those of its masks and of its human captions. Words are singularised by pattern's rules (as textblob
ships them) after NLTK's word tokenizer, and looked up in the owner's synonyms.txt.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import join
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, find, find_optional, read_checked
from llava_jax.eval.questions import Question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, percent
from llava_jax.util import need, read_json, read_text

PROMPT = "Please describe this image in detail."
# Two words that are one object.
_PAIRS = (
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,"
    "fire hydrant,stop sign,parking meter,suit case,sports ball,baseball bat,baseball glove,"
    "tennis racket,wine glass,hot dog,cell phone,mobile phone,teddy bear,hair drier,potted plant,"
    "bow tie,laptop computer,stove top oven,home plate"
).split(",")
_ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()


class Chair(Task):
    name = "chair"
    headline = "CHAIRs"
    unit_note = "rates are in percent, lower is better"
    max_new_tokens = 512
    takes_split = True
    data_files = "synonyms.txt and instances_*2014.json + captions_*2014.json (or samples.json)"
    id_keys = ("image_id", "question_id")
    text_keys = ("caption", "text")
    answers_in = "imgToEval"  # of the owner's own caption files

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        path = find(data, ("instances_*2014.json",), "instances file", settings.split)
        images = {image["id"]: image["file_name"] for image in read_json(path, DataError)["images"]}
        record = {"prompt": PROMPT}
        return [Question(str(i), PROMPT, (n,), {"image_id": i} | record) for i, n in images.items()]

    def check_packages(self, data: Path, settings: TaskSettings) -> None:
        _tokenizer()
        _inflections()

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        words = ObjectWords(find(data, ("synonyms.txt",), "synonyms file"))
        given = self.read(answers, settings)
        truth = _objects({a.id for a in given.rows}, data, words, settings)
        listed = find_optional(data, ("samples.json",), "samples file") is not None
        end = "" if listed else "captions are made for a sample of the images"
        joined, coverage = join(truth, given, leaves_out=True, open_end=end, strict=settings.strict)
        samples = {}
        for key, answer in joined.items():
            named = words.objects(answer.text)
            wrong = [w for w in named if w not in truth[key]]
            details = {"generated": named, "hallucinated": wrong}
            objects, right = sorted(truth[key]), float(not wrong)
            samples[key] = Sample(right, answer.text, objects, named, "", key, details=details)
        every = [s.details for s in samples.values()]
        named = sum(len(d["generated"]) for d in every)
        wrong = sum(len(d["hallucinated"]) for d in every)
        totals = {"CHAIRs": percent(bool(d["hallucinated"]) for d in every)}
        totals["CHAIRi"] = 100 * wrong / named if named else 0.0
        totals |= {"objects": named, "captions": len(samples)}
        notes = ["CHAIRs and CHAIRi are over the captions given; lower is better"]
        return Result(self, totals, samples, coverage, notes=notes)


def _objects(
    wanted: set[str], data: Path, words: "ObjectWords", settings: TaskSettings
) -> dict[str, set[str]]:
    """Image id -> objects in it, of the images `wanted`."""
    instances = find_optional(data, ("instances_*2014.json",), "instances file", settings.split)
    if instances is None:
        path = find(data, ("samples.json",), "instances file")
        rows = read_checked(path, {"image_id": ID, "gt_objects": list})
        return {str(r["image_id"]): set(r["gt_objects"]) for r in rows}
    captions = find(data, ("captions_*2014.json",), "captions file", settings.split)
    meta = read_json(instances, DataError)
    objects = {str(i["id"]): set() for i in meta["images"] if str(i["id"]) in wanted}
    names = {c["id"]: words.object_of[c["name"]] for c in meta["categories"]}
    for row in (*meta["annotations"], *read_json(captions, DataError)["annotations"]):
        if (found := objects.get(str(row["image_id"]))) is not None:
            mask = "category_id" in row
            found.update([names[row["category_id"]]] if mask else words.objects(row["caption"]))
    return objects


class ObjectWords:
    """The COCO objects that words name, by the owner's synonym list and special cases.

    synonyms: synonyms.txt, a line per object: its name, then its other names, by ", ".
    """

    def __init__(self, synonyms: Path):
        self.object_of: dict[str, str] = {}
        for line in read_text(synonyms, DataError).splitlines():
            names = line.strip().split(", ")
            self.object_of |= dict.fromkeys(names, names[0])  # of two lines the later wins
        pairs = {p: p for p in _PAIRS}
        # A baby or adult animal and a passenger train are not persons.
        pairs |= {f"{age} {a}": a for a in _ANIMALS for age in ("baby", "adult")}
        pairs |= {f"passenger {v}": v for v in ("jet", "train")}
        # "glas" is what the singular rule makes of "glass".
        self.pairs = pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}

    def objects(self, caption: str) -> list[str]:
        """The objects a caption names, in order, with repetitions."""
        words = [_singular(w) for w in _tokenizer().NLTKWordTokenizer().tokenize(caption.lower())]
        merged, i = [], 0
        while i < len(words):
            pair = " ".join(words[i : i + 2])
            merged.append(self.pairs.get(pair, words[i]))
            i += 2 if pair in self.pairs else 1
        if "toilet" in merged:
            merged = [w for w in merged if w != "seat"]
        return [self.object_of[w] for w in merged if w in self.object_of]


@lru_cache(maxsize=1 << 16)
def _singular(word: str) -> str:
    return _inflections().singularize(word)


def _tokenizer() -> Any:
    return need("nltk.tokenize.destructive", "to score CHAIR", "llava_jax[chair]")


def _inflections() -> Any:
    return need("textblob.en.inflect", "to score CHAIR", "llava_jax[chair]")
