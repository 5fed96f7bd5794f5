"""Random JSON schemas of every kind that is supported, of which answers are short."""

import random
from typing import Any

KEYS = ("name", "count", "x", "größe", "a b", 'q"')
PATTERNS = ("^[a-c]{2,4}$", "^(red|blue)-[0-9]{1,2}$", "^[A-Z][a-z]{1,3}$", "^\\d{3}$")
FORMATS = ("date", "uuid", "ipv4")


def schema(seed: int) -> dict[str, Any]:
    """One schema: an object or array at the top, three levels at most, and references."""
    rng = random.Random(seed)
    shared = {"leaf": _leaf(rng), "pair": _array(rng, 1)}
    top = _object(rng, 3) if rng.random() < 0.7 else _array(rng, 3)
    return {**top, "$defs": shared}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0:
        return _leaf(rng)
    made = rng.random()
    if made < 0.3:
        return _object(rng, depth)
    if made < 0.5:
        return _array(rng, depth)
    if made < 0.6:
        return {"$ref": "#/$defs/" + rng.choice(("leaf", "pair"))}
    if made < 0.7:
        return {"anyOf": [_any(rng, depth - 1), {"type": "null"}]}
    return _leaf(rng)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(KEYS, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {key: _any(rng, depth - 1) for key in keys},
        "required": [key for key in keys if rng.random() < 0.8],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    found = {"type": "array", "minItems": low, "maxItems": low + rng.randint(0, 1)}
    if rng.random() < 0.2:
        return {**found, "prefixItems": [_leaf(rng), _leaf(rng)], "items": _leaf(rng)}
    return {**found, "items": _any(rng, depth - 1)}


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-20, 20)
    return rng.choice(
        (
            {"type": "boolean"},
            {"enum": ["red", 3, None, {"a": [1]}, "ü"]},
            {"const": rng.choice(("yes", 0, [True, None]))},
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 400)},
            {"type": "integer", "minimum": 0, "maximum": 200, "multipleOf": 7},
            {"type": "number", "exclusiveMinimum": low, "maximum": low + 1.5},
            {"type": "string", "minLength": rng.randint(0, 2), "maxLength": 4},
            {"type": "string", "pattern": rng.choice(PATTERNS)},
            {"type": "string", "format": rng.choice(FORMATS)},
            {"type": ["string", "null"], "maxLength": 3},
        )
    )
