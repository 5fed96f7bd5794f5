"""The groups of parameters that `trainable` may name. Imports no jax.

Everything works on the names of flat dicts {dotted name: array}, so a group is a rule about a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llava_jax.errors import ConfigError

GROUPS: dict[str, Callable[[str], bool]] = {
    "projector": lambda name: name.startswith("projector."),
    "language": lambda name: name.startswith("language.") and not is_lora(name),
    "embed": lambda name: name == "language.embed.embedding",
    "lora": lambda name: is_lora(name),
    # What lies behind the feature layer has no gradient, and weight decay must not touch it.
    "vision": lambda name: name.startswith("vision.") and not name.startswith("vision.tail."),
}


def is_lora(name: str) -> bool:
    """True for the low-rank adapter parameters."""
    return name.endswith((".lora_a", ".lora_b"))


def trainable_names(names: Iterable[str], groups: Iterable[str]) -> set[str]:
    """The names that `groups` (keys of GROUPS) cover. Raises ConfigError for one that covers none."""
    names, chosen = list(names), set()
    for group in groups:
        covered = {n for n in names if GROUPS[group](n)}
        if not covered:
            fix = "set lora_rank" if group == "lora" else None
            raise ConfigError(f"trainable: the model has no {group!r} parameters", fix=fix)
        chosen |= covered
    return chosen
