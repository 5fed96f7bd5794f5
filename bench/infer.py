"""Prefill with the tower, decoding, and many requests, beside Hugging Face transformers.

    python -m bench prefill decode                # 65 M parameters, batches of 1 and 8
    python -m bench decode --size 7b --batch 1 64 # on a GPU, in bfloat16
    python -m bench requests --batch 8            # 16 requests over 8 slots
    python -m bench decode --then prefill requests # of one loaded model

Random weights, the same for all from one file. A prompt is one picture and `--text` tokens, and every turn
has pictures and texts of its own. Before anything is timed, all systems must have chosen the same tokens
in float32, with logits equal to 1e-4; in bfloat16 it is said how far they are apart. A decode step is an
answer of `--tokens` + 1 tokens less one of 1, divided by `--tokens`. `requests` answers `--requests`
prompts, of ours as slots become free, of transformers in batches, from pixels to tokens, over slots of
the last `--batch`. The limit of a step is its weights and keys at the bandwidth of this machine's matvec
(copy on a GPU), measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import frame, models

ROWS = 8  # whose logits are compared
NAMES = ("prefill", "decode", "requests")
KINDS = {
    "llava_jax": "bench.infer:Ours",
    "torch": "bench.infer:Theirs",
    "torch compiled": "bench.infer:Compiled",
}


def main(name: str, words: list[str]) -> int:
    """Prints the tables. Ends the program if the systems answer differently."""
    parser = frame.parser(__doc__)
    parser.add_argument("--size", choices=models.SIZES, default="65m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--text", type=int, default=64, help="tokens of text in a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="that a timed answer has")
    parser.add_argument("--requests", type=int, default=16, help="that are answered in a turn")
    parser.add_argument("--chunk", type=int, help="of ours: positions of a prompt read at once")
    parser.add_argument("--quantize", default="", help="of ours: int8 or nf4")
    parser.add_argument("--systems", nargs="+", choices=KINDS, default=["llava_jax", "torch"])
    parser.add_argument("--folder", type=Path, help="keeps the weights here")
    then = "measured too, of what is loaded and compiled; their JSON beside --out"
    parser.add_argument("--then", nargs="+", choices=NAMES, default=[], help=then)
    args = parser.parse_args(words)
    args.dtype = "float32" if frame.ON_CPU else "bfloat16"
    kinds = {name: KINDS[name] for name in args.systems if name == "llava_jax" or peers()}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = str(args.folder or folder)
        models.save_random(args.size, Path(args.folder), args.dtype)
        with frame.Systems(kinds, args) as systems:
            checks = {}
            for batch in args.batch:
                checks[batch] = _compare(systems.each("check", batch), args)
                print(f"batch {batch}: {checks[batch]}", flush=True)
            for one in (*args.then, name):  # whose JSON is there when all are
                out = args.out if one == name else args.out and args.out.with_name(f"{one}.json")
                _run(systems, argparse.Namespace(**{**vars(args), "out": out}), one, checks)
    return 0


@contextlib.contextmanager
def ours_alone(kind: str, args: argparse.Namespace) -> Iterator[frame.Systems]:
    """Ours in one process, as `kind` ("module:Class"), with random weights of `args.size`.

    Sets what Ours reads of args and has no option: dtype, folder, quantize, systems.
    """
    args.dtype = "float32" if frame.ON_CPU else "bfloat16"
    args.quantize, args.systems = "", ["llava_jax"]
    with tempfile.TemporaryDirectory() as args.folder:
        models.save_random(args.size, Path(args.folder), args.dtype)
        with frame.Systems({"llava_jax": kind}, args) as systems:
            yield systems


def peers() -> bool:
    """Whether transformers and torch are here."""
    return frame.installed("torch", "transformers")


def _run(systems: frame.Systems, args: argparse.Namespace, name: str, checks: Any) -> None:
    """Measures, prints and writes what `name` says."""
    rows, found = [], {}
    batches = args.batch[-1:] if name == "requests" else args.batch
    for batch in batches:
        if name == "prefill":
            found[batch] = systems.take_turns(args.repeats, "answer", batch, 1)
        elif name == "requests":
            asked = batch, args.tokens, args.requests
            found[batch] = systems.take_turns(args.repeats, "answer", *asked)
        else:
            found[batch] = _steps(systems, args, batch)
        rows += frame.compared(f"{name}, batch {batch}, ms", found[batch], 1e3)
    reports, limits = systems.each("report"), []
    frame.show(frame.COMPARED, rows)
    if name == "decode" and "llava_jax" in reports:
        ours = reports["llava_jax"]
        for batch in batches:
            floor = ours["bytes"][str(batch)] / ours["bandwidth"]
            part = floor / frame.clock(found[batch]["llava_jax"])["min"]
            limits.append([batch, floor * 1e3, f"{part:.1%}"])
        frame.show(["batch", "limit of a step, ms", "ours reaches"], limits)
    if name == "requests":
        for batch, times in found.items():
            each = {n: args.requests / frame.clock(t)["median"] for n, t in times.items()}
            limits += [[batch, n, rate, rate * args.tokens] for n, rate in each.items()]
        frame.show(["slots", "system", "requests/s", "tokens/s"], limits)
    frame.show(
        ["system", "peak memory, GB"], [[n, r["peak_memory_gb"]] for n, r in reports.items()]
    )
    kept = {"times": found, "limits": limits, "reports": reports, "checks": checks}
    frame.record(name, args, rows=rows, **kept)


def _steps(systems: frame.Systems, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """{system: the spread of a decode step}, of answers long and short in turns."""
    found: dict[str, Any] = {name: {} for name in systems.workers}
    turns = []
    for _ in range(args.repeats):
        turns.append({
            name: [systems.ask(name, "answer", batch, n) for n in (1, args.tokens + 1)]
            for name in systems.workers
        })  # fmt: skip
    for name in found:
        for kind in ("cpu_seconds", "seconds"):
            taken = [(t[name][1][kind] - t[name][0][kind]) / args.tokens for t in turns]
            found[name][kind] = frame.spread(taken)
    return found


def _compare(given: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """How others' first logits and tokens differ from the first system's.

    Ends the program where they differ in float32; in bfloat16, and of few bits, rounding decides.
    """
    first, *others = given.items()
    found: dict[str, Any] = {}
    for name, other in others:
        mine = first[1]
        apart = [abs(a - b) for x, y in zip(mine["logits"], other["logits"]) for a, b in zip(x, y)]
        same = [a == b for x, y in zip(mine["ids"], other["ids"]) for a, b in zip(x, y)]
        heads = [x[0] == y[0] for x, y in zip(mine["ids"], other["ids"])]
        found[name] = {
            "largest_difference_of_logits": max(apart, default=None),
            "mean_difference_of_logits": sum(apart) / len(apart) if apart else None,
            "same_first_tokens": sum(heads) / len(heads),
            "same_tokens": sum(same) / len(same),
        }
        exact = args.dtype == "float32" and not args.quantize
        if exact and (not all(same) or max(apart) > 1e-4):
            raise SystemExit(f"{name} answers otherwise: {found[name]}")
    return found


def prompts(config: Any, args: argparse.Namespace, batch: int, seed: int) -> tuple[Any, Any]:
    """(pixels float32[B, S, S, 3], tokens of text int[B, T])."""
    import numpy as np

    rng, size = np.random.default_rng(seed), config.vision.image_size
    pixels = rng.standard_normal((batch, size, size, 3), np.float32)
    return pixels, rng.integers(3, config.language.vocab_size - 2, (batch, args.text))


class Ours:
    """llava_jax: the engine that `load(...).generate_batch` asks."""

    def __init__(self, args: argparse.Namespace):
        from dataclasses import replace

        from llava_jax import generate
        from llava_jax.convert import load_checkpoint

        self.args, self.turn, self.engines = args, 0, {}
        short = {"float32": "fp32", "bfloat16": "bf16"}[args.dtype]
        checkpoint = load_checkpoint(args.folder, dtype=short, lazy=True)  # as llava_jax.load does
        self.config = replace(
            checkpoint.config, quantize=args.quantize, budget=getattr(args, "budget", None)
        )
        self.generator = generate.Generator(
            self.config,
            checkpoint.params,
            consume=True,
            eos_ids=(-1,),
            chunk=getattr(args, "chunk", None),
        )

    def _engine(self, batch: int, keep_logits: bool = False) -> Any:
        from llava_jax.batch import batch_bucket
        from llava_jax.generate import Engine

        key = batch, keep_logits
        if key not in self.engines:
            slots = batch_bucket(batch)
            room = self.config.image_tokens + self.args.text + self.args.tokens + 2
            room = self.generator.slot_length(slots, room)
            self.engines[key] = Engine(
                self.generator, slots, capacity=room, keep_logits=keep_logits
            )
        return self.engines[key]

    def _jobs(
        self,
        batch: int,
        seed: int,
        tokens: int,
        keep_logits: bool = False,
        many: int = 0,
        **how: Any,
    ) -> list[Any]:
        import numpy as np

        from llava_jax.generate import Job
        from llava_jax.settings import SamplingSettings
        from llava_jax.text.example import Example

        engine = self._engine(batch, keep_logits)
        settings = SamplingSettings(max_new_tokens=tokens, **how)
        pixels, text = prompts(self.config, self.args, many or batch, seed)
        jobs = [
            engine.submit(Job(Example(np.array([-200, *t], np.int32), (p,)), settings))
            for p, t in zip(pixels, text)
        ]
        engine.run(jobs)
        return jobs

    def check(self, batch: int) -> dict[str, Any]:
        """Tokens of whole answers, and the logits of their first."""
        jobs = []
        if self.args.dtype == "float32" or batch == self.args.batch[0]:
            # Programs of their own; of one token, so that decoding is not compiled twice.
            jobs = self._jobs(batch, 0, 1, keep_logits=True)
            self.engines.pop((batch, True))  # before the other's cache is made
        self._jobs(batch, 0, self.args.tokens + 1)  # compiled
        whole = self._jobs(batch, 0, self.args.tokens + 1)
        return {
            "ids": [job.ids for job in whole],
            "logits": [job.logits[0].astype(float).tolist() for job in jobs[:ROWS]],
        }

    def answer(self, batch: int, tokens: int, requests: int = 0) -> int:
        """Answers prompts that were not asked before, so many as slots or `requests`."""
        self.turn += 1
        return len(self._jobs(batch, self.turn, tokens, many=requests)[0].ids)

    def report(self) -> dict[str, Any]:
        """Memory, and what a step must read at which bandwidth."""
        import jax

        from bench.machine import bandwidth
        from llava_jax.llava import flatten

        skip = (
            ("vision", "projector")
            if self.config.language.tied_head
            else ("vision", "projector", "language.embed")
        )
        held = flatten(self.generator.state)
        weights = sum(x.nbytes for n, x in held.items() if not n.startswith(skip))
        keys = self.config.image_tokens + self.args.text + self.args.tokens // 2
        stats = jax.devices()[0].memory_stats() or {}
        return {
            "peak_memory_gb": stats.get("peak_bytes_in_use", frame.peak_memory() * 1e9) / 1e9,
            "bytes": {b: weights + b * keys * self.generator.entry_bytes for b in self.args.batch},
            "bandwidth": bandwidth(),
        }


class Theirs:
    """transformers: LlavaForConditionalGeneration.generate, eager, with its scaled dot product."""

    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, args: argparse.Namespace):
        import torch
        import transformers

        self.args, self.turn = args, 0
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.threads:
            torch.set_num_threads(args.threads)
        dtype = getattr(torch, args.dtype)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(args.folder, dtype=dtype)
        self.model = model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None
        self.config = models.model_config(args.size)

    def _generate(self, batch: int, seed: int, tokens: int, **more: Any) -> Any:
        import torch

        pixels, text = prompts(self.config, self.args, batch, seed)
        image = self.config.language.vocab_size + models.IMAGE
        ids = torch.cat(
            [torch.full((batch, self.config.image_tokens), image), torch.from_numpy(text)], 1
        )
        with torch.no_grad():
            return self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=torch.ones_like(ids).to(self.device),
                pixel_values=torch.from_numpy(pixels)
                .permute(0, 3, 1, 2)
                .to(self.device, self.model.dtype),
                max_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                **self.options,
                **more,
            )

    def check(self, batch: int) -> dict[str, Any]:
        """Tokens of whole answers, and the logits of their first."""
        tokens = self.args.tokens + 1
        whole = self._generate(batch, 0, tokens, output_logits=True)
        return {
            "ids": whole.sequences[:, -tokens:].tolist(),
            "logits": whole.logits[0][:ROWS].double().tolist(),
        }

    def answer(self, batch: int, tokens: int, requests: int = 0) -> int:
        """Answers prompts that were not asked before, `requests` of them in batches."""
        for _ in range(-(-requests // batch) or 1):
            self.turn += 1
            length = self._generate(batch, self.turn, tokens).sequences.shape[1]
        return length

    def report(self) -> dict[str, Any]:
        """Memory."""
        import torch

        on_gpu = self.device == "cuda"
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else frame.peak_memory()
        return {"peak_memory_gb": peak}


class Compiled(Theirs):
    """The same by torch.compile, over a static cache."""

    options = {"cache_implementation": "static"}  # noqa: RUF012

    def __init__(self, args: argparse.Namespace):
        import torch

        super().__init__(args)
        self.model.forward = torch.compile(self.model.forward)
