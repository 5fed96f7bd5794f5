"""Which tokens of a prompt are trained, for every `--version` of the original.

A prompt is assembled from pieces that record who says them; a token is trained if the piece its first
character comes from is trained. On ordinary samples this gives the labels of the original
(llava/train/train.py), which finds them by tokenising parts of the text again and adding up
lengths; where the sum does not match, the original trains nothing of the sample, and ours is still
right. The original's own arithmetic is in `compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.conversation import (
    ASSISTANT,
    SYSTEM_TEXT,
    TEMPLATE_TEXT,
    TEMPLATES,
    Piece,
    Template,
    template_pieces,
)
from llava_jax.text.tokenizer import Part, Tokenizer

Kind = Literal["plain", "llama_2", "v1", "mpt", "v0"]
Message = tuple[int, list[Part]]
"""(role, what it says)."""


@dataclass(frozen=True)
class TrainingVersion:
    """What a `--version` of the original means: a template, and the rule for its labels."""

    name: str
    template: Template
    kind: Kind


def training_version(name: str) -> TrainingVersion:
    """The template and label rule of `--version name` (llava/train/train.py, `train`, `preprocess`).

    A name without a template, and "v0" (which only adds a [PAD] token), train with vicuna_v1.
    """
    known = name in TEMPLATES and name != "v0"
    template = TEMPLATES[name if known else "vicuna_v1"]
    kind: Kind = "v0"
    if template.style in ("plain", "llama_2"):
        kind = template.style  # type: ignore[assignment]
    elif template.version.startswith("v1"):
        kind = "v1"
    elif template.version == "mpt":
        kind = "mpt"
    return TrainingVersion(name, template, kind)


def training_pieces(version: TrainingVersion, messages: Sequence[Message]) -> list[Piece]:
    """The pieces of a training prompt; `Piece.answer` says whether it is trained.

    messages: user and assistant in turn, the user first; no list of parts is empty.
    """
    if version.kind == "plain":
        return _caption(version.template, messages)
    if version.kind == "v0":
        return _v0(version.template, messages)
    return template_pieces(version.template, messages)


def _caption(template: Template, messages: Sequence[Message]) -> list[Piece]:
    """Stage 1: image slots, caption, line end. The instruction is left out, and no EOS is added."""
    slots: list[Part] = [part for part in messages[0][1] if part == IMAGE_TOKEN]
    return [
        Piece(slots, 0, False),
        Piece(messages[1][1], 1, True),
        Piece(template.sep, TEMPLATE_TEXT, True),
    ]


def _v0(template: Template, messages: Sequence[Message]) -> list[Piece]:
    """The layout of the oldest versions, which is not the one the template renders for chatting.

    Every `###` is trained, also before the user's turns: it is how an answer ends.
    """
    pieces = [Piece(f"{template.system}\n\n", SYSTEM_TEXT, False)]
    for i, (role, parts) in enumerate(messages):
        says = role == ASSISTANT
        pieces += [
            Piece("###", TEMPLATE_TEXT, True),
            Piece(f" {template.roles[role]}: ", TEMPLATE_TEXT, says),
            Piece(parts, i, says),
            Piece("\n", TEMPLATE_TEXT, says),
        ]
    return [*pieces, Piece("### ", TEMPLATE_TEXT, True)]


def tokenise(
    tokenizer: Tokenizer, pieces: Sequence[Piece]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, labels, messages) of a prompt, int32[t] each.

    labels: the id itself where the piece is an answer, IGNORE elsewhere and at image slots.
    messages: the index of the message an id is from; negative for the template's text and BOS.

    Only the template's own text is read as markup; what people say stays as it is.
    """
    parts: list[Part] = []
    answer, message = [False], [TEMPLATE_TEXT]  # of each part; the first is BOS, which has owner -1
    for piece in pieces:
        text = piece.content
        more = tokenizer.split_markup(text) if isinstance(text, str) else text
        parts += more
        answer += [piece.answer] * len(more)
        message += [piece.message] * len(more)
    ids, owners = (np.array(x, np.int32) for x in tokenizer.align_parts(parts))
    trained = np.array(answer)[owners + 1] & (ids != IMAGE_TOKEN)
    return ids, np.where(trained, ids, IGNORE), np.array(message, np.int32)[owners + 1]
