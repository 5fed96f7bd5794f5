"""`llava-jax inspect`: what a checkpoint is. Imports no jax."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.config import LlavaConfig
from llava_jax.errors import LlavaError, counted
from llava_jax.params import component, is_run

if TYPE_CHECKING:
    from llava_jax.convert import Source

DATA_SUFFIXES = {".json", ".jsonl", ".ndjson"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llava-jax inspect`."""
    from llava_jax.convert.cli import add_source_arguments

    parser.add_argument("path", help="a checkpoint: folder, projector file or hub id")
    parser.add_argument("--tensors", action="store_true", help="list every parameter")
    parser.add_argument(
        "--values", action="store_true", help="read all weights and name those with NaN or infinity"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--template", metavar="NAME", help="replaces the checkpoint's template")
    add_source_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what `args.path` is; 1 if --values finds a weight that is not a finite number."""
    if Path(args.path).suffix in DATA_SUFFIXES and Path(args.path).is_file():
        raise LlavaError(f"{args.path} is training data", fix=f"llava-jax data show {args.path}")
    source = open_checkpoint(args.path, args)
    facts = checkpoint_facts(source, args.path)
    if args.values:
        from llava_jax.convert.values import not_finite

        facts["not_finite"] = not_finite(source)
    as_text = checkpoint_text(source.config, facts, args.tensors)
    print(json.dumps(facts, indent=2) if args.json else as_text)
    return 1 if facts.get("not_finite") else 0


# A checkpoint -----------------------------------------------------------------------------------


def open_checkpoint(path: str, args: argparse.Namespace) -> Source:
    """The checkpoint with nothing but headers read. Raises WeightError for what is wrong with it."""
    from llava_jax.convert import Options, open_source

    options = Options(
        base=args.base,
        vision_tower=args.vision_tower,
        allow_pickle=args.allow_pickle,
        template=args.template,
    )
    return open_source(path, options)


def checkpoint_facts(source: Source, path: str) -> dict[str, Any]:
    """Everything `inspect` knows of a checkpoint without reading a weight, JSON-ready.

    "parameters" and "bytes" are totals; "parts" has them for each component, with the dtypes found.
    """
    from llava_jax.convert import KINDS
    from llava_jax.convert.io.lazy import dtype_name

    tensors, parts = {}, {}
    for name, leaf in sorted(source.leaves.items()):
        dtype, count = dtype_name(leaf.dtype), math.prod(leaf.shape)
        tensors[name] = {"shape": list(leaf.shape), "dtype": dtype, "bytes": leaf.nbytes}
        title = component(name) if is_run(name) else f"{component(name)} (not run)"
        part = parts.setdefault(title, {"parameters": 0, "bytes": 0, "dtypes": Counter()})
        part["parameters"] += count
        part["bytes"] += leaf.nbytes
        part["dtypes"][dtype] += count
    return {
        "path": str(path),
        "format": KINDS.get(source.kind, source.kind),
        "config": source.config.to_dict(),
        "image_tokens": source.config.image_tokens,
        "parameters": sum(p["parameters"] for p in parts.values()),
        "bytes": source.nbytes,
        "parts": parts,
        "files": [str(f) for f in source.files],
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
        "tensors": tensors,
    }


def checkpoint_text(config: LlavaConfig, facts: dict[str, Any], tensors: bool = False) -> str:
    """The facts for a person: about ten lines, and one per parameter with `tensors`."""
    vision, language = config.vision, config.language
    side = vision.image_size // vision.patch_size
    kv_bytes = 2 * 2 * language.layers * language.kv_heads * language.head_width
    rows = {
        "format": facts["format"],
        "vision": f"CLIP, {vision.image_size} px, patch {vision.patch_size} ({side}x{side}), "
        f"{vision.layers} layers, width {vision.width}; features of layer {config.feature_layer}",
        "projector": f"{config.projector}, {vision.width} -> {language.width}",
        "language": f"{language.layers} layers, width {language.width}, {language.heads} heads "
        f"({language.kv_heads} for keys), vocabulary {language.vocab_size}",
        "prompt": f"template {config.template}, {config.image_tokens} tokens per image "
        f"({config.image_aspect_ratio}), context {language.max_positions}",
    }
    if config.lora:
        kinds = ", rsLoRA" * config.lora.rslora + ", DoRA" * config.lora.dora
        parts = sorted({name.partition(".")[0] for name in config.lora.targets})
        rows["lora"] = (
            f"rank {config.lora.rank}, alpha {config.lora.alpha:g}{kinds}; "
            f"on {counted(len(config.lora.targets), 'linear layer')} of {' and '.join(parts)}"
        )
    rows["weights"] = f"{facts['parameters']:,} parameters, {in_bytes(facts['bytes'])}"
    for name, part in facts["parts"].items():
        types = ", ".join(dtype for dtype, _ in part["dtypes"].most_common())
        rows[f"  {name}"] = f"{part['parameters']:,} ({types}, {in_bytes(part['bytes'])})"
    rows |= {
        "cache": f"{in_bytes(kv_bytes)} per token in bf16",
        "tokenizer": facts["tokenizer"] or "none: its files are missing",
        "files": file_list(facts["files"]),
    }
    if "not_finite" in facts:
        bad = facts["not_finite"]
        rows["values"] = f"NaN or infinity in {first(bad, 10)}" if bad else "all finite"
    width = max(map(len, rows)) + 2
    lines = [facts["path"], *(f"  {name:{width}}{text}" for name, text in rows.items())]
    if tensors:
        lines += [
            f"  {name}  {t['dtype']}{t['shape']}  {in_bytes(t['bytes'])}"
            for name, t in facts["tensors"].items()
        ]
    return "\n".join(lines)


def file_list(files: list[str]) -> str:
    """The names of the first files, with their folders where two are alike, and how many more."""
    paths = [Path(f) for f in files]
    count = Counter(p.name for p in paths)
    names = [p.name if count[p.name] == 1 else f"{p.parent.name}/{p.name}" for p in paths]
    return first(names, 3) or "none"


def first(names: list[str], limit: int) -> str:
    """The first `limit` names, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def in_bytes(n: float) -> str:
    """A number of bytes for a person: 14.1 GB."""
    if n < 1000:
        return f"{n:.0f} B"
    for unit in ("kB", "MB"):
        n /= 1000
        if n < 1000:
            return f"{n:.1f} {unit}"
    return f"{n / 1000:.1f} GB"
