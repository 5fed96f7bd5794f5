"""`llava-jax inspect`: what a checkpoint is, or what training makes of a sample. Imports no jax."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.config import LlavaConfig
from llava_jax.errors import LlavaError, SampleError, counted
from llava_jax.params import component, is_run

if TYPE_CHECKING:
    from llava_jax.convert import Source
    from llava_jax.text.tokenizer import Tokenizer

DATA_SUFFIXES = {".json", ".jsonl", ".ndjson"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llava-jax inspect`: a checkpoint, or a data file and which sample of it."""
    from llava_jax.convert.cli import add_source_arguments

    parser.add_argument(
        "path", help="a checkpoint (folder, projector file or hub id), or a training data file"
    )
    whole = parser.add_argument_group("a checkpoint")
    whole.add_argument("--tensors", action="store_true", help="list every parameter")
    whole.add_argument(
        "--values", action="store_true", help="read all weights and name those with NaN or infinity"
    )
    whole.add_argument("--json", action="store_true", help="print JSON instead of text")
    whole.add_argument("--template", metavar="NAME", help="replaces the checkpoint's template")
    add_source_arguments(whole)
    sample = parser.add_argument_group("a training sample")
    sample.add_argument(
        "--sample", default="0", help="its index in the file, or its id (default 0)"
    )
    sample.add_argument(
        "--model",
        help="checkpoint that gives tokenizer and template, or a tokenizer.model (default: tiny)",
    )
    sample.add_argument(
        "--image-folder",
        metavar="DIR",
        help="what its images are below, which are then opened as training would; without it they "
        "are looked for beside the file and in the current folder",
    )
    sample.add_argument(
        "--version", help="conversation template: v1, plain, ... (default: the model's)"
    )
    sample.add_argument(
        "--turns",
        choices=("conversation", "independent"),
        default="conversation",
        help="independent: questions about an image do not see each other",
    )
    sample.add_argument("--compat", action="store_true", help="the original's exact labels")
    sample.add_argument("--tokens", action="store_true", help="list every token")
    sample.add_argument("--color", choices=("auto", "always", "never"), default="auto")


def run(args: argparse.Namespace) -> int:
    """Prints what `args.path` is; 1 if --values finds a weight that is not a finite number."""
    if Path(args.path).suffix in DATA_SUFFIXES:
        refuse_without_effect(args, is_data=True)
        show_sample(args)
        return 0
    source = open_checkpoint(args.path, args)
    refuse_without_effect(args, is_data=False)
    facts = checkpoint_facts(source, args.path)
    if args.values:
        from llava_jax.convert.values import not_finite

        facts["not_finite"] = not_finite(source)
    as_text = checkpoint_text(source.config, facts, args.tensors)
    print(json.dumps(facts, indent=2) if args.json else as_text)
    return 1 if facts.get("not_finite") else 0


# What --help lists under each of the two headings, with what it is when it is not given.
_OF_CHECKPOINT = {"tensors": False, "values": False, "json": False}
_OF_SAMPLE = {
    **{"sample": "0", "model": None, "image_folder": None, "version": None},
    **{"turns": "conversation", "compat": False, "tokens": False},
}


def refuse_without_effect(args: argparse.Namespace, is_data: bool) -> None:
    """Raises LlavaError for an option of a checkpoint beside a data file, and the other way round."""
    for name, unset in (_OF_CHECKPOINT if is_data else _OF_SAMPLE).items():
        if getattr(args, name) != unset:
            option = f"--{name.replace('_', '-')}"
            of, is_ = ("a checkpoint", "data") if is_data else ("training data", "a checkpoint")
            raise LlavaError(f"{option} is for {of}, and {args.path} is {is_}")


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


# A training sample ------------------------------------------------------------------------------


def show_sample(args: argparse.Namespace) -> None:
    """Prints a sample of the data file `args.path` as training would see it.

    Raises SampleError when there is no such sample, or when training could not use it.
    """
    from llava_jax.data.records import check_record
    from llava_jax.text.conversation import find_template
    from llava_jax.text.example import LEFT_OUT, TRUNCATED
    from llava_jax.text.records import record_id
    from llava_jax.text.sample import ExampleMaker
    from llava_jax.text.show import show_example
    from llava_jax.util import printable

    if args.version:  # as the original, ExampleMaker would take any name for vicuna_v1
        find_template(args.version)
    index, record = find_record(args.path, args.sample)
    check_record(record, f"{Path(args.path).name}[{index}]")
    tokenizer, config = prompt_of(args)
    make = ExampleMaker(
        tokenizer,
        version=args.version or config.template,
        max_length=config.max_length,
        image_tokens=config.image_tokens,
        turns=args.turns,
        compat=args.compat,
        use_im_start_end=config.use_im_start_end,
    )
    example = make(record, record_id(record, index))
    missing = missing_images(example.images, args, config)
    colour = {"always": True, "never": False, "auto": None}[args.color]
    print(
        show_example(
            example, tokenizer, image_tokens=config.image_tokens, colour=colour, table=args.tokens
        )
    )
    for note, count in sorted(example.notes.items()):
        limit = f" at {limit_of(config)}" if note in (TRUNCATED, LEFT_OUT) else ""
        print(f"\nnote: {note}{limit} ({count})")
    for line in missing:
        print(f"\nnote: {printable(line)}")


def missing_images(
    images: Sequence[Any], args: argparse.Namespace, config: LlavaConfig
) -> list[str]:
    """A line for each image that is not a file where it is looked for without --image-folder.

    Raises ImageError where --image-folder is given and training could not use an image in it.
    """
    names = dict.fromkeys(map(str, images))
    if args.image_folder is not None:
        from llava_jax.data.pixels import Cache, ImageStore

        store = ImageStore("", config, Cache(0))
        for name in names:
            store.pixels(str(Path(args.image_folder) / name))
        return []
    places = dict.fromkeys((Path(args.path).parent, Path()))
    return [
        f"image {name} is no file below {' or '.join(str(p.absolute()) for p in places)}; "
        "--image-folder names its folder"
        for name in names
        if not any((place / name).is_file() for place in places)
    ]


def limit_of(config: LlavaConfig) -> str:
    """Where `inspect` cuts a sample, in words."""
    return (
        f"{config.max_length} positions, the max_length of the model's config, which has "
        f"{config.language.max_positions:,}; in training data.max_length is the limit"
    )


def find_record(path: str, wanted: str) -> tuple[int, Any]:
    """(index, record) of the sample whose id is `wanted`, else of the one at that index.

    Ids go first; the heading says which of the two was found.
    """
    from llava_jax.data.records import read_records
    from llava_jax.text.records import record_id

    records = read_records(path)
    if not records:
        raise SampleError(f"{path}: there are no samples")
    for i, record in enumerate(records):
        if record_id(record, i) == wanted:
            return i, record
    if wanted.lstrip("-").isdigit() and -len(records) <= int(wanted) < len(records):
        return int(wanted) % len(records), records[int(wanted)]
    raise SampleError(
        f"{path}: no sample {wanted!r}", fix=f"give an id, or an index from 0 to {len(records) - 1}"
    )


def prompt_of(args: argparse.Namespace) -> tuple[Tokenizer, LlavaConfig]:
    """(tokenizer, config) of --model: a checkpoint, or a tokenizer.model with LLaVA-1.5's config."""
    from llava_jax.text.tokenizer import Tokenizer
    from llava_jax.text.vocabulary import load_fitting

    if args.model is None:
        note = "tokens of tiny, the small model that comes with llava_jax: --model names another"
        print(note, file=sys.stderr)
    model = args.model or "tiny"
    if model.endswith(".model") and Path(model).is_file():
        return Tokenizer.load(model), LlavaConfig.v15_7b()
    source = open_checkpoint(model, args)
    rows = source.config.language.vocab_size
    return load_fitting(source.tokenizer, rows, model), source.config
