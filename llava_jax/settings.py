"""Every setting of training and generation: its type, default, limits and meaning. Imports no jax.

A table is a frozen dataclass whose fields are made by `setting`. The ConfigDict of configs/common.py,
the checks and their messages, `llava-jax train --show`, command-line options and docs/settings.md are
all made from these tables. After changing one:

    python -m llava_jax.settings > docs/settings.md
"""

import argparse
import ast
import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llava_jax.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    low, high: the closed interval of allowed numbers; above, below: the same, open. They and `choices`
    apply to each element of a tuple. needs: the setting without which this one has no effect, as
    NAME (must be set) or NAME=VALUE (must be, or contain, VALUE). resume: may differ when a run is
    resumed. host: each process of a run may have its own value. aliases: names in other programs.
    """

    name: str
    type: Any
    default: Any
    meaning: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()
    needs: str = ""
    resume: bool = False
    host: bool = False
    aliases: str = ""

    @property
    def limits(self) -> str:
        """The allowed numbers in words: "from 0 to 1", "above 0 and at most 1"; "" for all."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"from {self.low:,} to {self.high:,}"
        low = ("at least", self.low), ("above", self.above)
        high = ("at most", self.high), ("below", self.below)
        return " and ".join(f"{word} {n:,}" for word, n in (*low, *high) if math.isfinite(n))

    def allows(self, number: Any) -> bool:
        """Whether a number is within the limits."""
        return self.low <= number <= self.high and self.above < number < self.below


def setting(default: Any, meaning: str, **columns: Any) -> Any:
    """A field of a table; `columns` are those of Setting. aliases: words with spaces between them."""
    return field(default=default, metadata={"meaning": meaning, **columns})


def rows(table: Any, prefix: str = "") -> dict[str, Setting]:
    """{dotted name: row} of a table and of the tables that its fields hold."""
    found, types = {}, get_type_hints(table)
    for f in fields(table):
        name, kind = f"{prefix}{f.name}", types[f.name]
        if is_dataclass(kind):
            found |= rows(kind, f"{name}.")
        else:
            found[name] = Setting(name, kind, f.default, **f.metadata)
    return found


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in nested groups."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Tables --------------------------------------------------------------------------------------------
# fmt: off


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How an answer is generated."""

    max_new_tokens: int = setting(512, "longest answer in tokens, end token included", low=1)
    temperature: float = setting(0.0, "0: the most likely token (greedy); higher: more random",
        low=0, high=100)
    top_k: int = setting(0, "sample from this many most likely tokens; 0: all", low=0, below=2**63)
    top_p: float = setting(1.0, "sample from the most likely tokens that reach this probability",
        above=0, high=1)
    seed: int | None = setting(None, "makes a sampled answer repeatable; None: a new one",
        low=-(2**63), below=2**63)
    stop: str | tuple[str, ...] = setting((), "strings that end the answer, besides the template's")
    system: str | None = setting(None, "replaces the template's system prompt")
    template: str | None = setting(None, "conversation template; None: the model's")

    def __post_init__(self):
        check_all(SAMPLING, {name: getattr(self, name) for name in SAMPLING})


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may be at most. All but max_bytes are judged from its header."""

    max_bytes: int = setting(32 * 2**20, "bytes of an image file", low=1)
    # Pillow itself opens no larger image than `high`.
    max_pixels: int = setting(50_000_000, "width times height of an image", low=1, high=178_956_970)
    max_side: int = setting(8192, "pixels of an image's longer side", low=1)
    max_decode_bytes: int = setting(280 * 2**20, "estimated peak memory of decoding an image",
        low=1)
    max_decode_work: float = setting(500e6,
        "estimated work of decoding, in pixels of a plain decode", above=0)


@dataclass(frozen=True)
class ModelGroup:
    """The model to start from: a folder or hub id of any format `llava-jax convert` reads."""

    init: str = setting("", "checkpoint folder or hub id to start from", host=True,
        aliases="model model_path model.path model.name model_name_or_path pretrain_mm_mlp_adapter")
    base: str = setting("", "language model for a LoRA, delta or projector-only checkpoint",
        host=True)
    vision_tower: str = setting("", "CLIP folder or hub id, for a checkpoint without its own",
        host=True)
    allow_pickle: bool = setting(False, "read torch .bin files, which hold pickles", resume=True)


@dataclass(frozen=True, kw_only=True)
class DataGroup(ImageLimits):
    """The training data. Lengths are in tokens, image features counted."""

    path: str | tuple[str, ...] = setting("",
        "LLaVA JSON or JSON lines; several: a tuple, or with commas", resume=True, host=True,
        aliases="data data_paths dataset dataset_path train_data train_file")
    image_folder: str | tuple[str, ...] = setting("",
        "folder of the images: one for all files, or one per file", resume=True, host=True,
        aliases="data_root image_dir images")
    weights: tuple[float, ...] = setting((), "how often an epoch shows each file; empty: once",
        low=0)
    version: str = setting("v1", "conversation template: plain, v1, llama_2, mpt, ...")
    turns: str = setting("conversation",
        "independent: questions about an image do not see each other",
        choices=("conversation", "independent"))
    turns_per_sample: int = setting(0, "independent turns drawn anew in each epoch; 0: all", low=0,
        needs="data.turns=independent")
    image_aspect_ratio: str = setting("", "how an image is made square; empty: as the model says",
        choices=("", "pad", "square"))
    max_length: int | None = setting(2048, "longer samples are cut; 0: as the model says", low=0,
        aliases="max_seq_len max_seq_length model_max_length")
    shuffle: bool = setting(True, "a new order in each epoch")
    group_by_modality: bool = setting(False, "batches of one modality and of similar lengths",
        aliases="group_by_modality_length")
    groups: int = setting(1, "the original's number of devices, for its exact grouping by length",
        low=1, needs="data.group_by_modality")
    pack: bool = setting(False, "several samples in one row", aliases="packing")
    row_multiple: int = setting(0, "packed rows are a multiple of this; 0: an eighth of the batch",
        low=0, needs="data.pack")
    length_buckets: tuple[int, ...] = setting(
        (128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048),
        "rows are padded to one of these lengths; each compiles once", low=1)
    image_buckets: tuple[int, ...] = setting((0, 1, 2, 4, 8, 16, 32, 64),
        "image slots per row, padded likewise", low=0)
    target_buckets: tuple[int, ...] = setting((),
        "trained positions per row, padded likewise; empty: powers of two", low=1)
    holdout: float = setting(0.0,
        "fraction of the images held out of training and scored at the end", low=0, below=1,
        aliases="val_split validation_split")
    holdout_seed: int = setting(0, "seed that selects the held-out images", needs="data.holdout")
    holdout_side: str = setting("train", "held: read the held-out part instead",
        choices=("train", "held"))
    bad_samples: str = setting("skip", "error: stop at the first bad sample",
        choices=("skip", "error"), resume=True)
    bad_limit: float = setting(0.1, "stop when more than this fraction of the samples is bad",
        low=0, high=1, resume=True)
    compat: bool = setting(False, "the original's exact labels, whole-sample masking included")
    cache_images: bool = setting(False, "keep decoded images and token ids in memory", resume=True,
        host=True)
    cache_mb: int = setting(2048, "size of that cache", low=0, needs="data.cache_images",
        resume=True, host=True)
    augment: str = setting("",
        "shifts by up to 4 pixels, with or without mirroring (tiny data sets)",
        choices=("", "shift4", "flip_shift4"))
    threads: int = setting(4, "threads that read images", low=0, resume=True, host=True,
        aliases="num_workers dataloader_num_workers")
    prefetch: int = setting(8, "batches prepared ahead", low=0, resume=True, host=True)


@dataclass(frozen=True)
class MeshGroup:
    """Devices per mesh axis. One axis may be -1: all devices that remain."""

    data: int = setting(1, "devices along the batch, each with a copy of the model", resume=True)
    fsdp: int = setting(-1, "devices that share parameters, optimizer state and batch", resume=True)
    context: int = setting(1, "devices that share the positions of each row, and parameters",
        resume=True, aliases="context_parallel_size sequence_parallel_size")
    tensor: int = setting(1, "devices that share the width of each layer", resume=True,
        aliases="tensor_parallel_size")


@dataclass(frozen=True)
class TrainSettings:
    """A training run. A step takes batch_size samples, in grad_accum micro-batches."""

    name: str = setting("train", "name of the run and of its folder in runs/", resume=True,
        aliases="run_name")
    seed: int = setting(42, "seed of data order, new parameters and dropout", low=0,
        aliases="data_seed")
    model: ModelGroup = ModelGroup()
    trainable: tuple[str, ...] = setting(("projector", "language"),
        "parts of the model that are trained",
        choices=("projector", "language", "embed", "lora", "vision"),
        aliases="lora_enable tune_mm_mlp_adapter")
    lora_rank: int = setting(0, "rank of new LoRA adapters; 0: none", low=0, aliases="lora_r")
    lora_alpha: float = setting(256.0, "adapters are scaled by alpha / rank", low=0,
        needs="lora_rank")
    lora_dropout: float = setting(0.05, "dropout before the adapters", low=0, high=1,
        needs="lora_rank", aliases="dropout drop_out")
    data: DataGroup = DataGroup()
    batch_size: int = setting(128, "samples per step, over all devices", low=1,
        aliases="train_batch_size per_device_train_batch_size")
    grad_accum: int = setting(1, "micro-batches per step", low=1,
        aliases="gradient_accumulation_steps grad_accumulation accumulate_grad_batches")
    epochs: float = setting(1.0, "passes over the data", low=0,
        aliases="num_train_epochs num_epochs max_epochs")
    steps: int = setting(0, "optimizer steps; 0: from epochs", low=0,
        aliases="max_steps total_steps")
    optimizer: str = setting("adamw", "update rule", choices=("adamw", "muon"), aliases="optim")
    lr: float = setting(2e-5, "peak learning rate", low=0, aliases="learning_rate")
    projector_lr: float | None = setting(None, "the projector's peak rate; None: lr", low=0,
        needs="trainable=projector", aliases="mm_projector_lr")
    vision_lr: float | None = setting(None, "the vision tower's peak rate; None: lr", low=0,
        needs="trainable=vision", aliases="mm_vision_tower_lr")
    warmup_ratio: float = setting(0.03, "fraction of the steps in which the rate rises", low=0,
        high=1, aliases="warmup_steps")
    lr_end_ratio: float = setting(0.0, "the cosine ends at this fraction of the peak", low=0,
        high=1)
    weight_decay: float = setting(0.0, "decay of matrices; norms and biases have none", low=0,
        aliases="wd")
    b1: float = setting(0.9, "Adam's decay of the gradients' mean", low=0, high=1,
        aliases="adam_beta1 beta1")
    b2: float = setting(0.999, "Adam's decay of their squares' mean", low=0, high=1,
        aliases="adam_beta2 beta2")
    eps: float = setting(1e-8, "Adam's epsilon", low=0, aliases="adam_epsilon")
    muon_adam_lr_ratio: float = setting(0.15,
        "rate of what Muon leaves to Adam, as a fraction of lr", low=0, needs="optimizer=muon")
    clip_norm: float = setting(1.0, "largest global norm of the gradients; 0: no clipping", low=0,
        aliases="max_grad_norm grad_clip")
    loss_average: str = setting("global",
        "average over the tokens of a step (global) or over its micro-batches (micro, as the original)",
        choices=("global", "micro"))
    loss_groups: int = setting(1,
        "row groups averaged one by one: the original's number of devices", low=1)
    mesh: MeshGroup = MeshGroup()
    dtype: str = setting("bfloat16", "type of the computation; trained parameters stay float32",
        choices=("float32", "bfloat16"), aliases="bf16 fp16 precision")
    remat: str = setting("full", "what the backward pass recomputes: full saves the most memory",
        choices=("none", "dots", "full"), resume=True, aliases="gradient_checkpointing")
    unroll_layers: bool = setting(False, "no loop over layers: faster for tiny models", resume=True)
    attention: str = setting("", "attention kernel; empty: jax chooses",
        choices=("", "xla", "cudnn"), resume=True, aliases="attn_implementation")
    save_every: int = setting(500, "steps between checkpoints", low=1, resume=True,
        aliases="save_steps save_interval checkpoint_every")
    save_minutes: float = setting(30.0,
        "also save after this many minutes without a checkpoint; 0: never", low=0, resume=True)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints to keep", low=1,
        resume=True, aliases="save_total_limit")
    exact_match: bool = setting(False, "answer and score the held-out questions at the end",
        resume=True)


# fmt: on
SAMPLING = rows(SamplingSettings)
TRAINING = rows(TrainSettings)


# Values --------------------------------------------------------------------------------------------

_ONE = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
_MANY = {int: "whole numbers", float: "numbers", str: "strings"}


def check(row: Setting, value: Any, shown: str = "") -> None:
    """Raises ConfigError for a value of the wrong type, beyond a limit or not among the choices.

    shown: the setting's name in the message, where it is not the row's.
    """
    name = shown or row.name
    forms = _forms(row)
    if not any(_is(form, value) for form in forms):
        wanted = " or ".join(_words(form) for form in forms if form is not NoneType)
        raise ConfigError(f"{name} is {value!r}, not {wanted}", fix=_fix_of_type(forms, value))
    items = value if isinstance(value, (tuple, list)) else (value,)
    for item in items:
        if row.choices and item not in row.choices:
            allowed = ", ".join(map(repr, row.choices))
            raise ConfigError(f"{name} {item!r} is unknown", fix=f"one of {allowed}")
        if isinstance(item, Real) and not row.allows(item):
            raise ConfigError(f"{name} is {value!r}, but must be {row.limits}")
    if tuple[int, ...] in forms and list(items) != sorted(set(items)):
        raise ConfigError(f"{name} {value} must be in rising order")
    if tuple[int, ...] in forms and row.default and not items:
        raise ConfigError(f"{name} is empty")


def check_all(table: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    """`check` of each of `values`; raises ConfigError, with the nearest name, for an unknown one."""
    for name, value in values.items():
        if name not in table:
            fix = did_you_mean(name, table, cutoff=0.5) or f"one of {', '.join(table)}"
            raise ConfigError(f"no setting {name!r}", fix=fix)
        check(table[name], value)


def parse(row: Setting, text: str) -> Any:
    """The value that a text of the command line spells.

    Tuples: (1,2), 1,2 and projector,lora alike. A text that spells no value of the setting's type is
    returned as it is, for `check` to refuse.
    """
    forms = _forms(row)
    many = any(get_origin(form) is tuple for form in forms)
    if many and (len(forms) == 1 or text.startswith(("(", "["))):
        return _tuple(text)
    if str in forms:
        return text
    if bool in forms:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(text.lower(), text)
    if text.lower() == "none":
        return None
    for kind in (int, float) if int in forms else (float,):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _tuple(text: str) -> Any:
    try:
        value = ast.literal_eval(text or "()")
    except (ValueError, SyntaxError):
        bare = text.strip("()[] ").rstrip(",")
        value = tuple(part.strip().strip("'\"") for part in bare.split(","))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _forms(row: Setting) -> tuple[Any, ...]:
    """str | tuple[str, ...] -> (str, tuple[str, ...])"""
    return get_args(row.type) if isinstance(row.type, UnionType) else (row.type,)


def _is(form: Any, value: Any) -> bool:
    if get_origin(form) is tuple:
        return isinstance(value, (tuple, list)) and all(_is(get_args(form)[0], v) for v in value)
    if form not in (int, float):
        return isinstance(value, form)
    if not isinstance(value, Integral if form is int else Real) or isinstance(value, bool):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


def _words(form: Any) -> str:
    return f"a tuple of {_MANY[get_args(form)[0]]}" if get_origin(form) is tuple else _ONE[form]


def _fix_of_type(forms: tuple[Any, ...], value: Any) -> str | None:
    """How to write a value so that it has the right type, where that is clear."""
    if any(get_origin(form) is tuple and _is(get_args(form)[0], value) for form in forms):
        return f"a tuple of one ends with a comma: ({value!r},)"
    if int in forms and _is(float, value) and value == int(value):
        return f"write {int(value)}"
    if isinstance(value, str) and {int, float} & {*forms}:
        with contextlib.suppress(ValueError):
            return f"without quotes: {value}" if math.isfinite(float(value)) else None
    return None


# Command lines and documents -----------------------------------------------------------------------


def add_options(parser: Any, table: Mapping[str, Setting], names: Iterable[str]) -> None:
    """Adds --NAME for settings of one value; `parser` is an ArgumentParser or a group of one.

    The option's default is argparse.SUPPRESS, so that only what was given is in the namespace.
    """
    for name in names:
        row = table[name]
        kind = next(form for form in _forms(row) if form in (int, float, str))
        default = "" if row.default in (None, "") else f" (default: {row.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=row.choices or None,
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "TEXT"}[kind],
            help=f"{row.meaning}{default}",
        )


def page() -> str:
    """docs/settings.md."""
    parts = [_HEAD]
    for title, table in (("Training", TRAINING), ("Generation", SAMPLING)):
        groups = dict.fromkeys(name.rpartition(".")[0] for name in table)
        for group in groups:
            members = [row for name, row in table.items() if name.rpartition(".")[0] == group]
            parts.append(f"\n## {title}{f': {group}' if group else ''}\n")
            parts.append("| setting | default | values | meaning |\n|---|---|---|---|")
            parts += [_line(row) for row in members]
    return "\n".join(parts)


_HEAD = """# Settings

Made by `python -m llava_jax.settings > docs/settings.md` from the tables of llava_jax/settings.py.

Settings of training stand in a config file (`c.data.pack = True`) or on the command line
(`--config.data.pack=true`); see [training.md](training.md). Those marked with a star may differ when a
run is resumed. Settings of generation are arguments of `Request` and options of `llava-jax chat`; see
[generation.md](generation.md)."""


def _line(row: Setting) -> str:
    values = ", ".join(f"`{c}`" if c else "empty" for c in row.choices) or row.limits
    if not values:
        values = " or ".join(_words(form) for form in _forms(row) if form is not NoneType)
    need, _, value = row.needs.partition("=")
    only = f" (only with `{need}`{f' {value}' if value else ''})" if need else ""
    star = "\\*" if row.resume else ""
    default = "" if row.default in ("", None, ()) else f"`{row.default}`"
    return f"| `{row.name}`{star} | {default} | {values} | {row.meaning}{only} |"


if __name__ == "__main__":
    print(page())
