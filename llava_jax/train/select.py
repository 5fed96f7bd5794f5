"""Which parameters a word of the settings stands for: a named part of the model, or a pattern.

A pattern is `re:` and a regular expression (Python's `re`) that a whole name must match, such as
`re:language\\.layers\\.attn\\..*`. Layers of a stack are one parameter with a leading layer axis, so
a pattern cannot choose single layers.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.errors import ConfigError
from llava_jax.params import is_lora, is_quantized, is_run, linears, parameter_shapes
from llava_jax.settings import PATTERN

GROUPS: dict[str, Callable[[str], bool]] = {
    "projector": lambda name: name.startswith("projector.") and not is_lora(name),
    "language": lambda name: name.startswith("language.") and not is_lora(name),
    "embed": lambda name: name == "language.embed.embedding",
    "lora": is_lora,
    # What follows the feature layer has no gradient, and weight decay must not touch it.
    "vision": lambda name: name.startswith("vision.") and is_run(name) and not is_lora(name),
}
"""The parts of a model that `trainable` and `param_groups` may name."""


def select(setting: str, word: str, names: Collection[str], noun: str = "parameter") -> set[str]:
    """The `names` that one word of `setting` stands for: a key of GROUPS, or a pattern.

    Raises ConfigError for a pattern that matches none, with the nearest names; an empty set is
    returned for a group that has none.
    """
    if not word.startswith(PATTERN):
        return {name for name in names if GROUPS[word](name)}
    pattern = word.removeprefix(PATTERN)
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{setting}: {word!r} is not a regular expression: {error}") from None
    found = _matches(word, names)
    if found:
        return found
    if re.search(r"layers(\\?\.)?[\[(]*(\\d|\d)", pattern):
        fix = "the layers of a stack are one parameter: leave the number of the layer out"
    else:
        plain = re.sub(r"[\\^$*+?()\[\]|]", "", pattern)
        near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3) or sorted(names)[:3]
        fix = f"nearest: {', '.join(near)}"
    raise ConfigError(f"{setting}: {word!r} matches no {noun}", fix=fix)


def trainable_names(names: Iterable[str], words: Iterable[str]) -> set[str]:
    """The names that the words of `trainable` cover.

    Raises ConfigError for a word that covers none, and for a pattern that covers a quantised kernel. A
    pattern does not reach the tower's layers after the feature layer, which have no gradient.
    """
    names = list(names)
    can = [n for n in names if is_run(n) and not is_quantized(n)]
    held = [n.removesuffix("codes") + "kernel" for n in names if n.endswith(".codes")]
    chosen: set[str] = set()
    for word in words:
        if word.startswith(PATTERN) and (kept := _matches(word, held)):
            raise ConfigError(
                f"trainable: {word!r} covers {min(kept)}, which quantize keeps frozen",
                fix="a pattern that leaves the decoder's kernels out, or --config.quantize=",
            )
        covered = select("trainable", word, can)
        if not covered:
            raise ConfigError(f"trainable: the model has no {word!r} parameters")
        chosen |= covered
    return chosen


def may_reach(words: Iterable[str], part: str) -> bool:
    """Whether words of `trainable` cover something of a part, in a model with all that models have."""
    return any(
        word == part
        or (word.startswith(PATTERN) and any(map(GROUPS[part], _matches(word, _all()))))
        for word in words
    )


def _matches(word: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if re.fullmatch(word.removeprefix(PATTERN), name)}


@functools.cache
def _all() -> tuple[str, ...]:
    """The names of a model's parameters, with adapters on every layer."""
    model = LlavaConfig.v15_7b()
    lora = LoraConfig(1, 1.0, dora=True, targets=tuple(linears(model)))
    return tuple(parameter_shapes(replace(model, lora=lora)))


@dataclass(frozen=True)
class ParamGroup:
    """What an entry of `param_groups` covers, and what it sets there (None: nothing).

    text: the entry; "" of projector_lr and vision_lr.
    """

    word: str
    lr: float | None = None
    weight_decay: float | None = None
    text: str = ""


def param_groups(config: Any) -> list[ParamGroup]:
    """The groups of a run; where several cover a parameter and set the same, the last one counts.

    `projector_lr` and `vision_lr` are its first two. Raises ConfigError for an entry of
    `config.param_groups` that is not WORD lr=NUMBER weight_decay=NUMBER, either or both.
    """
    own = {"projector": config.projector_lr, "vision": config.vision_lr}
    named = [ParamGroup(word, lr) for word, lr in own.items() if lr is not None]
    return named + [_group(text) for text in config.param_groups]


def _group(text: str) -> ParamGroup:
    word, *pairs = text.split() or [""]
    if not (word.startswith(PATTERN) or word in GROUPS):
        allowed = ", ".join(GROUPS)
        raise ConfigError(
            f"param_groups {text!r} begins with no part of the model",
            fix=f"one of {allowed}, or {PATTERN} and a regular expression over parameter names",
        )
    values = {}
    for pair in pairs:
        key, _, number = pair.partition("=")
        try:
            values[key] = float(number)
        except ValueError:
            values[key] = -1.0
        if key not in ("lr", "weight_decay") or not 0 <= values[key] < float("inf"):
            raise ConfigError(
                f"param_groups {text!r}: {pair!r} is not lr=NUMBER or weight_decay=NUMBER"
            )
    if not values:
        raise ConfigError(f"param_groups {text!r} sets nothing", fix=f"'{word} lr=1e-5', say")
    return ParamGroup(word, **values, text=text)


def rates(
    names: Collection[str], config: Any, default: Callable[[str], tuple[float, float]] | None = None
) -> dict[str, tuple[float, float]]:
    """{name: (peak learning rate, weight decay)} of the trained parameters `names`.

    default: of one that no group covers; None: config's lr and weight_decay. What a group sets is taken
    as it is, but norms and biases have no decay. Raises ConfigError for a group of `param_groups` that
    covers nothing, or sets the decay of norms and biases alone.
    """
    base = (config.lr, config.weight_decay)
    plain = {name: default(name) if default else base for name in names}
    lr = {name: own for name, (own, _) in plain.items()}
    decay = {name: own for name, (_, own) in plain.items()}
    for group in param_groups(config):
        covered = select("param_groups", group.word, names, "trained parameter")
        if not covered and group.text:
            raise ConfigError(
                f"param_groups {group.text!r}: no parameter of {group.word!r} is trained",
                fix=f"leave it out, or add {group.word!r} to trainable",
            )
        if group.lr is not None:
            lr |= dict.fromkeys(covered, group.lr)
        if group.weight_decay is not None:
            if not any(map(has_decay, covered)):
                raise ConfigError(
                    f"param_groups {group.text!r} sets weight_decay for norms and biases alone, "
                    "which have none"
                )
            decay |= dict.fromkeys(covered, group.weight_decay)
    return {name: (lr[name], decay[name] if has_decay(name) else 0.0) for name in names}


def has_decay(name: str) -> bool:
    """Weight decay leaves out norms and biases (transformers' Trainer.get_decay_parameter_names)."""
    return not name.endswith((".scale", ".bias"))
