"""Rules that several benchmarks read answers by. Each is named by where it comes from.

A rule takes the answer, the truth and the options' texts, and returns (score from 0 to 1, what it read).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llava_jax.eval.normalize import leave_one_out, one_line, vqa_normalize

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
YES_NO: dict[str, str] = {
    **dict.fromkeys(("yes", "y", "true", "1"), "yes"),
    **dict.fromkeys(("no", "n", "false", "0"), "no"),
}
_SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = r"(?i)(?:correct\s+)?answer\s+is\s+\**([{}])\b"
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)

Rule = Callable[[str, Any, Sequence[str]], tuple[float, Any]]


def _texts(truth: Any) -> list[str]:
    return [str(t) for t in truth] if isinstance(truth, list | tuple) else [str(truth)]


def exact(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """The answer is one of the truths, whatever the case, outer space and a final period."""
    read = text.strip().rstrip(".").lower()
    return float(read in [t.strip().rstrip(".").lower() for t in _texts(truth)]), read


def vqa(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """VQA accuracy (GT-Vision-Lab/VQA vqaEval.py, normalised always): of several annotators each is
    left out in turn; one truth alone is right or wrong."""
    read, *truths = [vqa_normalize(one_line(t)) for t in (text, *_texts(truth))]
    return (leave_one_out(read, truths) if len(truths) > 1 else float(read in truths)), read


def anls(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """Average normalised Levenshtein similarity of DocVQA and InfographicVQA (the servers' rule, as
    QwenLM/Qwen-VL eval_mm/infographicsvqa_eval.py has it at 34b4c0e): the best truth's similarity,
    or 0 below 0.5. Case and runs of white space do not count, but the length divided by is that of the
    longer text as it was given."""
    read = " ".join(text.lower().split())
    shares = []
    for t in _texts(truth):
        length = max(len(t.upper()), len(text.upper()))
        shares.append(levenshtein(" ".join(t.lower().split()), read) / length if length else 0.0)
    best = 1 - min(shares)
    return (best if best >= 0.5 else 0.0), read


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make `b` of `a`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


def relaxed(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """Relaxed accuracy of ChartQA (its paper, section 5.1, as QwenLM/Qwen-VL eval_mm/evaluate_vqa.py
    has it at 34b4c0e): numbers within 5 %, other text equal whatever the case. "12%" is 0.12; a
    truth of 0 must be met letter by letter; "1,000" is no number; nan is never right."""

    def right(t: str) -> bool:
        found, wanted = _float(text), _float(t)
        if found is not None and wanted:
            return abs(found - wanted) / abs(wanted) <= 0.05
        return text.lower() == t.lower()

    return float(any(right(t) for t in _texts(truth))), text


def _float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def letter(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """The option's letter, however many options there are; see read_letter."""
    read = read_letter(text, list(options))
    return float(read == str(truth).strip("() ").upper()), read


def named_letters(text: str, letters: Iterable[str]) -> list[str]:
    """Those of the letters that stand alone among the words."""
    words = text.translate(_SPACED).split()
    return [c for c in letters if c in words]


def read_letter(text: str, options: Sequence[str] | Mapping[str, str]) -> str:
    """The letter of the option that an answer means, or "Z": VLMEvalKit's can_infer
    (vlmeval/utils/matching_util.py) without a model. A letter alone among the words near the end, else
    "answer is X", else the only option whose text the answer holds. options: texts, or letter -> text."""
    named_so = options if isinstance(options, Mapping) else dict(zip(LETTERS, options))
    choices = named_so or dict.fromkeys("ABCD", "")
    if _FAILED not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = text.translate(_SPACED).split()
        named = named_letters(text, choices)
        # Far from the end it may be the article A: then the letter does not settle it.
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and "Z" in words:
            return "Z"
        if stated := re.search(_STATED.format("".join(choices)), text):
            return stated[1].upper()
    low = text.lower()
    if len(low) > 2 * sum(map(len, choices.values())):
        return "Z"
    held = [c for c, o in choices.items() if o and o.lower() in low]
    return held[0] if len(held) == 1 else "Z"


def first_letter(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """The first character after opening brackets and blanks, whatever the case, if it is a letter."""
    found = re.match(r"[(\s]*([A-Z])", text.strip(), re.IGNORECASE)
    read = found[1].upper() if found else "Z"
    return float(read == truth), read


def yes_no(text: str, truth: Any, options: Sequence[str] = ()) -> tuple[float, str]:
    """The first of the words yes and no, whatever the case; neither is wrong."""
    found = re.search(r"\b(yes|no)\b", text.lower())
    read, wanted = found[1] if found else "other", str(truth).strip().lower()
    return float(read == YES_NO.get(wanted)), read


RULES: dict[str, Rule] = {
    "exact": exact, "vqa": vqa, "anls": anls, "relaxed": relaxed, "letter": letter, "yes_no": yes_no,
    "first_letter": first_letter,
}  # fmt: skip
