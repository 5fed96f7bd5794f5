"""Names of settings: which ones a config may hold, and which one a mistyped or foreign name means."""

from __future__ import annotations

import functools
from collections.abc import Collection

from llava_jax.errors import ConfigError, did_you_mean, nearest
from llava_jax.settings import TRAINING, Setting

FOREIGN = {name: row.name for row in TRAINING.values() for name in row.aliases.split()}
"""{what another trainer calls a setting: ours}"""

HINTS = {
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        "eval_every says how often data.eval and data.holdout are validated",
    ),
    **dict.fromkeys(
        ("freeze_backbone", "freeze_mm_mlp_adapter"), "trainable lists the parts that learn"
    ),
    **dict.fromkeys(
        ("logging_dir", "out", "out_dir", "output", "output_dir", "save_dir"),
        "--workdir is where results are written",
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint"), "a run with the same --workdir is resumed"
    ),
    "load_best_model_at_end": "the best model is in best/ of the work directory",
    "deepspeed": "mesh.fsdp splits parameters and optimizer over the devices",
    "logging_steps": "every step is written to metrics.jsonl",
    "lr_scheduler_type": "the schedule is a cosine, from warmup_ratio to lr_end_ratio",
    "tf32": "dtype is float32 or bfloat16",
}
"""Settings of other trainers that are none of ours: what to do instead."""


@functools.cache
def known_settings() -> dict[str, Setting]:
    """{dotted name: row} of every setting a config may hold, the quickstart's own included."""
    from llava_jax.configs import quickstart

    folder = quickstart.get_config().data_folder
    meaning = "what {data_folder} stands for in paths, those of the stages too"
    return {**TRAINING, "data_folder": Setting("data_folder", str, folder, meaning)}


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
    if last in HINTS:
        return HINTS[last]
    foreign = FOREIGN.get(name.lower(), FOREIGN.get(last))
    by_last = {key.rpartition(".")[2]: key for key in reversed(list(known))}
    found = (
        (foreign if foreign in known else None)
        or by_last.get(last)  # in any group: path is data.path
        or nearest(name, known)
        or FOREIGN.get(nearest(last, FOREIGN, cutoff=0.85) or "")
        or by_last.get(nearest(last, by_last) or "")
    )
    return f"did you mean {form.format(found)}?" if found else None
