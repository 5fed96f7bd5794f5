"""The judge's message of MM-Vet, to the letter of yuweihao/MM-Vet mm-vet_evaluator.py (Apache-2.0):
grades depend on every word of it, so mmvet_prompt.txt quotes it and does not paraphrase."""

from pathlib import Path

# Put after the message when the first reply is not a grade.
RETRY = "\nPredict the correctness of the answer (digit): "


def mmvet_message(question: str, truth: str, prediction: str) -> str:
    """The judge's user message: the graded examples and a row whose last cell is open."""
    examples = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return examples + "\n" + " | ".join([question, truth, prediction, ""])
