"""Exact match: a run's own questions, answered by greedy generation and scored by exact match."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax import storage
from llava_jax.errors import counted
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.conversation import USER
from llava_jax.text.labels import training_version
from llava_jax.text.records import check_turns, image_paths, read_turns, record_id
from llava_jax.text.sample import alone_rounds, place_rounds, stand_alone
from llava_jax.text.tokenizer import Part
from llava_jax.util import write_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its only right answer.

    image: path, paths, or None for a question about no image. Of a question with images `<image>` in a
        text is the place of the next one; without any they come first, a line each.
    before: the (question, answer) pairs before it in its conversation; usually none.
    """

    image: str | list[str] | None
    text: str
    answer: str
    kind: str = "all"
    before: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> str:
        """The question without its images."""
        return self.text.replace(IMAGE_TAG, "").strip() if self.image else self.text

    def messages(self) -> list[dict[str, Any]]:
        """The conversation up to the question."""
        texts = [*itertools.chain(*self.before), self.text]
        images = [self.image] if isinstance(self.image, str) else self.image or []
        if images and not any(IMAGE_TAG in text for text in texts):
            texts[0] = f"{IMAGE_TAG}\n" * len(images) + texts[0]
        left = iter(images)
        contents = [_parts(text, left) if images else text for text in texts]
        roles = itertools.cycle(("user", "assistant"))
        return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def _parts(text: str, images: Iterator[str]) -> list[Any]:
    """A text with the next of `images` at each of its tags, as training places it."""
    first, *rest = text.split(IMAGE_TAG)
    parts: list[Any] = [first] if first or not rest else []
    for words in rest:
        image = next(images, None)
        if image is None:  # the model said it
            parts.append(IMAGE_TAG)
        else:
            parts.append({"type": "image", "image": storage.source(image), "inline": True})
        parts += [words] if words else []
    return parts


def questions_of(
    record: dict[str, Any],
    image_folder: str | Path,
    turns: str = "independent",
    *,
    caption: bool = False,
) -> list[Question]:
    """Every question of a LLaVA record that is trained, after what it is trained after; `kinds`, where
    given, names them.

    turns: as data.turns; a record's own has precedence. In a "conversation" a question follows those
    before it and the record's own answers to them; "independent" ones stand alone.
    caption: the record is trained as a caption (data.version plain).
    """
    name, notes = record_id(record), Counter[str]()
    said, images = read_turns(record, name), image_paths(record, name)
    check_turns(said, images, name, caption=False)
    rounds, images = place_rounds(said, images, notes, caption=caption)
    alone = stand_alone(record, name, rounds, turns, notes)
    pairs = [(_text(q), _text(a)) for q, a in (alone_rounds(rounds) if alone else rounds)]
    shown = [storage.join(str(image_folder), path) for path in images]
    first = 1 if said[0][0] == USER else 2  # an answer before any question is none
    every = zip(record.get("kinds") or itertools.repeat("all"), said[first::2])
    kinds = [kind for kind, (_, answer) in every if answer.strip()]
    questions = []
    for i, ((text, answer), kind) in enumerate(zip(pairs, kinds)):
        before = () if alone else tuple(pairs[:i])
        slots = sum(t.count(IMAGE_TAG) for t in (*itertools.chain(*before), text)) if shown else 0
        image = shown[0] if slots == 1 else shown[:slots] or None
        questions.append(Question(image, text, answer, kind, before))
    return questions


def _text(parts: Sequence[Part]) -> str:
    return "".join(part if isinstance(part, str) else IMAGE_TAG for part in parts)


def answers(
    model: Any,
    questions: Sequence[Question],
    *,
    batch_size: int | None = None,
    quiet: bool = False,
    longest: int | None = None,
) -> list[str | None]:
    """The model's greedy answer to each question, stripped of white space.

    batch_size: None for as many as LlavaModel.generate_batch finds room for.
    longest: of an answer, in tokens; None: some more than the longest right one.
    None for a question that cannot be asked, usually because its image was refused; the log says why.
    """
    from llava_jax.model import Request

    if longest is None:
        lengths = (len(model.tokenizer.encode(q.answer)) for q in questions)
        longest = max(lengths, default=0) + 8
    requests = [Request(q.messages(), max_new_tokens=longest) for q in questions]
    replies = model.generate_batch(
        requests, batch_size=batch_size, progress=not quiet, on_error="reply"
    )
    for error in dict.fromkeys(reply.error for reply in replies if reply.error):
        log.warning("not asked: %s", error)
    return [None if reply.error else reply.text.strip() for reply in replies]


def conversation_match(
    model: Any,
    conversations: Sequence[Sequence[Question]],
    *,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`score` of the follow-up questions of conversations, each asked after the model's own answers.

    The first question of a conversation is asked and not scored.
    """
    before: list[list[tuple[str, str]]] = [[] for _ in conversations]
    asked: list[Question] = []
    replies: list[str | None] = []
    for turn in range(max(map(len, conversations), default=0)):
        open_ = [i for i, talk in enumerate(conversations) if turn < len(talk)]
        now = [dataclasses.replace(conversations[i][turn], before=tuple(before[i])) for i in open_]
        answered = answers(model, now, batch_size=batch_size, quiet=quiet)
        for i, question, answer in zip(open_, now, answered):
            if answer:  # as in LlavaModel.chat, which forgets a turn without one
                before[i].append((question.text, answer))
        if turn:
            asked, replies = asked + now, replies + answered
    return score(asked, replies)


def score(questions: Sequence[Question], replies: Sequence[str | None]) -> dict[str, Any]:
    """{"mean", "n", "right", "kinds": {kind: share right}, "wrong": the first 50 wrong answers}.

    mean: over kinds, each with the same weight; None without questions. n: all but those with a reply
    of None, which are excluded.
    """
    asked = [(q, r) for q, r in zip(questions, replies, strict=True) if r is not None]
    hits = defaultdict(list)
    for q, reply in asked:
        hits[q.kind].append(reply == q.answer.strip())
    kinds = {kind: sum(right) / len(right) for kind, right in hits.items()}
    wrong = [(q, reply) for q, reply in asked if reply != q.answer.strip()]
    return {
        "mean": sum(kinds.values()) / len(kinds) if kinds else None,
        "n": len(asked),
        "right": len(asked) - len(wrong),
        "kinds": kinds,
        "wrong": [{**dataclasses.asdict(q), "said": reply} for q, reply in wrong[:50]],
    }


def report_exact_match(config: Any, export: Path, workdir: Path, *, quiet: bool) -> None:
    """Prints the `exact_match_on_holdout` of a run and writes it to exact_match.json."""
    from llava_jax.train.distributed import on_main

    result = exact_match_on_holdout(config, export, quiet=quiet)
    text = "no questions"
    if result["n"]:
        text = f"{result['mean']:.2%} of {counted(result['n'], 'question')}"

    def write() -> None:
        write_json(workdir / "exact_match.json", result, indent=1, ensure_ascii=False)
        print(f"exact match on the held-out images: {text}")

    on_main(write)


def exact_match_on_holdout(config: Any, export: Path, *, quiet: bool = False) -> dict[str, Any]:
    """`exact_match` of the exported model on the images that config.data.holdout holds out.

    config: the last stage's. Questions of one record follow each other or stand alone, as in training;
    those whose image training would leave out are not asked. Each process answers a part of them, on
    its own first device.
    """
    import jax

    from llava_jax.data.check import HELD_SIDE, open_data
    from llava_jax.data.settings import DataSettings
    from llava_jax.model import load
    from llava_jax.train.distributed import gather, together

    held = open_data({**config.data, **HELD_SIDE}, say=False)
    caption = training_version(config.data.version).kind == "plain"
    questions = [
        q
        for record, file, index in zip(held.records, held.file, held.index)
        if int(index) not in held.bad
        for q in questions_of(
            record, held.files[file].image_folder, config.data.turns, caption=caption
        )
    ]
    if not questions:
        return score([], [])
    first, every = jax.process_index(), jax.process_count()
    limits = DataSettings.read(config.data).image_limits

    def answer() -> list[str | None]:
        model = load(export, limits=limits)
        return answers(model, questions[first::every], quiet=quiet or first > 0)

    parts = gather(together(answer))
    replies = [parts[i % every][i // every] for i in range(len(questions))]
    result = score(questions, replies)
    if result["n"] < len(questions) and not first:
        left = len(questions) - result["n"]
        log.warning("%d of %d questions were not asked", left, len(questions))
    return result
