"""A work directory that holds a run already: its records, and which settings may differ now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llava_jax.digests import SUMS
from llava_jax.errors import ConfigError
from llava_jax.setting import current
from llava_jax.settings import TRAINING, Setting, flat
from llava_jax.train.names import split_stage
from llava_jax.util import read_object, write_json, write_text

DONE, SETTINGS, BEGUN_FROM = "done.json", "config.json", "begun_from.json"


def read_record(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a work directory. Raises ConfigError where the file is damaged."""
    try:
        return read_object(path, ConfigError)
    except ConfigError as e:
        raise ConfigError(f"{path} is damaged: {e.message}", fix="remove this file") from None


def begin(config: Any, workdir: Path) -> None:
    """Records the settings of a run that now trains, and the weights that it begins with; one that trains
    further is no longer done."""
    (workdir / DONE).unlink(missing_ok=True)
    write_text(workdir / SETTINGS, settings_text(config))
    if weights := _weights(config.model.init):
        write_json(workdir / BEGUN_FROM, {"model": config.model.init, "weights": weights})


def check_begun_from(config: Any, workdir: Path) -> None:
    """Raises ConfigError where model.init no longer holds the weights that the run in `workdir` began with:
    its trained part would be of the old ones and its frozen part of the new."""
    check_same(config, workdir)  # says more where model.init is another one
    path, now = workdir / BEGUN_FROM, _weights(config.model.init)
    if now and path.exists() and read_record(path).get("weights", now) != now:
        raise ConfigError(
            f"{workdir} holds a run that began with other weights than {config.model.init} now has",
            fix=f"move {workdir} away to train from the new ones, or put the old ones back",
        )


def _weights(model: str) -> str | None:
    """One digest of a folder's weights, by its SHA256SUMS; None without (a name of the Hub, say)."""
    sums = Path(model) / SUMS
    lines = sums.read_bytes().splitlines() if sums.is_file() else []
    found = b"\n".join(line for line in lines if line.endswith(b".safetensors"))
    return hashlib.sha256(found).hexdigest() if found else None


def finish(workdir: Path, report: dict[str, Any], **facts: Any) -> None:
    """Records that a run is done, and what became of its data. facts: its loss and steps, say."""
    write_json(workdir / "data_report.json", report, indent=1)
    write_json(workdir / DONE, facts)


def finished(workdir: Path) -> dict[str, Any] | None:
    """{"loss", "steps", "skipped"} of a run that is done, and "early" ({"of", "waited"}) where early_stop ended
    it; None where it is not, or its export can be made again."""
    done, export = workdir / DONE, workdir / "export"
    if not done.exists() or not (export.exists() or not any(workdir.glob("checkpoints/[0-9]*"))):
        return None
    return read_record(done)


def goes_on(done: dict[str, Any], config: Any, changed: list[str]) -> bool:
    """Whether a finished run trains further: it was given more steps, or early_stop ended it and no longer
    would. done: as `finished` gives it. changed: as `check_same` does."""
    early = done.get("early")
    more = bool(early) and not 0 < config.early_stop <= early["waited"]
    return more or bool({"steps", "epochs"} & set(changed))


def shared_settings(config: Any) -> dict[str, Any]:
    """The settings, JSON-ready by dotted name, that are one for all processes of a run."""
    found = flat(json.loads(settings_text(config)))
    return {name: value for name, value in found if not _row(name).host}


def check_same(config: Any, workdir: Path) -> list[str]:
    """The names of settings that differ from those the run in `workdir` has, all of them allowed to.

    Empty where there is no run yet. Raises ConfigError naming the ones that are not.
    """
    path = workdir / SETTINGS
    if not path.exists():
        return []
    before = {name: current(_row(name), value) for name, value in flat(read_record(path))}
    now = dict(flat(json.loads(settings_text(config))))
    # A setting that the run's version did not have was at its default. One that only it had is gone.
    defaults = {n: TRAINING[n].default for n in now.keys() - before.keys() if n in TRAINING}
    before |= json.loads(json.dumps(defaults))
    changed = sorted(n for n in before.keys() & now.keys() if before[n] != now[n])
    wrong = [n for n in changed if not _may_change(n, before, now, workdir)]
    if not wrong:
        return changed
    shown = ", ".join(f"{n} was {before[n]!r} and is {now[n]!r}" for n in wrong[:3])
    more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    why = ""
    if {"steps", "epochs"} >= set(wrong):
        why = "; it cannot be made shorter"
        if all(now[n] > before[n] for n in wrong):
            why = (
                "; its rate follows the number of steps, so with more it would have begun otherwise"
            )
    done = "finished" if (workdir / DONE).exists() else "begun"
    export = f", with model.init={workdir / 'export'} to start from its model"
    raise ConfigError(
        f"{workdir} holds a run {done} with other settings: {shown}{more}{why}",
        fix=f"name another --workdir{export if done == 'finished' else ''}, or set them back",
    )


def settings_text(config: Any) -> str:
    """The settings as JSON, in one order."""
    return config.to_json_best_effort(indent=1, sort_keys=True)


def _row(name: str) -> Setting:
    """The row of a setting, also of a stage's; one without effects for a name of a config's own."""
    setting = split_stage(name)[1]
    return TRAINING.get(setting) or Setting(setting, str, "")


def _may_change(name: str, before: dict[str, Any], now: dict[str, Any], workdir: Path) -> bool:
    if _row(name).resume:
        return True
    if name in ("steps", "epochs"):
        # A cosine over more steps would have had other rates from its first step on.
        constant = not now["warmup_ratio"] and now["lr_end_ratio"] == 1
        return constant and now[name] > before[name]
    if name == "grad_accum":  # the mean over all tokens, however they are cut
        return now["loss_average"] == "global" and now["loss_groups"] == 1
    if name == "model.init":  # an earlier stage's model, in a work directory that was moved
        here = Path(now[name]).absolute()
        inside = here.is_relative_to(workdir.parent.absolute())
        return inside and Path(before[name]).parts[-2:] == here.parts[-2:]
    return False
