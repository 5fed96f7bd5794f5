"""The original's training labels, equal id by id, mistakes included.

Follows preprocess_multimodal and preprocess_* of llava/train/train.py
(haotian-liu/LLaVA @ c121f04, with tokenizers >= 0.14): prompts are rendered to text, every special
token written in it counts, and masks come from the lengths of pieces that are tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_jax.errors import PromptError, SampleError
from llava_jax.text.constants import IGNORE, IM_END, IM_START, IMAGE_TAG
from llava_jax.text.conversation import Template, render
from llava_jax.text.labels import TrainingVersion, training_version
from llava_jax.text.tokenizer import Tokenizer

Turns = list[dict[str, str]]


@dataclass(frozen=True)
class CompatSample:
    """One sample as the original prepares it, before padding.

    ids, labels: int64[t]; a label can be -200, where an answer holds an image slot.
    mismatch: (counted, present) lengths when the original drops the sample: no label is left.
    """

    turns: Turns
    ids: np.ndarray
    labels: np.ndarray
    mismatch: tuple[int, int] | None = None


def compat_sample(
    record: Mapping[str, Any],
    tokenizer: Tokenizer,
    version: str,
    *,
    max_length: int = 2048,
    use_im_start_end: bool = False,
    name: str | None = None,
) -> CompatSample:
    """One LLaVA record as the original trains it. Only text samples are cut at max_length here.

    Raises SampleError, with the sample's name, where the original raises an exception.
    """
    name = name if name is not None else str(record.get("id", "?"))
    rule = training_version(version)
    has_image = "image" in record
    turns = [dict(turn) for turn in record["conversations"]]
    if has_image:
        turns = collapse_tags(turns, rule.template, use_im_start_end)
    count = _Tokens(tokenizer, has_image, max_length)
    try:
        if rule.kind == "plain":
            ids, labels, mismatch = _plain(turns, rule.template, count)
        elif rule.kind == "v0":
            ids, labels, mismatch = _v0(turns, rule.template, count)
        else:
            ids, labels, mismatch = _rounds(turns, rule, count)
    except (PromptError, KeyError, IndexError, ValueError) as e:
        raise SampleError(f"sample {name}: the original fails on its turns ({e})") from e
    return CompatSample(turns, ids, labels, mismatch)


def collapse_tags(turns: Turns, template: Template, use_im_start_end: bool) -> Turns:
    """One `<image>` at the front of every turn that has any, as preprocess_multimodal does."""
    changed = []
    for turn in turns:
        value = turn["value"]
        if IMAGE_TAG in value:
            value = f"{IMAGE_TAG}\n{value.replace(IMAGE_TAG, '').strip()}".strip()
            if "mmtag" in template.version:
                value = value.replace(IMAGE_TAG, f"<Image>{IMAGE_TAG}</Image>")
        if use_im_start_end:
            value = value.replace(IMAGE_TAG, IM_START + IMAGE_TAG + IM_END)
        changed.append({**turn, "value": value})
    return changed


class _Tokens:
    """Ids as the original's tokenizer calls give them, with and without image slots."""

    def __init__(self, tokenizer: Tokenizer, has_image: bool, max_length: int):
        self.tokenizer, self.has_image, self.max_length = tokenizer, has_image, max_length

    def ids(self, text: str, image_tags: bool | None = None) -> list[int]:
        tags = self.has_image if image_tags is None else image_tags
        return self.tokenizer.encode_parts(self.tokenizer.split_markup(text, image_tags=tags))

    def sample(self, text: str) -> np.ndarray:
        """A whole sample: one with an image is not cut."""
        ids = self.ids(text)
        return np.array(ids if self.has_image else ids[: self.max_length], np.int64)

    def real(self, ids: Sequence[int] | np.ndarray) -> int:
        """Ids that are not the padding id, which `<unk>` in the text shares."""
        return int((np.asarray(ids) != self.tokenizer.pad_id).sum())


_Result = tuple[np.ndarray, np.ndarray, tuple[int, int] | None]


def _plain(turns: Turns, template: Template, count: _Tokens) -> _Result:
    if len(turns) != 2 or IMAGE_TAG not in turns[0]["value"]:
        raise ValueError("needs two turns, the first with an image tag")
    ids = np.array(count.ids(IMAGE_TAG + turns[1]["value"] + template.sep, True), np.int64)
    labels = ids.copy()
    labels[: len(count.ids(IMAGE_TAG, True))] = IGNORE
    return ids, labels, None


def _v0(turns: Turns, template: Template, count: _Tokens) -> _Result:
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    header = f"{template.system}\n\n"
    said = [
        f"### {names.get(turn['from'].lower(), 'unknown')}: {turn['value']}\n" for turn in turns
    ]
    ids = count.sample(header + "".join(said) + "### ")
    if count.has_image:
        lengths = [len(count.ids(text)) for text in (header, *said)]
    else:
        lengths = [count.real(count.sample(text)) for text in (header, *said)]
    labels = ids.copy()
    labels[: lengths[0]] = IGNORE
    at = lengths[0]
    for turn, length in zip(turns, lengths[1:]):
        if turn["from"] == "human":
            labels[at + 2 : at + length] = IGNORE
        at += length
    return ids, labels, None


def _rounds(turns: Turns, rule: TrainingVersion, count: _Tokens) -> _Result:
    """Versions v1, llama_2 and mpt: walk the rounds of the text, adding up their lengths."""
    template, kind, legacy = rule.template, rule.kind, count.tokenizer.legacy
    prompt = render(template, _alternating(turns))
    ids = count.sample(prompt)
    labels = ids.copy()
    rounds, answer_mark = _split_rounds(prompt, template, kind)
    # what a round that is not the first has more or less than when tokenised alone
    shift = {"v1": 0 if legacy else -1, "llama_2": 0, "mpt": 1 if legacy else 0}[kind]
    tail = 1 if kind == "mpt" else 2  # BOS, and but for mpt the lone space before the answer
    at = 0 if kind == "mpt" else 1
    labels[:at] = IGNORE
    for i, text in enumerate(rounds):
        halves = text.split(answer_mark)
        if not text or len(halves) != 2:
            break
        extra = shift if i else 0
        asked = len(count.ids(halves[0] + answer_mark)) - tail + extra
        labels[at : at + asked] = IGNORE
        at += len(count.ids(text)) + extra
    labels[at:] = IGNORE
    present = count.real(ids)
    if at < count.max_length and at != present:
        labels[:] = IGNORE
        return ids, labels, (at, present)
    return ids, labels, None


def _alternating(turns: Turns) -> list[tuple[int, str]]:
    """(role, text) of turns; a first one from the model is left out."""
    roles = {"human": 0, "gpt": 1}
    if roles[turns[0]["from"]] != 0:
        turns = turns[1:]
    messages = [(roles[turn["from"]], turn["value"]) for turn in turns]
    if any(role != i % 2 for i, (role, _) in enumerate(messages)):
        raise ValueError("roles do not alternate")
    return messages


def _split_rounds(prompt: str, template: Template, kind: str) -> tuple[list[str], str]:
    """Question-and-answer rounds of a rendered prompt, and the text before each answer."""
    if kind != "mpt":
        mark = "[/INST] " if kind == "llama_2" else f"{template.sep}{template.roles[1]}: "
        return prompt.split(template.sep2), mark
    turns = prompt.split(template.sep)
    rounds = [template.sep.join(turns[:3])]  # the system prompt goes with the first round
    rounds += [template.sep.join(turns[i : i + 2]) for i in range(3, len(turns), 2)]
    return rounds, template.sep + template.roles[1]
