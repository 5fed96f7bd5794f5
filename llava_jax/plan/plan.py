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
from llava_jax.data.settings import DataSettings, padded_lengths
from llava_jax.errors import ConfigError, counted
from llava_jax.plan import compile as compiler
from llava_jax.plan import hlo, roofline, traffic
from llava_jax.plan.lengths import UNKNOWN, Means
from llava_jax.plan.memory import Memory, estimate, weigh
from llava_jax.plan.mixture import Steps, lay_out
from llava_jax.plan.rows import Kept, digest_of, key_of
from llava_jax.plan.topology import HERE, Topology
from llava_jax.sharding import check_lengths, make_mesh, row_parts
from llava_jax.train.checks import check_devices, check_settings
from llava_jax.train.model_io import fit_model, open_model
from llava_jax.train.program import Program, abstract_batch, make_program, planned_params

log = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked: a stage with its settings, on a machine.

    model: name of a preset; empty: as config.model.init says. before: the model of the stage before.
    means: what is known of the data, in place of the recipe's. change: what differs from the recipe,
    in words.
    """

    name: str
    config: Any
    topology: Topology
    model: str = ""
    before: LlavaConfig | None = None
    means: Means = UNKNOWN
    change: str = ""


@dataclass(frozen=True)
class Setup:
    """A question made concrete; nothing is compiled. peak: estimated bytes of a device."""

    question: Question
    model: LlavaConfig
    steps: Steps
    program: Program
    batch: dict[str, Any]
    memory: Memory
    peak: float

    @property
    def shape(self) -> Shape:
        """Of the step that is compiled."""
        return self.steps.shape


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

    Raises ConfigError for settings with which `train` would not start on these devices.
    """
    config, model = question.config, sizes_of(question)
    check_settings(config, files=False)
    check_devices([("", config)], devices)
    mesh = make_mesh(**config.mesh, devices=devices)
    parts = row_parts(mesh, config.grad_accum)
    data = DataSettings.read({**config.data, "batch_size": config.batch_size, "seed": config.seed})
    check_lengths(padded_lengths(data, model.max_length), mesh)
    hosts = len({device.process_index for device in devices})
    steps = lay_out(
        data.completed(model.max_length, hosts, parts), model.image_tokens, question.means
    )
    planned = planned_params(model, mesh)
    program = make_program(config, model, planned, mesh, steps.of_run(config))
    batch = abstract_batch(collate((), steps.shape, model), mesh, config.grad_accum)
    memory = weigh(program, batch)
    peak = estimate(config, model, program, memory, steps.shape, parts)
    return Setup(question, model, steps, program, batch, memory, peak)


def make_row(question: Question, devices: list[Any], kept: Kept) -> Row:
    """The finished row of a question: from `kept`, or compiled and kept there. Raises as `set_up`."""
    topology, target = question.topology, _target(question.topology, devices)
    known = {**asdict(question.means), "model": sizes_of(question).to_dict()}
    key = key_of(question.config, known, topology.name if topology.chip else target)
    made_by = {
        "versions": compiler.versions(topology),
        "reader": digest_of("plan/compile.py", "plan/hlo.py", "plan/traffic.py"),
        "code": digest_of(),
    }
    if found := kept.get(key, made_by):
        log.info("%s on %s: kept", question.name, topology.name)
        return found
    setup = set_up(question, devices)
    compiled, moved = _compiled(setup, target, made_by, kept)
    row: Row = {
        "key": key,
        "name": question.name,
        "change": question.change,
        "topology": topology.name,
        "target": target,
        "devices": setup.program.mesh.size,
        "mesh": {axis: size for axis, size in setup.program.mesh.shape.items() if size > 1},
        **made_by,
        "remat": question.config.remat,
        "grad_accum": question.config.grad_accum,
        "attention": setup.program.compute.attention.at(setup.shape.length),
        "shape": setup.shape._asdict(),
        "mixture": asdict(setup.steps.mixture),
        "compiled": compiled,
        "traffic": moved,
        "memory": _memory(setup, compiled, topology),
        **_time(setup, moved),
    }
    device = row["memory"]["device"]
    row["fits"] = compiled["fits"] and (device is None or row["memory"]["peak"] <= device)
    kept.add(row)
    return row


def _compiled(
    setup: Setup, target: str, made_by: dict[str, Any], kept: Kept
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the compiler says of the step, and what the step moves: kept, or compiled now.

    Nothing is compiled where what stays over a step is already more than a device holds.
    """
    question, arguments = setup.question, setup.memory.resident - setup.memory.unused
    if question.topology.chip and arguments > question.topology.chip.memory:
        return compiler.Compiled("", False, arguments).facts(), {}
    lowered, digest = compiler.lower(setup.program, setup.batch)
    if twin := kept.same_program(digest, target, made_by):
        return twin["compiled"], twin["traffic"]
    words = f" with {question.change}" if question.change else ""
    log.info("%s on %s: compiling%s", question.name, question.topology.name, words)
    done = compiler.compile_step(lowered, digest, arguments)
    return done.facts(), _moved(done, setup)


def _target(topology: Topology, devices: list[Any]) -> str:
    """What a program is compiled for. Chips that differ in memory alone have the same.

    The devices that are here are named by number and kind: "here" is another machine elsewhere.
    """
    if topology.chip is None:
        return f"{HERE}: {len(devices)} x {devices[0].device_kind}"
    return f"{topology.chip.target}: {len(devices)} in {counted(topology.slices, 'slice')}"


def _memory(setup: Setup, compiled: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """Bytes of one device by kind; device: what it has, None where that is not known."""
    memory, peak = setup.memory, compiled["peak"]
    if setup.program.mesh.devices.flat[0].platform == "cpu":  # whose own peak has no temporaries
        peak = max(peak, compiled["arguments"] + compiled["temporary"])
    return {
        **asdict(memory),
        "temporary": max(compiled["temporary"] - memory.gradients, 0),
        "host": compiled["host"],
        "peak": peak + memory.unused,
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
    config, steps, shape = setup.question.config, setup.steps, setup.shape
    mix = steps.mixture
    params = {**setup.program.state.params, **setup.program.frozen}
    trained = set(setup.program.state.params)
    sample = flops.Work(mix.tokens, mix.targets, mix.images, mix.keys, mix.targets)
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
    count = steps.of_run(config)
    samples = mix.samples * (count / steps.epoch if config.steps else config.epochs)
    row: Row = {
        "flops": {"sample": model.total, "stage": model.total * samples, "executed": executed.total,
                  "tower": model.tower, "recomputed": executed.recomputed},
        "steps": count,
        "samples": samples,
        "real": steps.real,
    }  # fmt: skip
    chip, devices = setup.question.topology.chip, setup.program.mesh.size
    if chip is None:
        return row
    row["hours"] = roofline.hours(chip, devices, model.total * samples, steps.real)
    if moved:
        sent = [traffic.Flow(**flow) for flow in moved["links"]]
        line = roofline.roofline(chip, devices, executed.total, moved["hbm"], sent)
        row["roofline"] = {**asdict(line), "seconds": line.seconds, "bottleneck": line.bottleneck}
        # Unpacked, most steps are smaller than the largest one, which is what is compiled.
        row["roofline"]["hours"] = line.seconds * count * steps.positions / positions / 3600
    return row
