"""Which tokens of a training prompt are trained, for every `--version` of the original.

The prompt is assembled from pieces that know who says them; a token is trained if the piece its
first character comes from is trained. On ordinary samples this gives the labels of the original
(llava/train/train.py), which finds them by tokenising parts of the text again and adding up
lengths; where that sum does not come out, the original trains nothing of the sample and ours is
still right. The original's own arithmetic is in `compat`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.conversation import (
    ASSISTANT,
    SYSTEM_TEXT,
    TEMPLATE_TEXT,
    TEMPLATES,
    Piece,
    Template,
    lay_out,
)
from llava_jax.text.tokenizer import Part, Tokenizer

Kind = Literal["plain", "llama_2", "v1", "mpt", "v0"]


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


def lay_out_training(version: TrainingVersion, messages: Sequence[tuple[int, list[Part]]]):
    """The pieces of a training prompt; `Piece.answer` says whether it is trained.

    messages: (role, parts) in turns, starting with the user; the parts of none is an empty list.
    """
    if version.kind == "plain":
        return _lay_out_caption(version.template, messages)
    if version.kind == "v0":
        return _lay_out_v0(version.template, messages)
    return lay_out(version.template, messages)


def _lay_out_caption(template: Template, messages: Sequence[tuple[int, list[Part]]]) -> list[Piece]:
    """Stage 1: image slots, caption, line end. The instruction is left out, and no EOS is added."""
    slots: list[Part] = [part for part in messages[0][1] if part == IMAGE_TOKEN]
    return [
        Piece(slots, 0, False),
        Piece(messages[1][1], 1, True),
        Piece(template.sep, TEMPLATE_TEXT, True),
    ]


def _lay_out_v0(template: Template, messages: Sequence[tuple[int, list[Part]]]) -> list[Piece]:
    """The layout of the oldest versions, which is not the one the template renders for chatting.

    Every `###` is trained, also in front of the user's turns: it is how an answer ends.
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


def flatten(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[list[Part], list[Piece]]:
    """The tokenizer parts of a layout, and for each part the piece it is from.

    Only the template's own text is read as markup; what people say stays as it is.
    """
    parts: list[Part] = []
    owners: list[Piece] = []
    for piece in pieces:
        own = piece.content
        more = tokenizer.split_markup(own) if isinstance(own, str) else own
        parts += more
        owners += [piece] * len(more)
    return parts, owners


@dataclass(frozen=True)
class Labelled:
    """A tokenised training prompt.

    ids, labels: of equal length; labels are the id itself where trained, IGNORE elsewhere.
    message: per id, the index of the message it is from; negative for the template's text and BOS.
    """

    ids: list[int]
    labels: list[int]
    message: list[int]


def label(
    tokenizer: Tokenizer, version: TrainingVersion, messages: Sequence[tuple[int, list[Part]]]
) -> Labelled:
    """Tokenises a conversation and marks what is trained. Image slots never are."""
    return tokenise(tokenizer, lay_out_training(version, messages))


def tokenise(tokenizer: Tokenizer, layout: Sequence[Piece]) -> Labelled:
    """The ids of a layout, and what of them is trained."""
    parts, pieces = flatten(tokenizer, layout)
    ids, owners = tokenizer.align_parts(parts)
    trained = [owner >= 0 and pieces[owner].answer for owner in owners]
    return Labelled(
        ids,
        [id_ if yes and id_ != IMAGE_TOKEN else IGNORE for id_, yes in zip(ids, trained)],
        [pieces[owner].message if owner >= 0 else TEMPLATE_TEXT for owner in owners],
    )
