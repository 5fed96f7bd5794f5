"""Are two checkpoints the same, tensor by tensor and in what they answer?"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert import vocabulary
from llava_jax.convert.checkpoint import open_source
from llava_jax.convert.formats.adapter import merge
from llava_jax.convert.io.folder import read_json
from llava_jax.convert.io.lazy import Leaf, dtype_name
from llava_jax.convert.source import Options, Source
from llava_jax.convert.values import all_finite, distance, rounding, rounding_text
from llava_jax.errors import LlavaError
from llava_jax.params import component
from llava_jax.text.vocabulary import never_text

log = logging.getLogger(__name__)

LOGITS_ATOL = 1e-4  # of fp32 logits of ordinary size: see `logits_atol`
ORDINARY = 32.0
HF_ROWS = 2 + 63  # <image>, <pad>, and up to the next multiple of 64
MAX_PROBE = 4 * 10**9  # bytes of parameters beyond which the models are not run unless asked


def compare(
    a: str | Path,
    b: str | Path,
    options_a: Options | None = None,
    options_b: Options | None = None,
    *,
    logits: str = "auto",
    part: bool = False,
) -> dict[str, Any]:
    """A report on two checkpoints: "equal", "tensors" (one row each), "config", "probe", and more.

    Vocabulary rows that Hugging Face's format added to one of them are not compared, and adapters
    that only one of them has are merged. Equal are tensors of the same type and bytes, and logits
    within `logits_atol` with the same greedy tokens. Checkpoints with weights that are NaN or infinite
    ("not_finite") are never equal. "cast": what `options_a` rounded, see values.rounding.
    part: b is an adapter or projector over a base, which may be of another type than in a.
    """
    options_a = options_a or Options()
    opened = open_source(a, options_a), open_source(b, options_b)
    one, other = _aligned(*opened)
    rows = [
        _row(name, one.leaves.get(name), other.leaves.get(name), any_type=part and _of_base(name))
        for name in sorted({*one.leaves, *other.leaves})
    ]
    settings = _settings(one, other)
    if not part:
        settings |= _vocabulary(*opened) | _tokenizers(one, other) | _tokens(one, other)
    bad = [name for row in rows for name in row.pop("not_finite", ())]
    own = [r["name"] for r in rows if r["equal"] and not (part and _of_base(r["name"]))]
    report: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "kinds": [one.kind, other.kind],
        "tensors": rows,
        "config": settings,
        "not_finite": bad,
        "cast": rounding(a, options_a, other, own, lambda s: _aligned(s, other)[0]),
        "probe": _probe(one, _over_the_same_base(one, other, rows), logits, bad),
    }
    probes = [v["ok"] for v in report["probe"].values() if isinstance(v, dict)]
    report["equal"] = all(r["equal"] for r in rows) and not settings and all(probes) and not bad
    return report


def _of_base(name: str) -> bool:
    """Whether a parameter is the base's, where b is an adapter or projector."""
    return component(name) not in ("lora", "projector")


def _over_the_same_base(a: Source, b: Source, rows: list[dict[str, Any]]) -> Source:
    """`b` with a's leaves where the two differ in nothing but the type of their base."""
    other_type = [r["name"] for r in rows if r["equal"] and r["dtypes"][0] != r["dtypes"][1]]
    return replace(b, leaves=b.leaves | {name: a.leaves[name] for name in other_type})


def _aligned(a: Source, b: Source) -> tuple[Source, Source]:
    """Both without adapters if only one has them, and with the smaller of the two vocabularies.

    Rows that a token or training needs are not left out: the shapes then differ.
    """
    if (a.config.lora is None) != (b.config.lora is None):
        a, b = merge(a), merge(b)
    size = min(a.config.language.vocab_size, b.config.language.vocab_size)
    return _rows(a, size), _rows(b, size)


def _rows(source: Source, size: int) -> Source:
    """`source` with the first `size` rows of its vocabulary, if the others are not needed."""
    language = source.config.language
    if language.vocab_size == size:
        return source
    needed = vocabulary.needed_rows(source, size)
    if needed.rows > size:
        log.warning("rows that only one of the two has: %s", needed.text())
        return source
    log.info("%d rows of the vocabulary are not compared", language.vocab_size - size)
    return vocabulary.with_rows(source, size)


def _row(name: str, a: Leaf | None, b: Leaf | None, *, any_type: bool) -> dict[str, Any]:
    """The report's row of one parameter. any_type: it may be cast, either way, to the other's type."""
    if a is None or b is None:
        return {"name": name, "equal": False, "why": f"only in {'b' if a is None else 'a'}"}
    row: dict[str, Any] = {
        "name": name,
        "shape": list(a.shape),
        "dtypes": [dtype_name(a.dtype), dtype_name(b.dtype)],
        "equal": True,
        "not_finite": [],
    }
    if a.shape != b.shape:
        return {**row, "equal": False, "why": f"shapes {list(a.shape)}, {list(b.shape)}"}
    worst = 0.0
    for one, other in zip(a.parts, b.parts):
        x, y = one.read(), other.read()
        same = x.dtype == y.dtype and same_bytes(x, y)
        read = [(one, x)] if same else [(one, x), (other, y)]
        row["not_finite"] += [part.origin or name for part, v in read if not all_finite(v)]
        if not same and not (any_type and _same_but_for_type(x, y)):
            row["equal"] = False
            worst = max(worst, distance(x, y, nan=float(np.finfo(np.float32).max)))
    if not row["equal"]:
        same_type = row["dtypes"][0] == row["dtypes"][1]
        row |= {"why": "values" if same_type else "types", "max_abs": worst}
    return row


def _same_but_for_type(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether one is the other, cast: a base that training held in its compute type."""
    with np.errstate(over="ignore"):
        return same_bytes(x.astype(y.dtype), y) or same_bytes(x, y.astype(x.dtype))


def same_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether two arrays of one type have the same shape and bits."""
    kind = {2: np.uint16, 4: np.uint32}.get(x.dtype.itemsize)
    return np.array_equal(x, y) if kind is None else np.array_equal(x.view(kind), y.view(kind))


def _settings(a: Source, b: Source) -> dict[str, list[Any]]:
    """The settings in which the two differ, {name: [a's, b's]}.

    Left out are those that only train, and those that the format of one of them has no place for.
    """
    ignored = {
        "max_length",
        "language.pad_id",
        *_unspecified_settings(a),
        *_unspecified_settings(b),
    }
    one, other = _flat(a.config.to_dict()), _flat(b.config.to_dict())
    return {
        k: [one.get(k), other.get(k)]
        for k in sorted({*one, *other})
        if one.get(k) != other.get(k) and k not in ignored
    }


def _unspecified_settings(source: Source) -> set[str]:
    """Settings that a checkpoint says nothing about: what is read of them is a default."""
    if source.kind == "jax" or (source.kind == "hf" and "ours" in source.metadata):
        return set()
    known = {"use_im_start_end"} if source.kind in ("original", "projector") else set()
    return {"template", "use_im_start_end", "tokenizer_legacy"} - known


def _vocabulary(a: Source, b: Source) -> dict[str, list[Any]]:
    """The two sizes of the vocabulary, unless Hugging Face's format accounts for the difference."""
    large = max(b, a, key=lambda s: s.config.language.vocab_size)
    sizes = [s.config.language.vocab_size for s in (a, b)]
    more = abs(sizes[0] - sizes[1])
    if more == 0 or ("hf" in large.metadata and more <= HF_ROWS):
        return {}
    return {"language.vocab_size": sizes}


def _tokens(a: Source, b: Source) -> dict[str, list[Any]]:
    """{"token NAME": [its id in a, in b]} of added tokens that only one has, or that differ."""
    if a.tokenizer is None or b.tokenizer is None:
        return {}
    one, other = vocabulary.tokens_of(a), vocabulary.tokens_of(b)
    basic = {"<s>", "</s>", "<unk>"}  # which need not be listed
    return {
        f"token {t}": [one.ids.get(t), other.ids.get(t)]
        for t in sorted({*one.ids, *other.ids} - basic)
        if one.ids.get(t) != other.ids.get(t)
        and not (never_text(t, one.pad) or never_text(t, other.pad))
    }


def _tokenizers(a: Source, b: Source) -> dict[str, list[Any]]:
    """{"tokenizer": [a's, b's]} where only one has one, or a piece differs: the first such piece."""
    if a.tokenizer is None or b.tokenizer is None:
        found = ["its files are there" if s.tokenizer else "none" for s in (a, b)]
        return {} if found[0] == found[1] else {"tokenizer": found}
    from llava_jax.text.tokenizer import Tokenizer

    try:
        one, other = (Tokenizer.load(folder) for folder in (a.tokenizer, b.tokenizer))
    except LlavaError as error:
        return _unread_tokenizers(a.tokenizer, b.tokenizer, error)
    if one.model == other.model:
        return {}
    if one.vocab_size != other.vocab_size:
        return {"tokenizer": [f"{t.vocab_size} pieces" for t in (one, other)]}
    for i in range(one.vocab_size):
        x, y = one.token_text(i), other.token_text(i)
        if x != y:
            return {"tokenizer": [f"piece {i} is {x!r}", f"piece {i} is {y!r}"]}
    return {}


def _unread_tokenizers(a: Path, b: Path, error: LlavaError) -> dict[str, list[Any]]:
    """As `_tokenizers`, where one is not read: a damaged file is a difference, and so is another model."""
    if all((folder / "tokenizer.json").is_file() for folder in (a, b)):
        # Not LLaMA's kind, maybe: the files are compared as they are.
        models = [read_json(folder / "tokenizer.json").get("model") for folder in (a, b)]
        if models[0] == models[1] and not any((f / "tokenizer.model").exists() for f in (a, b)):
            log.warning("only the model in the tokenizer.json files is compared: %s", error)
            return {}
    return {"tokenizer": [f"in {a}", f"in {b}: {error}"]}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"language.width": 32, ...}."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


# Running the models -----------------------------------------------------------------------------


def _probe(a: Source, b: Source, logits: str, not_finite: list[str]) -> dict[str, Any]:
    """Logits and greedy tokens of a against b, and of b against torch where it is installed."""
    if logits == "no":
        return {"note": "not run: --logits no"}
    if not_finite:
        return {"note": "not run: there are weights that are not finite"}
    one, other = ({n: leaf.shape for n, leaf in merge(s).leaves.items()} for s in (a, b))
    if one != other or a.config.image_tokens != b.config.image_tokens:
        return {"note": "not run: the models are of different shapes"}
    if logits == "auto" and max(a.nbytes, b.nbytes) > MAX_PROBE:
        return {"note": "not run: the models are large (--logits yes runs them, in fp32)"}
    from llava_jax.convert import probe

    b = replace(b, tokenizer=a.tokenizer)  # the same prompt for both
    reference = probe.jax_answer(a)
    out: dict[str, Any] = {"a in JAX, b in JAX": _against(reference, probe.jax_answer(b))}
    if all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        whole = merge(b)  # transformers knows no adapters without PEFT
        if a.config.lora:
            reference = probe.jax_answer(merge(a))
        out["a in JAX, b in torch"] = _against(reference, probe.torch_answer(whole))
    else:
        out["note"] = "torch is not installed, so transformers was not run"
    return out


def logits_atol(logits: np.ndarray) -> float:
    """How far logits may be from `logits`: LOGITS_ATOL, and in proportion where any is beyond ORDINARY.

    Float32 rounds a number in proportion to its size. So where the largest logit is beyond ORDINARY, as
    with a tied head, LOGITS_ATOL / ORDINARY = 3e-6 of it is allowed, 26 times the rounding of one number.
    """
    return LOGITS_ATOL * max(1.0, float(np.abs(logits).max()) / ORDINARY)


def _against(reference: tuple[np.ndarray, list[int]], answer: tuple[np.ndarray, list[int]]) -> dict:
    """How far the (logits, tokens) of an answer are from the reference."""
    (want, wanted), (logits, tokens) = reference, answer
    same_shape = want.shape == logits.shape  # else the two read the prompt differently
    off = float(np.abs(want - logits).max()) if same_shape else float("inf")
    ok = off <= logits_atol(want) and wanted == tokens
    return {"max_abs_logits": off, "tokens": [wanted, tokens], "ok": ok}


# The report -------------------------------------------------------------------------------------


def table(report: dict[str, Any], everything: bool = False) -> str:
    """The report as text: what differs (or everything), and a verdict in the last line."""
    lines = []
    shown = [r for r in report["tensors"] if everything or not r["equal"]]
    width = max((len(r["name"]) for r in shown), default=0)
    for r in shown:
        said = "equal" if r["equal"] else f"DIFFERS ({r['why']})"
        if "max_abs" in r:
            said += f", by up to {r['max_abs']:.3g}"
        lines.append(f"{r['name']:{width}}  {said}")
    for key, (x, y) in report["config"].items():
        lines.append(f"setting {key}: {x} and {y}")
    for key, value in report["probe"].items():
        if isinstance(value, dict):
            same = "the same" if value["tokens"][0] == value["tokens"][1] else "DIFFERENT"
            value = f"logits within {value['max_abs_logits']:.3g}, {same} greedy tokens"
        lines.append(f"{'probe' if key == 'note' else key}: {value}")
    lines += [f"{name}: holds NaN or infinity" for name in report["not_finite"]]
    types = [r["dtypes"] for r in report["tensors"] if r["equal"] and len(set(r["dtypes"])) > 1]
    if types:
        kinds = sorted({" and ".join(t) for t in types})
        lines.append(f"{len(types)} tensors of the base are of another type: {', '.join(kinds)}")
    return "\n".join([*lines, _verdict(report)])


def _verdict(report: dict[str, Any]) -> str:
    """The last line: how many tensors are equal, and whether the checkpoints are."""
    rows, cast = report["tensors"], report["cast"]
    equal = sum(r["equal"] for r in rows)
    lead, same = f"{equal} of {len(rows)} tensors equal", "equal"
    if cast:
        after = f"as in the source after the {cast['kind']}"
        lead = f"{rounding_text(cast)}\n{equal} of {len(rows)} tensors {after}"
        same = f"the same but for the {cast['kind']}"
    if report["equal"]:
        return f"{lead}: the checkpoints are {same}"
    if equal == len(rows) and not report["config"] and report["not_finite"]:
        return f"{lead}: the answers cannot be compared, with weights that are not finite"
    return f"{lead}: the checkpoints are NOT equal"
