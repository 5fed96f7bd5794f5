"""llava-jax compare A B: are two checkpoints the same, tensor by tensor and in what they answer?"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert import compose, lora, vocabulary
from llava_jax.convert.cli import add_source_arguments
from llava_jax.convert.lazy import Leaf, dtype_name
from llava_jax.convert.opening import open_source
from llava_jax.convert.source import Options, Source
from llava_jax.text.vocabulary import never_text

log = logging.getLogger(__name__)

LOGITS_BAR = 1e-4  # absolute, fp32
MAX_PROBE = 4 * 10**9  # bytes of parameters beyond which the models are not run unless asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llava-jax compare`."""
    parser.add_argument("a", help="checkpoint: folder, projector file, or hub id")
    parser.add_argument("b", help="the other one")
    add_source_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE")
    parser.add_argument("--all", action="store_true", help="list every tensor, not only those off")
    parser.add_argument(
        "--logits",
        choices=("auto", "yes", "no"),
        default="auto",
        help="run both on a probe picture and prompt (auto: unless they are large)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if the checkpoints differ."""
    options = Options(args.base, args.vision_tower, args.allow_pickle)
    report = compare(args.a, args.b, options, options, logits=args.logits)
    print(table(report, everything=args.all))
    if args.json:
        write_report(report, args.json)
    return 0 if report["equal"] else 1


def compare(
    a: str | Path,
    b: str | Path,
    options_a: Options | None = None,
    options_b: Options | None = None,
    *,
    logits: str = "auto",
) -> dict[str, Any]:
    """A report on two checkpoints: "equal", "tensors" (one row each), "config", "probe".

    Vocabulary rows that Hugging Face's format added to one of them are left out of the comparison
    and counted; adapters that only one of them has are merged. Equal means byte by byte, in the
    types that both have, and logits within LOGITS_BAR with the same greedy tokens.
    """
    one, other = _aligned(open_source(a, options_a), open_source(b, options_b))
    rows = [
        _row(name, one.leaves.get(name), other.leaves.get(name))
        for name in sorted({*one.leaves, *other.leaves})
    ]
    settings = _settings(one, other) | _tokens(one, other)
    report: dict[str, Any] = {
        "a": str(a),
        "b": str(b),
        "kinds": [one.kind, other.kind],
        "tensors": rows,
        "config": settings,
        "probe": _probe(one, other, logits),
    }
    probes = [v["ok"] for v in report["probe"].values() if isinstance(v, dict)]
    report["equal"] = all(r["equal"] for r in rows) and not settings and all(probes)
    return report


def _aligned(a: Source, b: Source) -> tuple[Source, Source]:
    """Both without adapters if only one has them, and with the smaller of the two vocabularies.

    Rows that a token or training needs are not left out: the shapes then differ.
    """
    if (a.config.lora is None) != (b.config.lora is None):
        a, b = lora.merge(a), lora.merge(b)
    size = min(a.config.language.vocab_size, b.config.language.vocab_size)
    return _rows(a, size), _rows(b, size)


def _tokens(a: Source, b: Source) -> dict[str, list[Any]]:
    """{"token NAME": [its id in a, in b]} of added tokens that only one has, or that differ."""
    if a.tokenizer is None or b.tokenizer is None:
        return {}
    one, other = vocabulary.tokens_of(a), vocabulary.tokens_of(b)
    listed = {*one.ids, *other.ids} - {"<s>", "</s>", "<unk>"}  # the basic three need not be
    return {
        f"token {t}": [one.ids.get(t), other.ids.get(t)]
        for t in sorted(listed)
        if one.ids.get(t) != other.ids.get(t)
        and not (never_text(t, one.pad) or never_text(t, other.pad))
    }


def _rows(source: Source, size: int) -> Source:
    language = source.config.language
    if language.vocab_size == size:
        return source
    needed = vocabulary.needed_rows(source, size)
    if needed.rows > size:
        log.warning("rows that only one of the two has: %s", needed.said())
        return source
    log.info("%d rows of the vocabulary are not compared", language.vocab_size - size)
    config = replace(source.config, language=replace(language, vocab_size=size))
    kept = {k: v for k, v in source.kept.items() if k != "hf"}
    return replace(source, config=config, leaves=compose.cut(source.leaves, size), kept=kept)


def _row(name: str, a: Leaf | None, b: Leaf | None) -> dict[str, Any]:
    if a is None or b is None:
        return {"name": name, "equal": False, "why": f"only in {'b' if a is None else 'a'}"}
    row: dict[str, Any] = {
        "name": name,
        "shape": list(a.shape),
        "dtypes": [dtype_name(a.dtype), dtype_name(b.dtype)],
        "equal": True,
    }
    if a.shape != b.shape:
        return {**row, "equal": False, "why": f"shapes {list(a.shape)}, {list(b.shape)}"}
    worst = 0.0
    for x, y in zip(a.parts, b.parts):
        x, y = x.read(), y.read()
        if x.dtype == y.dtype and _same_bytes(x, y):
            continue
        row["equal"] = False
        worst = max(worst, float(np.abs(x.astype(np.float32) - y.astype(np.float32)).max()))
    if not row["equal"]:
        same_type = row["dtypes"][0] == row["dtypes"][1]
        row |= {"why": "values" if same_type else "types", "max_abs": worst}
    return row


def _same_bytes(x: np.ndarray, y: np.ndarray) -> bool:
    kind = {2: np.uint16, 4: np.uint32}.get(x.dtype.itemsize)
    return np.array_equal(x, y) if kind is None else np.array_equal(x.view(kind), y.view(kind))


def _settings(a: Source, b: Source) -> dict[str, list[Any]]:
    """The settings in which the two differ, {name: [a's, b's]}; those that only train are left out."""
    ignored = {"template", "max_length", "use_im_start_end", "tokenizer_legacy", "language.pad_id"}
    one, other = _flat(a.config.to_dict()), _flat(b.config.to_dict())
    return {
        k: [one.get(k), other.get(k)]
        for k in sorted({*one, *other})
        if one.get(k) != other.get(k) and k not in ignored
    }


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


# Asking the models ------------------------------------------------------------------------------


def _probe(a: Source, b: Source, logits: str) -> dict[str, Any]:
    """Logits and greedy tokens of a against b, and of b against torch where it is installed."""
    if logits == "no":
        return {"note": "not asked for"}
    if a.config.language.vocab_size != b.config.language.vocab_size:
        return {"note": "the vocabularies differ: not run"}
    if logits == "auto" and max(a.nbytes, b.nbytes) > MAX_PROBE:
        return {"note": "the models are large: --logits yes runs them, in fp32"}
    from llava_jax.convert import probe

    b = replace(b, tokenizer=a.tokenizer)  # the same prompt for both
    reference = probe.jax_answer(a)
    out: dict[str, Any] = {"a in JAX, b in JAX": _against(reference, lambda: probe.jax_answer(b))}
    if all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
        whole = lora.merge(b)  # transformers knows no adapters without PEFT
        if a.config.lora:
            reference = probe.jax_answer(lora.merge(a))
        out["a in JAX, b in torch"] = _against(reference, lambda: probe.torch_answer(whole))
    else:
        out["note"] = "torch is not installed: not asked"
    return out


def _against(reference, answer: Callable) -> dict[str, Any]:
    logits, tokens = answer()
    off = float(np.abs(reference[0] - logits).max())
    same = reference[1] == tokens
    return {
        "max_abs_logits": off,
        "tokens": [reference[1], tokens],
        "ok": bool(off <= LOGITS_BAR and same),
    }


# The report -------------------------------------------------------------------------------------


def table(report: dict[str, Any], everything: bool = False) -> str:
    """The report as text: what is off (or everything), and a verdict in the last line."""
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
            same = "the same" if value["tokens"][0] == value["tokens"][1] else "OTHER"
            lines.append(
                f"{key}: logits within {value['max_abs_logits']:.3g}, {same} greedy tokens"
            )
        else:
            lines.append(f"probe: {value}")
    equal = sum(r["equal"] for r in report["tensors"])
    verdict = "equal" if report["equal"] else "NOT equal"
    lines.append(
        f"{equal} of {len(report['tensors'])} tensors equal: the checkpoints are {verdict}"
    )
    return "\n".join(lines)


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """The report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
