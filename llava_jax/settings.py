"""Every setting of training and generation: its type, default, limits and meaning. Imports no jax.

A table is a frozen dataclass whose fields are made by `setting`. The ConfigDict of configs/common.py,
the checks and their messages, `llava-jax train --show`, command-line options and docs/settings.md are
all made from these tables. After changing one:

    python -m llava_jax.settings > docs/settings.md
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from llava_jax.config import ASPECT_RATIOS, BUDGETED_BY, PLACED
from llava_jax.errors import ConfigError
from llava_jax.setting import (
    PATTERN,
    Setting,
    check,
    check_all,
    flat,
    forms_of,
    in_words,
    parse,
    rows,
    setting,
)

__all__ = ["PATTERN", "Setting", "check", "check_all", "flat", "parse", "rows", "setting"]

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
    min_p: float = setting(0.0, "sample from tokens at least this likely, next to the likeliest; 0: all",
        low=0, high=1)
    repetition_penalty: float = setting(1.0,
        "divides the logits of tokens in prompt and answer; 1: none", above=0, high=100)
    presence_penalty: float = setting(0.0, "off the logits of tokens that the answer has",
        low=-100, high=100)
    frequency_penalty: float = setting(0.0, "off the logit of a token, each time the answer has it",
        low=-100, high=100)
    prompt_lookup: int = setting(0,
        "tokens of a greedy answer to guess from prompt and answer, and check at once; 0: none", low=0, high=16)
    seed: int | None = setting(None, "makes a sampled answer repeatable; None: a new one",
        low=-(2**63), below=2**63)
    stop: str | tuple[str, ...] = setting((), "strings that end the answer, besides the template's")
    system: str | None = setting(None, "replaces the template's system prompt")
    template: str | None = setting(None, "conversation template; None: the model's")

    def __post_init__(self):
        check_all(SAMPLING, {name: getattr(self, name) for name in SAMPLING})


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """How a model that is loaded sees images."""

    image_aspect_ratio: str = setting("", "how an image is made square; empty: as the model says",
        choices=("", *ASPECT_RATIOS))
    image_tokens: int = setting(0, "features of an image that the language model reads; 0: all", low=0)
    image_tokens_by: str = setting("visionzip",
        "which: the ones most looked at and the others merged (visionzip), the most unlike (divprune), means of areas (pool)",
        choices=BUDGETED_BY, needs="image_tokens")
    image_positions: str = setting("consecutive",
        "their positions: one after the other, or those that they have among all features",
        choices=PLACED, needs="image_tokens")

    def __post_init__(self):
        check_all(LOADING, {name: getattr(self, name) for name in LOADING})
        for name, row in LOADING.items():
            if row.needs and not self.image_tokens and getattr(self, name) != row.default:
                raise ConfigError(f"{name} has no effect without image_tokens")


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


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `llava-jax serve` does at once, and takes from one request."""

    slots: int = setting(8, "requests answered at once", low=1, high=1024)
    waiting: int = setting(64, "requests that may wait beside those; further ones get status 429",
        low=0, high=100_000)
    max_body_bytes: int = setting(32 * 2**20, "bytes of a request, base64 of its images included",
        low=1024)
    max_images: int = setting(16, "images of a request", low=0)
    max_messages: int = setting(256, "messages of a request", low=1)
    max_choices: int = setting(8, "answers that one request may ask for: n, times its prompts", low=1)
    body_seconds: float = setting(60.0, "time within which a request must have come", above=0)
    grace_seconds: int = setting(60, "time that answers have to end after SIGTERM", low=0,
        high=86_400)
    image_threads: int = setting(2, "images decoded at once", low=1, high=64)
    allow_urls: str = setting("",
        "hosts, with commas, that images may be fetched from by https; empty: nothing is fetched")
    url_seconds: float = setting(10.0, "time within which a request's fetched images must have come",
        above=0, needs="allow_urls")

    def __post_init__(self):
        check_all(SERVING, {name: getattr(self, name) for name in SERVING})


@dataclass(frozen=True)
class ModelGroup:
    """The model to start from: a folder or hub id of any format `llava-jax convert` reads."""

    init: str = setting("", "checkpoint folder or hub id to start from", host=True,
        aliases="model model_path model.path model.name model_name_or_path pretrain_mm_mlp_adapter")
    base: str = setting("", "language model for a LoRA, delta or projector-only checkpoint",
        host=True)
    vision_tower: str = setting("", "CLIP folder or hub id, for a checkpoint without its own",
        host=True)
    projector: str = setting("mlp2x_gelu",
        "of a language model and a tower that are new to each other: linear, mlpNx_gelu, identity",
        aliases="mm_projector_type")
    allow_pickle: bool = setting(False, "read torch .bin files, which hold pickles", resume=True)


@dataclass(frozen=True, kw_only=True)
class DataGroup(ImageLimits):
    """The training data. Lengths are in tokens, image features counted."""

    path: str | tuple[str, ...] = setting("",
        "LLaVA JSON or JSON lines, a file or gs://..., s3://...; several: a tuple, or with commas", resume=True, host=True,
        aliases="data data_paths dataset dataset_path train_data train_file")
    image_folder: str | tuple[str, ...] = setting("",
        "folder of the images, on a disk or gs://..., s3://...: one for all files, or one per file", resume=True, host=True,
        aliases="data_root image_dir images")
    weights: tuple[float, ...] = setting((), "how often an epoch shows each file; empty: once",
        low=0, high=1000)
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
    pack: str = setting("",
        "several samples in a row; exact: steps of the same samples, fill: rows that are full",
        choices=("", "exact", "fill"), old={True: "exact", False: ""}, aliases="packing")
    pack_length: int = setting(0, "positions of a packed row; 0: data.max_length", low=0,
        needs="data.pack")
    pack_rows: int = setting(0,
        "rows of a step; 0: as many as hold about batch_size samples, or a resumed run's own",
        low=0, needs="data.pack=fill", resume=True)
    row_multiple: int = setting(0, "the rows of a step are a multiple of this; 0: as few as needed",
        low=0, needs="data.pack=exact")
    length_buckets: tuple[int, ...] = setting(
        (128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048),
        "rows are padded to one of these lengths; each compiles once", low=1)
    image_buckets: tuple[int, ...] = setting((0, 1, 2, 4, 8, 16, 32, 64),
        "image slots per row, padded likewise", low=0)
    target_buckets: tuple[int, ...] = setting((),
        "trained positions per row, padded likewise; empty: powers of two", low=1)
    eval: tuple[str, ...] = setting((),
        "validation sets: 'NAME path=FILE images=FOLDER ask=N', 'NAME benchmark=pope data=FOLDER'",
        resume=True, host=True,
        aliases="eval_data eval_path eval_dataset val_data validation_file eval_data_path")
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
    """Devices per mesh axis, of one slice. One axis may be -1: all devices that remain."""

    data: int = setting(1, "devices along the batch, each with a copy of the model", resume=True)
    fsdp: int = setting(-1, "devices that share parameters, optimizer state and batch", resume=True)
    context: int = setting(1, "devices that share the positions of each row, and parameters",
        resume=True, aliases="context_parallel_size sequence_parallel_size")
    tensor: int = setting(1, "devices that share the width of each layer", resume=True,
        aliases="tensor_parallel_size")
    slices: int = setting(0, "groups of devices, slow links between them, that each take a part of "
        "the batch; 0: those of a multi-slice TPU", low=0, resume=True, aliases="num_slices")


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
        choices=("projector", "language", "embed", "lora", "vision"), patterns=True,
        aliases="lora_enable tune_mm_mlp_adapter")
    lora_rank: int = setting(0, "rank of new LoRA adapters; 0: none", low=0, aliases="lora_r")
    lora_alpha: float = setting(256.0, "adapters are scaled by alpha / rank", low=0,
        needs="lora_rank")
    lora_rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead (rsLoRA)",
        needs="lora_rank", aliases="use_rslora")
    lora_dora: bool = setting(False, "also train the magnitude of each column (DoRA)",
        needs="lora_rank", aliases="use_dora")
    lora_targets: tuple[str, ...] = setting(("language",),
        "linear layers with adapters: of parts, or patterns over names as language.layers.attn.q",
        choices=("language", "vision", "projector"), patterns=True, needs="lora_rank",
        aliases="target_modules lora_target_modules")
    lora_dropout: float = setting(0.05, "dropout before the adapters", low=0, high=1,
        needs="lora_rank", aliases="dropout drop_out")
    quantize: str = setting("",
        "hold the decoder's frozen kernels in 4 or 8 bits (QLoRA)", choices=("", "nf4", "int8"),
        aliases="bits load_in_4bit load_in_8bit bnb_4bit_quant_type")
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
    param_groups: tuple[str, ...] = setting((),
        "rates of parts or patterns: 'vision lr=2e-6', 're:.*\\.embedding lr=1e-5 weight_decay=0'")
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
        "rate of what Muon leaves to Adam and no group sets, as a fraction of lr", low=0, needs="optimizer=muon")
    clip_norm: float = setting(1.0, "largest global norm of the gradients; 0: no clipping", low=0,
        aliases="max_grad_norm grad_clip")
    ema_decay: float = setting(0.0,
        "exports a moving average of the trained parameters with this decay; 0: none", low=0,
        below=1, aliases="ema model_ema")
    z_loss: float = setting(0.0,
        "weight of the squared log of the softmax's normalizer, added to the loss", low=0,
        aliases="z_loss_weight z_loss_multiplier")
    skip_spikes: float = setting(0.0, "skip steps whose loss or gradient norm is so many "
        "deviations above that of the last 128; 0: none", low=0,
        aliases="skip_step_on_spikes spike_threshold")
    max_skipped: int = setting(20, "skipped steps in a row after which the run stops", low=1,
        resume=True)
    loss_average: str = setting("global",
        "average over the tokens of a step (global) or over its micro-batches (micro, as the original)",
        choices=("global", "micro"))
    loss_groups: int = setting(1,
        "row groups averaged one by one: the original's number of devices", low=1)
    mesh: MeshGroup = MeshGroup()
    dtype: str = setting("bfloat16", "type of the computation; trained parameters stay float32",
        choices=("float32", "bfloat16"), aliases="bf16 fp16 precision")
    remat: str = setting("full", "what the backward pass computes again; `full` needs least memory, `none` least time",
        choices=("none", "dots", "minimal", "full", "offload"), resume=True, aliases="gradient_checkpointing")
    unroll_layers: bool = setting(False, "no loop over layers: faster for tiny models", resume=True)
    attention: str = setting("", "attention kernel; empty: the fastest that suits devices and data",
        choices=("", "plain", "chunked", "splash", "triton", "cudnn"), resume=True, aliases="attn_implementation")
    save_every: int = setting(500, "steps between checkpoints", low=1, resume=True,
        aliases="save_steps save_interval checkpoint_every")
    save_minutes: float = setting(30.0,
        "also save after this many minutes without a checkpoint; 0: never", low=0, resume=True)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints to keep", low=1,
        resume=True, aliases="save_total_limit")
    exact_match: bool = setting(False, "answer and score the held-out questions at the end",
        resume=True)
    eval_every: int = setting(0, "steps between validations; 0: data.eval at the end alone", low=0,
        resume=True, aliases="eval_steps eval_interval val_check_interval")
    eval_samples: int = setting(4,
        "samples of each validation set that are answered each time, to look at", low=0,
        resume=True)
    best_by: str = setting("loss",
        "what best/ is the best by: loss (mean of the sets), NAME.loss, NAME.exact_match; empty: none", resume=True, aliases="metric_for_best_model monitor")
    early_stop: int = setting(0,
        "stop after so many validations in a row without a better one; 0: never", low=0,
        resume=True, aliases="early_stopping_patience patience early_stopping")
    trackers: tuple[str, ...] = setting(("tensorboard",),
        "where a run is shown besides its JSON lines", choices=("tensorboard", "wandb", "mlflow"),
        resume=True, aliases="report_to logger loggers log_with")


# fmt: on
SAMPLING = rows(SamplingSettings)
LOADING = rows(LoadingSettings)
SERVING = rows(ServeSettings)
TRAINING = rows(TrainSettings)


# Command lines and documents -----------------------------------------------------------------------


def add_options(parser: Any, table: Mapping[str, Setting], names: Iterable[str]) -> None:
    """Adds --NAME for settings of one value; `parser` is an ArgumentParser or a group of one.

    The option's default is argparse.SUPPRESS, so that only what was given is in the namespace.
    """
    for name in names:
        row = table[name]
        kind = next(form for form in forms_of(row) if form in (int, float, str))
        default = "" if row.default in (None, "") else f" (default: {row.default})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=row.choices or None,
            default=argparse.SUPPRESS,
            metavar={int: "N", float: "X", str: "TEXT"}[kind],
            help=f"{row.meaning}{default}",
        )


def add_loading_options(parser: argparse.ArgumentParser, adapters: bool = True) -> Any:
    """Adds what `llava_jax.load` takes besides the model, as a group, which it returns. adapters: those too."""
    group = parser.add_argument_group("model loading")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    group.add_argument("--base", metavar="MODEL", help="what a LoRA or projector belongs to")
    group.add_argument(
        "--vision-tower", metavar="MODEL", help="CLIP of a checkpoint that comes without its own"
    )
    group.add_argument("--allow-pickle", action="store_true", help="read .bin weight files")
    group.add_argument(
        "--quantize", choices=("nf4", "int8"), default="", help="hold the decoder in 4 or 8 bits"
    )
    add_options(group, LOADING, LOADING)
    parser.set_defaults(adapter=[])
    if adapters:
        unmerged = "a LoRA adapter of the model, kept unmerged (again for more)"
        group.add_argument("--adapter", action="append", metavar="NAME=DIR", help=unmerged)
    return group


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `llava_jax.load` that `add_loading_options` reads.

    Raises ConfigError for adapters that have no name, or one name together.
    """
    names = ("dtype", "base", "vision_tower", "allow_pickle", "quantize")
    adapters: dict[str, str] = {}
    for given in args.adapter:
        name, sign, folder = given.partition("=")
        if not (name.strip() and sign and folder) or name in adapters:
            why = "names one that is there" if name in adapters else "is not NAME=DIR"
            raise ConfigError(
                f"--adapter {given[:100]!r} {why}", fix="--adapter NAME=DIR, names once"
            )
        adapters[name] = folder
    seen = {name: getattr(args, name, None) for name in LOADING}
    seen = {name: value for name, value in seen.items() if value is not None}
    return {**{name: getattr(args, name) for name in names}, **seen, "adapters": adapters}


def page() -> str:
    """docs/settings.md."""
    parts = [_HEAD]
    for title, table in _PAGE:
        groups = dict.fromkeys(name.rpartition(".")[0] for name in table)
        for group in groups:
            members = [row for name, row in table.items() if name.rpartition(".")[0] == group]
            parts.append(f"\n## {title}{f': {group}' if group else ''}\n")
            parts.append("| setting | default | values | meaning |\n|---|---|---|---|")
            parts += [_line(row) for row in members]
    return "\n".join(parts)


_PAGE = {
    "Training": TRAINING,
    "Generation": SAMPLING,
    "Loading": LOADING,
    "Serving": SERVING,
}.items()
_HEAD = """# Settings

Made by `python -m llava_jax.settings > docs/settings.md` from the tables of llava_jax/settings.py.

Settings of training stand in a config file (`c.data.pack = "exact"`) or on the command line
(`--config.data.pack=exact`); see [training.md](training.md). Those marked with a star may differ when a
run is resumed. Settings of generation are arguments of `Request` and options of `llava-jax chat`; see
[generation.md](generation.md). Settings of loading are arguments of `llava_jax.load` and options of chat, serve, demo and
eval. Settings of serving are options of `llava-jax serve`; see
[serving.md](serving.md)."""


def _line(row: Setting) -> str:
    values = ", ".join(f"`{c}`" if c else "empty" for c in row.choices) or row.limits
    values += f", `{PATTERN}REGEX`" * row.patterns
    if not values:
        values = " or ".join(in_words(form) for form in forms_of(row) if form is not NoneType)
    need, _, value = row.needs.partition("=")
    only = f" (only with `{need}`{f' {value}' if value else ''})" if need else ""
    star = "\\*" if row.resume else ""
    default = "" if row.default in ("", None, ()) else f"`{row.default}`"
    return f"| `{row.name}`{star} | {default} | {values} | {row.meaning}{only} |"


if __name__ == "__main__":
    print(page())
