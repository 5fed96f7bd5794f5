"""How fast this machine trains, beside Hugging Face transformers in torch, in one run.

    python -m bench train                  # 65 M parameters, 8 rows of 256
    python -m bench train --size 7b --train lora --rows 4 --length 2048 --systems llava_jax

Optimizer steps of stage 2 on random weights and tokens: the tower frozen, AdamW, clipping, one picture
a row, no padding. `--train` says what else learns, `--config.NAME=VALUE` sets what a recipe can set.
Of the positions, `--supervised` are trained: 0.16 is
about the share of LLaVA's instruction mixture (estimated). torch computes all logits, as the original
does. Each system is a process of its own, so that memory is its own, and they take turns step by step.
On a busy CPU only processor seconds say something.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from bench import frame, models
from bench.train_systems import SYSTEMS, TRAIN, model_config

FORMULA = """\
MFU = FLOPs of a step / seconds of a step / peak FLOP/s of the devices
  Counted: 2 x real tokens x weights of each matmul for the forward pass, as much for the gradient of
  its input, and as much for that of its weights where they are trained; causal attention as half of
  T x T; the tower forward, the layers that features need. The head, and the last layer's query,
  output and MLP, at supervised positions alone.
  Not counted: recomputation, padding, embedding, norms, softmax, the loss, the optimizer."""


def main(name: str, words: list[str]) -> int:
    """Runs the benchmark."""
    args = arguments(words)
    print(FORMULA, flush=True)
    results = compare(args)
    for result in results:
        print(line_of(result), flush=True)
    if len(results) == 2:
        ours, theirs = (r["cpu_seconds"] for r in results)
        for kind in ("min", "median"):
            print(
                f"{kind} of CPU seconds a step: llava_jax takes 1/{theirs[kind] / ours[kind]:.2f}"
            )
    frame.record(name, args, formula=FORMULA.replace("\n", " "), results=results)
    return 0


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on the size and the device."""
    parser = frame.parser(__doc__, epilog="--config.NAME=VALUE: a setting of ours")
    parser.add_argument("--size", choices=models.SIZES, default="65m")
    parser.add_argument("--train", choices=TRAIN, default="full", help="what learns")
    parser.add_argument("--layers", type=int, help="of the decoder, fewer than the size has")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="positions of a row")
    parser.add_argument("--supervised", type=float, default=0.16, help="share of the positions")
    parser.add_argument("--steps", type=int, default=1, help="steps a turn")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="those that are installed")
    args, settings = parser.parse_known_args(words)
    needs = ["torch", "transformers", *["peft"] * (args.train == "lora")]
    args.systems = args.systems or (list(SYSTEMS) if frame.installed(*needs) else ["llava_jax"])
    if wrong := [word for word in settings if not word.startswith("--config.")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    if any(word.startswith("--config.trainable") for word in settings):
        parser.error("--train says what learns")
    args.settings = [word.removeprefix("--config.") for word in settings]
    return args


def model_flops(args: argparse.Namespace) -> float:
    """Of one step, as FORMULA says."""
    from llava_jax.flops import Work, count
    from llava_jax.params import parameter_shapes
    from llava_jax.train.select import trainable_names

    model = model_config(args)
    params = {name: SimpleNamespace(shape=shape) for name, shape in parameter_shapes(model).items()}
    tokens, targets = args.rows * args.length, args.rows * round(args.supervised * args.length)
    work = Work(tokens, targets, images=args.rows, keys=args.length / 2, last=targets)
    return count(model, params, trainable_names(params, TRAIN[args.train]), work).total


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each system reports, after `repeats` turns of each."""
    with frame.Systems({name: SYSTEMS[name] for name in args.systems}, args) as systems:
        prepared = systems.each("prepare")
        found = systems.take_turns(args.repeats, "run", args.steps)
        results = []
        for name, report in systems.each("report").items():
            result = {"system": name, **prepared[name], **report}
            for kind, times in found[name].items():
                result[kind] = frame.spread([t / args.steps for t in times["all"]])
            results.append(rates(result, model_flops(args)))
        return results


def rates(result: dict[str, Any], flops: float) -> dict[str, Any]:
    """The result with samples and tokens a second, and MFU; of processor time on a CPU."""
    result["model_flops"] = flops
    seconds = result["cpu_seconds" if result["device"] == "cpu" else "seconds"]["median"]
    result["samples_per_second"] = result["rows"] / seconds
    result["real_tokens_per_second"] = result["real_tokens"] / seconds
    rate = flops / seconds
    result["mfu_of_measured_matmul"] = rate / result["measured_matmul_flops"]
    if result["peak_flops"]:
        result["mfu"] = rate / result["peak_flops"]
    return result


def line_of(result: dict[str, Any]) -> str:
    """A result in a few lines of text."""
    cpu, wall = result["cpu_seconds"], result["seconds"]
    share = f"{result['mfu_of_measured_matmul']:.1%} of a matmul measured in this run"
    if "mfu" in result:
        share = f"MFU {result['mfu']:.1%}, {share}"
    return (
        f"{result['system']} on {result['devices']} x {result['device_name']}, {result['dtype']}, "
        f"{result['parameters']:,} parameters, {result['trained']:,} trained\n"
        f"  step: CPU {cpu['min']:.3f} s min, {cpu['median']:.3f} s median; "
        f"wall {wall['min']:.3f} s min, {wall['median']:.3f} s median\n"
        f"  {result['samples_per_second']:.2f} samples/s, "
        f"{result['real_tokens_per_second']:,.0f} real tokens/s, {share}\n"
        f"  peak memory {result['peak_memory_gb']:.2f} GB ({result['memory_of']}), "
        f"compiled in {result['compile_seconds']:.1f} s\n"
        f"  loss {result['first_loss']:.4f} at first, {result['loss']:.4f} after {result['steps']} steps"
    )
