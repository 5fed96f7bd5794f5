"""The response-format prompts of LLaVA-1.5, and which of them a question carries.

Wording: table 7 of the paper (arXiv 2310.03744 v2). Its two prompts for regions begin with "Provide";
records of the published file (llava_v1_5_mix665k.json), which the model was trained on, say "Please
provide ..." and continue in the same line with the box or the text, and a full stop.
"""

from __future__ import annotations

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
OCR = "Reference OCR token: {}"
REGION = "Please provide a short description for this region: {}."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {}."

_KINDS = {
    "short answer": SHORT,
    "option letter": LETTER,
    "caption": CAPTION,
    "region": REGION.partition(":")[0],
    "box": BOX.partition(":")[0],
}
FREE = "free"


def kind_of(question: str) -> str:
    """Which prompt a question carries: "short answer", "option letter", "caption", "region", "box"
    or "free" for none. The paper's own wording without "Please" counts too."""
    for kind, prompt in _KINDS.items():
        if prompt.removeprefix("Please ").lower() in question.lower():
            return kind
    return FREE
