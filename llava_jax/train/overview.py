"""What a run is, said before its first step, and written to run.json for the report."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import llava_jax
from llava_jax.errors import counted
from llava_jax.params import component, weights_in
from llava_jax.report.files import FACTS
from llava_jax.settings import flat
from llava_jax.sharding import row_parts
from llava_jax.train.evalsets import eval_sets
from llava_jax.train.placement import bytes_on_a_device
from llava_jax.train.program import Program
from llava_jax.train.resume import settings_text
from llava_jax.util import installed_versions, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def overview(config: Any, workdir: Path, program: Program, loader: Any, steps: int) -> str:
    """A table for a person: data, batch, validation, parameters, memory, where results go."""
    mesh, groups = program.mesh, program.groups
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    kind = counted(mesh.size, f"{mesh.devices.flat[0].device_kind} device")
    hosts = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = {
        "data": f"{counted(loader.samples, 'sample')}, {counted(steps, 'step')} of "
        f"{loader.step_words} ({steps / max(loader.steps_per_epoch, 1):.3g} epochs)",
        "batch": _batch(config, mesh),
        "devices": f"{kind}{hosts}{f' ({axes})' if axes else ''}, {config.dtype}",
        "validation": _validation(config),
        "trained": _sizes(_by_group(program), {t: f" (lr {g.peak:g})" for t, g in groups.items()}),
        "frozen": _sizes(_by_part(program.frozen)) or "nothing",
        "memory": _memory(program),
        "attention": attention_of(program),
        "saved": f"every {counted(config.save_every, 'step')}, the newest "
        f"{config.keep_checkpoints} kept, in {workdir / 'checkpoints'}",
        "results": f"the model in {workdir / 'export'}; llava-jax report {workdir}",
    }  # fmt: skip
    return "\n".join(f"{name:12}{text}" for name, text in rows.items() if text)


def attention_of(program: Program) -> str:
    """The kernel of attention, in words."""
    return str(program.compute.attention).removeprefix("attention: ")


def _batch(config: Any, mesh: Any) -> str:
    """How a batch is split."""
    across = row_parts(mesh, 1)
    if config.data.pack:
        return f"packed rows, in {counted(config.grad_accum, 'micro-batch')} over {counted(across, 'part')}"
    rows = config.batch_size // row_parts(mesh, config.grad_accum)
    micro = f"{config.grad_accum} micro-batches x " if config.grad_accum > 1 else ""
    return f"{config.batch_size} = {micro}{across} parts of the mesh x {counted(rows, 'sample')}"


def _validation(config: Any) -> str:
    sets = eval_sets(config)
    if not sets:
        return ""
    every = f"every {counted(config.eval_every, 'step')}" if config.eval_every else "at the end"
    stop = f"; ends after {config.early_stop} without a better one" if config.early_stop else ""
    best = f"; best/ by {config.best_by}" if config.best_by else ""
    return f"{', '.join(s.name for s in sets)} {every}{best}{stop}"


def _by_group(program: Program) -> dict[str, int]:
    sizes = {name: leaf.size for name, leaf in program.state.params.items()}
    return {t: sum(sizes[name] for name in g.names) for t, g in program.groups.items()}


def _by_part(params: Mapping[str, Any]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, leaf in params.items():
        sizes[component(name)] += weights_in(name, leaf)
    return dict(sizes)


def _sizes(sizes: Mapping[str, int], more: Mapping[str, str] | None = None) -> str:
    return ", ".join(f"{name} {size:,}{(more or {}).get(name, '')}" for name, size in sizes.items())


def _memory(program: Program) -> str:
    """What stays on a device; what a step needs besides is known once one has run."""
    trees = {"trained": program.state.params, "frozen": program.frozen,
             "optimizer": program.state.opt_state}  # fmt: skip
    sizes = {name: bytes_on_a_device(tree) / 1e9 for name, tree in trees.items()}
    parts = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())
    limits = [s["bytes_limit"] for d in jax.local_devices() if (s := d.memory_stats())
              and "bytes_limit" in s]  # fmt: skip
    have = f" of {min(limits) / 1e9:.1f}" if limits else ""
    return (
        f"{sum(sizes.values()):.2f}{have} GB a device ({parts}), gradients and activations besides"
    )


# For the report ------------------------------------------------------------------------------------


def write_facts(
    config: Any, workdir: Path, program: Program, loader: Any, steps: int, recipe: Any, name: str
) -> None:
    """run.json. recipe: the settings of the config before any was changed on the command line; or None."""
    mesh = program.mesh
    changed = dict(flat(json.loads(settings_text(recipe)))) if recipe is not None else {}
    facts = {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "version": llava_jax.__version__,
        "commit": commit(),
        "versions": {"python": platform.python_version(), **installed_versions(_PACKAGES)},
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
        "attention": attention_of(program),
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "samples": loader.samples,
        "steps": steps,
        "data": loader.identity()["content"],
        "trained": _by_group(program),
        "frozen": _by_part(program.frozen),
        "model": name,
        "recipe": recipe.name if recipe is not None else "",
        "recipe_settings": changed,
    }
    write_json(workdir / FACTS, facts, indent=1)


def commit() -> str:
    """The commit of the checkout that this package runs from, "+" after it if files differ; or ""."""
    folder = Path(str(llava_jax.__file__)).parent.parent
    if not (folder / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.SubprocessError):
        return ""
