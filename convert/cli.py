"""llava-jax convert SRC DST --to FORMAT."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llava_jax.errors import ConfigError

if TYPE_CHECKING:
    from llava_jax.convert import Options, Source

# Options that only some formats use.
_ONLY_TO = {
    "layout": ("hf", "peft"),
    "tower": ("original",),
    "quantize": ("gguf",),
    "shard_size": ("jax", "hf", "original"),
    "template": ("jax", "hf", "original"),
}
FORMATS = ("jax", "hf", "original", "projector", "lora", "peft", "gguf")
PARTS = ("projector", "lora", "peft")  # of a model, without its base


def add_source_arguments(parser: argparse._ActionsContainer) -> None:
    """The options of how to open a checkpoint."""
    parser.add_argument(
        "--base", help="model that an adapter, projector or delta belongs to (folder or hub id)"
    )
    parser.add_argument(
        "--vision-tower", help="CLIP folder or hub id, in place of the one the checkpoint names"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read .bin files (their tensors, nothing else)"
    )


def given_files(args: argparse.Namespace, *checkpoints: str) -> list[Path]:
    """The local folders and files of `checkpoints` and of what the source options name."""
    from llava_jax.convert.io import hub

    names = [*checkpoints, args.base, args.vision_tower]
    return [hub.local(name) for name in names if name is not None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llava-jax convert`."""
    parser.add_argument("src", help="checkpoint: folder, projector file, or hub id")
    parser.add_argument("dst", help="folder to write; it appears complete or not at all")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    add_source_arguments(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the source's")
    parser.add_argument(
        "--mixed-types",
        action="store_true",
        help="with --dtype: cast even where tensors of one component differ in type",
    )
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template, in place of the source's"
    )
    parser.add_argument("--merge", action="store_true", help="add LoRA updates into the kernels")
    parser.add_argument("--shard-size", help="largest weight file (default 5GB)")
    parser.add_argument(
        "--layout",
        choices=("hf", "hf5", "hf5_memory", "hf4_memory"),
        help="tensor names of --to hf (default: the source's, else hf, those on the hub)",
    )
    parser.add_argument(
        "--tower",
        choices=("inside", "folder", "none"),
        help="where --to original puts the vision tower (default: where it was)",
    )
    parser.add_argument(
        "--projector",
        help="kind of a new projector (CLIP + language model; default mlp2x_gelu)",
    )
    parser.add_argument("--seed", type=int, help="of a new projector (default 0)")
    parser.add_argument(
        "--quantize",
        choices=("f16", "q8_0", "f32"),
        help="weight type of --to gguf (default f16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST if it is a checkpoint"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the result with the source afterwards (not for gguf)",
    )
    parser.add_argument("--report", help="with --check: write the report to this JSON file")


def run(args: argparse.Namespace) -> int:
    """Converts, and with --check compares; 1 if the comparison finds a difference."""
    from tqdm import tqdm

    _refuse_idle(args)
    from llava_jax.convert import Options, Target, convert
    from llava_jax.convert.formats.gguf import write_gguf
    from llava_jax.convert.io.output import DEFAULT_SHARD, check_free, parse_size
    from llava_jax.util import refuse_input

    options = Options(
        base=args.base,
        vision_tower=None if _only_checked(args) else args.vision_tower,
        allow_pickle=args.allow_pickle,
        dtype=args.dtype,
        merge=args.merge,
        projector=args.projector,
        seed=args.seed,
        mixed=args.mixed_types,
        template=args.template,
    )
    target = Target(
        to=args.to,
        layout=args.layout,
        tower=args.tower,
        shard_size=parse_size(args.shard_size or DEFAULT_SHARD),
        overwrite=args.overwrite,
    )
    source, quiet, overwrite = None, not sys.stderr.isatty(), args.overwrite
    check_free(Path(args.dst), overwrite)
    if args.check:
        _refuse_unreadable(args)
        if args.report:
            refuse_input(args.report, given_files(args, args.src, args.dst))
    with tqdm(unit="B", unit_scale=True, desc=f"to {args.to}", disable=quiet) as bar:
        if args.to == "gguf":
            write_gguf(args.src, args.dst, options, args.quantize or "f16", overwrite, bar.update)
        else:
            source = convert(args.src, args.dst, target, options, bar.update)
    print(args.dst)
    return _check(args, options, source) if source and args.check else 0


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that has no effect with the others."""
    for name, formats in _ONLY_TO.items():
        if getattr(args, name) is not None and args.to not in formats:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --to {args.to}",
                fix=f"it is for --to {', '.join(formats)}",
            )
    if args.report is not None and not args.check:
        raise ConfigError("--report has no effect without --check", fix="add --check")


def _refuse_unreadable(args: argparse.Namespace) -> None:
    """Raises WeightError, before anything is written, for what --check could not read back.

    A PEFT adapter says nothing of tower and settings: it is read back over a LLaVA only. A base or a
    tower that only the check reads is opened here, so that its pickles need --allow-pickle as well.
    """
    from llava_jax.convert import Options, open_source
    from llava_jax.convert.io import hub
    from llava_jax.convert.io.folder import read_folder
    from llava_jax.convert.source import identify
    from llava_jax.errors import WeightError

    if args.to == "gguf":
        raise WeightError(
            "--check cannot read GGUF back", fix="leave it out, and try the files in llama.cpp"
        )
    if args.vision_tower:
        read_folder(hub.resolve(args.vision_tower, args.allow_pickle), args.allow_pickle)
    named = _base_of(args)
    if named is None or args.to not in PARTS:
        return
    base = hub.resolve(named, args.allow_pickle)
    if identify(base) != "llama":
        open_source(base, Options(None, args.vision_tower, args.allow_pickle))
    elif args.to == "peft":
        raise WeightError(
            "--check of a PEFT adapter needs a LLaVA as --base, not a language model",
            fix="leave out --check, or check --to lora",
        )
    else:
        read_folder(base, args.allow_pickle)


def _only_checked(args: argparse.Namespace) -> bool:
    """Whether --vision-tower is not for SRC, but for --check to read DST with."""
    from llava_jax.convert.checkpoint import holds_tower

    lacks_tower = args.to in PARTS or args.tower == "none"
    return args.check and lacks_tower and holds_tower(args.src, args.allow_pickle)


def _base_of(args: argparse.Namespace) -> str | Path | None:
    """The base that SRC lies over: of the option, or the one that an adapter names."""
    from llava_jax.convert.formats.adapter import named_base
    from llava_jax.convert.io import hub
    from llava_jax.convert.source import identify

    path = hub.resolve(args.src, args.allow_pickle)
    return args.base or (named_base(path) if identify(path) == "lora" else None)


def _check(args: argparse.Namespace, options: Options, source: Source) -> int:
    from dataclasses import replace

    from llava_jax.convert import Options, compare
    from llava_jax.convert.checkpoint import MERGED, holds_tower
    from llava_jax.convert.formats.tower import find_tower
    from llava_jax.convert.io import hub
    from llava_jax.util import write_json

    # What was just written may hold pickles of ours.
    back = Options(allow_pickle=True, merge=options.merge)
    if args.to in PARTS:  # read back on the same base
        # The tower beside the source, which its parts name relative to themselves, would not be found.
        path = hub.resolve(args.src, args.allow_pickle)
        name = ((source.metadata.get("original") or {}).get("tower") or {}).get("name") or ""
        tower = find_tower(str(name), path.parent if path.is_file() else path, options, must=False)
        base = _base_of(args) or args.src
        back = replace(back, base=base, vision_tower=None if holds_tower(base) else tower)
    elif args.tower == "none":
        back = replace(back, vision_tower=args.vision_tower)
    if args.to in MERGED:
        options = replace(options, merge=True)
    report = compare.compare(args.src, args.dst, options, back, part=args.to in PARTS)
    print(compare.table(report))
    if args.report:
        write_json(args.report, report, indent=2, ensure_ascii=False)
    return 0 if report["equal"] else 1
