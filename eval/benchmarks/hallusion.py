"""HallusionBench (1,129 yes-or-no questions on pictures and the same pictures changed).

Owner's numbers: tianyi-lab/HallusionBench@744007c utils.py. aAcc: questions right; qAcc: a question right on all
its pictures; fAcc: all questions of a picture right (VS without a picture left out). Without a picture
(VS, figure 0) not knowing is right too. The owner has GPT-4 read the answers; here the first of the
words yes and no is read, as VLMEvalKit@e8e78f0 does before it asks a model, and neither is
"uncertain".
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.normalize import plain_words
from llava_jax.eval.questions import SHORT
from llava_jax.eval.simple import Item, SimpleTask, groups_right
from llava_jax.eval.task import percent


class HallusionBench(SimpleTask):
    name = "hallusion"
    headline = "aAcc"
    data_files = "HallusionBench.json and its images (VD/…, VS/…)"
    files = ("HallusionBench.json", "*.json", "*.jsonl", "*.parquet")

    def item(self, row: dict[str, Any], number: int) -> Item:
        names = ("category", "subcategory", "set_id", "figure_id", "question_id")
        category, part, group, figure, question = (str(row[n]) for n in names)
        image = row.get("image") or str(row.get("filename") or "").removeprefix("./")
        shown = str(row.get("visual_input", "1")) != "0"
        truth, images = truths.yes_no(row["gt_answer"]), (image,) if shown else ()
        place = f"{category}_{part}_{group}"
        groups = {"category": category, "subcategory": part}
        groups |= {"question": f"{place}_{question}", "figure": f"{place}_{figure}"}
        key = f"{place}_{figure}_{question}"
        return Item(key, row["question"] + SHORT, truth, images, groups=groups)

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        found = {"yes", "no"}.intersection(plain_words(text))
        read = found.pop() if len(found) == 1 else "other"
        unseen = item.groups["category"] == "VS" and item.groups["figure"].endswith("_0")
        return float(read == item.truth or (unseen and read == "other")), read

    def result(self, items, samples, result):
        result = super().result(items, samples, result)
        for name, kind in (("qAcc", "question"), ("fAcc", "figure")):
            del result.tables[f"per {kind}"]
            right = groups_right(samples, kind)
            if kind == "figure":
                unseen = [k for k in right if k.startswith("VS_") and k.endswith("_0")]
                right = {k: x for k, x in right.items() if k not in unseen}
            result.totals[name] = percent(map(float, right.values()))
        return result
