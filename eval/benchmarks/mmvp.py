"""MMVP: 150 pairs of pictures that CLIP takes for the same; a pair counts if both answers are right.

The owner (tsb0601/MMVP) has GPT-4 compare; read here as lmms-eval@75571cf tasks/mmvp/utils.py does: the
letter alone or at the start, else "answer is X", "option X", else any a or b that ends a word ("the
sofa" is A), else the first character. Pairs are rows 1 and 2, 3 and 4, ….
"""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.simple import Item, SimpleTask, choices, groups_right
from llava_jax.eval.task import percent

_OPTIONS = re.compile(r"\s*\(a\)\s*(.+?)\s*\(b\)\s*(.+?)\s*", re.IGNORECASE | re.DOTALL)
_ONE = r"\(?([AB])\)?"
_FORMS = (rf"^\s*{_ONE}\.?\s*$", rf"^\s*{_ONE}[.\s]", rf"answer\s+is\s+{_ONE}", rf"option\s+{_ONE}",
          rf"{_ONE}(?:\s|$)")  # fmt: skip


class MMVP(SimpleTask):
    name = "mmvp"
    headline = "pair_accuracy"
    data_files = 'Questions.csv and "MMVP Images/1.jpg", … of MMVP/MMVP'
    files = ("Questions.csv", "*.csv", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        index = int(row.get("Index") or row["lndex"])  # the owner's header has an l
        if (found := _OPTIONS.fullmatch(row["Options"])) is None:
            raise ValueError(f"the options {row['Options']!r} are not (a) and (b)")
        options = (found[1], found[2])
        truth = truths.option(row["Correct Answer"], options)
        image = row.get("image") or f"MMVP Images/{index}.jpg"
        asked = choices(row["Question"], options)
        return Item(str(index), asked, truth, (image,), options, group=str((index - 1) // 2))

    def lacks(self, data, settings, items):
        halves = sum(n != 2 for n in Counter(i.group for i in items).values())
        half = f"{halves} of the pairs lack a question" if halves else ""
        return "; ".join(filter(None, (super().lacks(data, settings, items), half)))

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        said = text.strip()
        found = next((m for p in _FORMS if (m := re.search(p, said, re.IGNORECASE))), None)
        first = said[:1].upper()
        read = found[1].upper() if found else first if first in ("A", "B") else "Z"
        return float(read == item.truth), read

    def result(self, items, samples, result):
        return pairs_first(self, items, samples, result)


def pairs_first(task: SimpleTask, items: list[Item], samples: dict, result):
    """A result whose samples are the groups: right where every answer of the group is."""
    right = groups_right(samples)
    result.totals[task.headline] = percent(map(float, right.values()))
    result.totals["accuracy"] = percent(s.score for s in samples.values())
    result.totals["groups"] = len(right)
    missing, merged = set(result.coverage.missing), {}
    for group, is_right in right.items():
        rows = {i.key: samples[i.key] for i in items if i.group == group}
        every = [*rows.values()]
        parts = {k: {"score": s.score, "missing": k in missing} for k, s in rows.items()}
        said, truth = " | ".join(s.answer for s in every), [s.truth for s in every]
        merged[group] = replace(
            every[0], score=float(is_right), answer=said, truth=truth,
            parsed=[s.parsed for s in every], details={"rows": parts},
        )  # fmt: skip
    result.samples = merged
    return result
