"""One row of a plan: a stage of a recipe on a machine, compiled, weighed and timed."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass
from typing import Any

from llava_jax import flops
from llava_jax.batch import Shape, collate
from llava_jax.config import PRESETS, LlavaConfig
from llava_jax.convert.io.hub import local
from llava_jax.errors import ConfigError
from llava_jax.plan import compile as compiler
from llava_jax.plan import hlo, roofline, traffic
from llava_jax.plan.memory import Memory, estimate, weigh
from llava_jax.plan.mixture import Mixture, mixture_of, step_shape, steps_of
from llava_jax.plan.rows import Kept, key_of
from llava_jax.plan.topology import HERE, Topology
from llava_jax.sharding import make_mesh, row_parts
from llava_jax.train.model_io import fit_model, open_model
from llava_jax.train.program import Program, abstract_batch, make_program, planned_params

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked: a stage with its settings, on a machine.

    model: name of a preset; empty: as config.model.init says. before: the model of the stage before.
    assumed: what is known of the data (fields of Mixture), in place of the recipe's. change: what
    differs from the recipe, in words.
    """

    name: str
    config: Any
    topology: Topology
    model: str = ""
    before: LlavaConfig | None = None
    assumed: tuple[tuple[str, float], ...] = ()
    change: str = ""


@dataclass(frozen=True)
class Setup:
    """A question made concrete; nothing is compiled. peak: estimated bytes of a device."""

    question: Question
    model: LlavaConfig
    mixture: Mixture
    shape: Shape
    program: Program
    batch: dict[str, Any]
    memory: Memory
    peak: float


def sizes_of(question: Question) -> LlavaConfig:
    """The model of a run: a preset's, the stage before's, that of config.model.init, or as that is named.

    Raises ConfigError where none of them tells the sizes.
    """
    config, preset = question.config, question.model
    init = config.model.init
    if not preset and not init and question.before:
        return fit_model(config, question.before)
    if not preset and init and local(init).exists():
        return open_model(config).config
    if not preset:
        # The recipes' names: lmsys/vicuna-13b-v1.5, runs/pretrain_7b/export, llava-hf/llava-1.5-7b-hf.
        size = re.search(r"(?<!\d)(7b|13b)(?![a-z0-9])", init.lower().replace("_", "-"))
        preset = f"llava-v1.5-{size[1]}" if size else ""
    if preset in PRESETS:
        return fit_model(config, PRESETS[preset]())
    raise ConfigError(
        f"the sizes of {init!r} are unknown before its files are here",
        fix=f"--model {' or '.join(PRESETS)}",
    )


def set_up(question: Question, devices: list[Any]) -> Setup:
    """The program of a question, on shapes alone.

    Raises ConfigError for a mesh that does not fit the devices, or rows that do not fit the mesh.
    """
    config, model = question.config, sizes_of(question)
    mesh = make_mesh(**config.mesh, devices=devices)
    parts = row_parts(mesh, config.grad_accum)
    mixture = mixture_of(config, **dict(question.assumed))
    shape = step_shape(config, model.max_length or 2048, mixture, parts)
    steps = steps_of(config, shape, mixture)
    program = make_program(config, model, planned_params(model, mesh), mesh, steps)
    batch = abstract_batch(collate((), shape, model), mesh, config.grad_accum)
    memory = weigh(program, batch)
    peak = estimate(config, model, program, memory, shape, parts)
    return Setup(question, model, mixture, shape, program, batch, memory, peak)


def make_row(setup: Setup, kept: Kept) -> Row:
    """The finished row of a question: from `kept`, or compiled and kept there."""
    question = setup.question
    topology = question.topology
    versions = compiler.versions(topology)
    assumed = {**asdict(setup.mixture), "model": setup.model.to_dict()}
    target = topology.chip.target if topology.chip else _here(setup)
    machine = topology.name if topology.chip else target
    key = key_of(question.config, assumed, machine, versions)
    if found := kept.get(key):
        log.info("%s on %s: kept", question.name, topology.name)
        return found
    lowered, digest = compiler.lower(setup.program, setup.batch)
    twin = kept.same_program(digest, target)
    if twin:
        compiled, moved = twin["compiled"], twin["traffic"]
    else:
        log.info("%s on %s: compiling%s", question.name, topology.name, _with(question.change))
        done = compiler.compile_step(lowered, digest)
        compiled, moved = done.facts(), _moved(done, setup)
    row: Row = {
        "key": key,
        "name": question.name,
        "change": question.change,
        "topology": topology.name,
        "target": target,
        "devices": setup.program.mesh.size,
        "mesh": {axis: size for axis, size in setup.program.mesh.shape.items() if size > 1},
        "versions": versions,
        "remat": question.config.remat,
        "grad_accum": question.config.grad_accum,
        "attention": setup.program.compute.attention.at(setup.shape.length),
        "shape": setup.shape._asdict(),
        "mixture": asdict(setup.mixture),
        "compiled": compiled,
        "traffic": moved,
        "memory": _memory(setup, compiled, topology),
        **_time(setup, moved),
    }
    device = row["memory"]["device"]
    row["fits"] = compiled["fits"] and (device is None or row["memory"]["peak"] <= device)
    kept.add(row)
    return row


def _here(setup: Setup) -> str:
    """The devices that are here, by number and kind: "here" is another machine elsewhere."""
    devices = setup.program.mesh.devices
    return f"{HERE}: {devices.size} x {devices.flat[0].device_kind}"


def _with(change: str) -> str:
    return f" with {change}" if change else ""


def _memory(setup: Setup, compiled: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Bytes of one device by kind; device: what it has, None where that is not known."""
    memory = setup.memory
    return {
        **asdict(memory),
        "temporary": max(compiled["temporary"] - memory.gradients, 0),
        "host": compiled["host"],
        "peak": compiled["peak"] + memory.unused,
        "device": topology.chip.memory if topology.chip else None,
    }


def _moved(compiled: compiler.Compiled, setup: Setup) -> dict[str, Any]:
    """What the program sends over links and moves in HBM; {} where the compiler refused it."""
    if not compiled.text:
        return {}
    module = hlo.parse(compiled.text)
    mesh = dict(setup.program.mesh.shape)
    sent = traffic.flows(module, mesh, setup.question.topology.slices)
    return {"hbm": traffic.hbm_bytes(module), "links": [asdict(flow) for flow in sent]}


def _time(setup: Setup, moved: dict[str, Any]) -> Row:
    """FLOPs, steps, and the seconds and hours that they take."""
    config, mix, shape = setup.question.config, setup.mixture, setup.shape
    params = {**setup.program.state.params, **setup.program.frozen}
    trained = set(setup.program.state.params)
    sample = flops.Work(mix.tokens, mix.targets, mix.images, mix.tokens / 2, mix.targets)
    model = flops.count(setup.model, params, trained, sample)
    positions, groups = shape.rows * shape.length, shape.groups or shape.rows
    targets = groups * (shape.targets or 0)
    # Every kernel but the plain one leaves out the blocks of keys that come later.
    keys = shape.length / (
        1 if setup.program.compute.attention.at(setup.shape.length) == "plain" else 2
    )
    full = flops.Work(positions, targets, groups * shape.images, keys, positions)
    chunked = (shape.targets or 0) > 256
    executed = flops.count(setup.model, params, trained, full, config.remat, chunked)
    steps = steps_of(config, shape, mix)
    samples = mix.samples * config.epochs
    row: Row = {
        "flops": {"sample": model.total, "stage": model.total * samples, "executed": executed.total,
                  "tower": model.tower, "recomputed": executed.recomputed},
        "steps": steps,
        "samples": samples,
    }  # fmt: skip
    chip, devices = setup.question.topology.chip, setup.program.mesh.size
    if chip is None:
        return row
    # Unpacked, most steps are smaller than the largest one, which is what is compiled.
    filled = min(1.0, samples * mix.tokens / (steps * positions))
    real = filled if config.data.pack else mix.real
    row["real"] = real
    row["hours"] = roofline.hours(chip, devices, model.total * samples, real)
    if moved:
        sent = [traffic.Flow(**flow) for flow in moved["links"]]
        line = roofline.roofline(chip, devices, executed.total, moved["hbm"], sent)
        row["roofline"] = {**asdict(line), "seconds": line.seconds, "bottleneck": line.bottleneck}
        row["roofline"]["hours"] = line.seconds * steps * filled / real / 3600
    return row
