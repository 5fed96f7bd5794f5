"""Groups of trained parameters that a run speaks of: a part of the model, and its rule and rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llava_jax.params import component
from llava_jax.train.optim import rules


@dataclass(frozen=True)
class Group:
    """names: of its parameters. peak: their largest learning rate."""

    names: tuple[str, ...]
    peak: float


def trained_groups(config: Any, names: Iterable[str]) -> dict[str, Group]:
    """{title: group} of the trained parameters `names`, by part of the model.

    A part with several update rules or rates is several groups: "language muon", "vision lr=2e-06".
    Raises ConfigError as llava_jax.train.select.rates does.
    """
    members: dict[tuple[str, str, float], list[str]] = defaultdict(list)
    for name, (rule, peak, _) in sorted(rules(config, names).items()):
        members[component(name), rule, peak].append(name)
    titles = {}
    for part, rule, peak in members:
        own = [key for key in members if key[0] == part]
        words = [part]
        words += [rule] if len({r for _, r, _ in own}) > 1 else []
        words += [f"lr={peak:g}"] if len({p for _, r, p in own if r == rule}) > 1 else []
        titles[" ".join(words)] = Group(tuple(members[part, rule, peak]), peak)
    return titles
