"""Names of settings: what another trainer calls them, and which of ours a mistyped one is near."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

from llava_jax.errors import ConfigError, did_you_mean, nearest

OTHER_NAMES = {
    # transformers.TrainingArguments, and ModelArguments and DataArguments of llava/train/train.py.
    "adam_beta1": "b1",
    "adam_beta2": "b2",
    "adam_epsilon": "eps",
    "bf16": "dtype",
    "data_seed": "seed",
    "dataloader_num_workers": "data.threads",
    "fp16": "dtype",
    "fsdp": "mesh.fsdp",
    "gradient_accumulation_steps": "grad_accum",
    "gradient_checkpointing": "remat",
    "group_by_modality_length": "data.group_by_modality",
    "learning_rate": "lr",
    "lora_enable": "trainable",
    "lora_r": "lora_rank",
    "max_grad_norm": "clip_norm",
    "max_steps": "steps",
    "mm_projector_lr": "projector_lr",
    "mm_vision_tower_lr": "vision_lr",
    "model_max_length": "data.max_length",
    "model_name_or_path": "model.init",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "per_device_train_batch_size": "batch_size",
    "pretrain_mm_mlp_adapter": "model.init",
    "run_name": "name",
    "save_total_limit": "keep_checkpoints",
    "tune_mm_mlp_adapter": "trainable",
    # Elsewhere.
    "accumulate_grad_batches": "grad_accum",
    "attn_implementation": "attention",
    "beta1": "b1",
    "beta2": "b2",
    "checkpoint_every": "save_every",
    "data": "data.path",
    "data_paths": "data.path",
    "data_root": "data.image_folder",
    "dataset": "data.path",
    "dataset_path": "data.path",
    "drop_out": "lora_dropout",
    "dropout": "lora_dropout",
    "grad_accumulation": "grad_accum",
    "grad_clip": "clip_norm",
    "image_dir": "data.image_folder",
    "images": "data.image_folder",
    "max_epochs": "epochs",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "model": "model.init",
    "model.name": "model.init",
    "model.path": "model.init",
    "model_path": "model.init",
    "num_epochs": "epochs",
    "num_workers": "data.threads",
    "packing": "data.pack",
    "precision": "dtype",
    "save_interval": "save_every",
    "save_steps": "save_every",
    "total_steps": "steps",
    "train_batch_size": "batch_size",
    "train_data": "data.path",
    "train_file": "data.path",
    "val_split": "data.holdout",
    "validation_split": "data.holdout",
    "warmup_steps": "warmup_ratio",
    "wd": "weight_decay",
}

ELSEWHERE = {
    "deepspeed": "mesh.fsdp splits parameters and optimizer over the devices",
    "eval_steps": "data.holdout keeps a part aside, and it is scored at the end",
    "evaluation_strategy": "data.holdout keeps a part aside, and it is scored at the end",
    "eval_strategy": "data.holdout keeps a part aside, and it is scored at the end",
    "freeze_backbone": "trainable lists what is trained",
    "freeze_mm_mlp_adapter": "trainable lists what is trained",
    "logging_dir": "--workdir is where metrics.jsonl and tensorboard are written",
    "logging_steps": "every step is written to metrics.jsonl",
    "lr_scheduler_type": "the schedule is a cosine, from warmup_ratio to lr_end_ratio",
    "out": "--workdir is where results are written",
    "out_dir": "--workdir is where results are written",
    "output": "--workdir is where results are written",
    "output_dir": "--workdir is where results are written",
    "report_to": "metrics.jsonl and tensorboard are always written",
    "resume": "the same --workdir resumes by itself",
    "resume_from_checkpoint": "the same --workdir resumes by itself",
    "save_dir": "--workdir is where results are written",
    "tf32": "dtype is float32 or bfloat16",
}


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in nested groups."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def defaults() -> dict[str, Any]:
    """{dotted name: default} of every setting a config may hold, the quickstart's own included."""
    from llava_jax.configs import common, quickstart

    own = {n: v for n, v in flat(quickstart.get_config()) if not n.startswith("stages.")}
    return {**own, **dict(flat(common.get_config()))}


def check_name(name: str, known: Collection[str], stages: Collection[str] = ()) -> None:
    """Raises ConfigError, with the nearest name, for a dotted name that is not one of `known`.

    stages.NAME.SETTING may name any setting of any of the `stages`.
    """
    stage, setting = split_stage(name)
    if stage and stage not in stages:
        near = did_you_mean(stage, stages, "stages.{}")
        fix = near or f"the stages here: {', '.join(stages) or 'none'}"
        raise ConfigError(f"no stage {stage!r} in {name!r}", fix=fix)
    if setting in known:
        return
    where = f"stages.{stage}: " if stage else ""
    members = [key for key in known if key.startswith(f"{setting}.")]
    if members:
        example = ", ".join(members[:4]) + (", ..." if len(members) > 4 else "")
        raise ConfigError(f"{where}{setting!r} is a group of settings", fix=example)
    fix = hint(setting, known) or "--show prints every setting"
    raise ConfigError(f"{where}no setting {setting!r}", fix=fix)


def split_stage(name: str) -> tuple[str, str]:
    """("one", "data.path") for stages.one.data.path, ("", name) for a name outside of `stages`."""
    group, _, rest = name.partition(".")
    if group != "stages":
        return "", name
    stage, _, setting = rest.partition(".")
    return stage, setting


def hint(name: str, known: Collection[str], form: str = "{}") -> str | None:
    """What a mistyped or foreign name may stand for, as a `fix`; None if nothing is near.

    form: how a setting is shown, say "--config.{}".
    """
    last = name.rpartition(".")[2].lower()
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    found = near_setting(name, known)
    return f"did you mean {form.format(found)}?" if found else None


def near_setting(name: str, known: Collection[str]) -> str | None:
    """The setting that `name` means or is nearest to, looked for in every group: path, data.path."""
    last = name.rpartition(".")[2].lower()
    foreign = OTHER_NAMES.get(name.lower(), OTHER_NAMES.get(last))
    if foreign in known:
        return foreign
    last_parts = {key.rpartition(".")[2]: key for key in reversed(list(known))}
    if last in last_parts:
        return last_parts[last]
    if found := nearest(name, known):
        return found
    foreign = nearest(last, OTHER_NAMES, cutoff=0.85)
    if foreign:
        return OTHER_NAMES[foreign]
    found = nearest(last, last_parts)
    return last_parts[found] if found else None
