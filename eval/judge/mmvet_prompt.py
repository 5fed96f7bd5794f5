"""The judge's message of MM-Vet, to the letter of yuweihao/MM-Vet mm-vet_evaluator.py (Apache-2.0):
grades depend on every word of it, so it is quoted and not paraphrased."""

_TASK = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth means it is totally right only when all elements in the "
    "ground truth are present in the prediction, and <OR> means it is totally right when any one "
    "element in the ground truth is present in the prediction. The correctness score is 0.0 "
    "(totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just "
    "complete the last space of the correctness score.\n\n"
)
_EQUATION = "What is x in the equation?"
_TWO = "-1 <AND> -5"
_MEME = "Can you explain this meme?"
_MEME_TRUTH = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are "
    "misleading. Despite its name, Iceland is known for its beautiful green landscapes, while "
    "Greenland is mostly covered in ice and snow. The meme is saying that the person has trust "
    "issues because the names of these countries do not accurately represent their landscapes."
)
_SHOTS = (
    ("Question", "Ground truth", "Prediction", "Correctness"),
    ("---", "---", "---", "---"),
    (_EQUATION, _TWO, "x = 3", "0.0"),
    (_EQUATION, _TWO, "x = -1", "0.5"),
    (_EQUATION, _TWO, "x = -5", "0.5"),
    (_EQUATION, _TWO, "x = -5 or 5", "0.5"),
    (_EQUATION, _TWO, "x = -1 or x = -5", "1.0"),
    (
        _MEME,
        _MEME_TRUTH,
        "The meme talks about Iceland and Greenland. It's pointing out that despite their names, "
        "Iceland is not very icy and Greenland isn't very green.",
        "0.4",
    ),
    (
        _MEME,
        _MEME_TRUTH,
        "The meme is using humor to point out the misleading nature of Iceland's and Greenland's "
        "names. Iceland, despite its name, has lush green landscapes while Greenland is mostly "
        "covered in ice and snow. The text 'This is why I have trust issues' is a playful way to "
        "suggest that these contradictions can lead to distrust or confusion. The humor in this "
        "meme is derived from the unexpected contrast between the names of the countries and their "
        "actual physical characteristics.",
        "1.0",
    ),
)
PROMPT = _TASK + "".join(" | ".join(row) + "\n" for row in _SHOTS)
# Put after the message when the first reply is not a grade.
RETRY = "\nPredict the correctness of the answer (digit): "


def mmvet_message(question: str, truth: str, prediction: str) -> str:
    """The judge's user message: the graded examples and a row whose last cell is open."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return PROMPT + "\n" + " | ".join([question, truth, prediction, ""])
