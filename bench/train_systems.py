"""The two systems that bench/train.py lets take turns, each in a process of its own: see `serve`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llava_jax.chips import peak_of

SYSTEMS = ("llava_jax", "transformers")
TRAIN = {
    "full": ("projector", "language"),
    "lora": ("projector", "lora"),
    "projector": ("projector",),
}


def serve(args: argparse.Namespace) -> None:
    """Answers "prepare", "run" and "report" with a line of JSON each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    system: Any = (Ours if args.worker == "llava_jax" else Theirs)(args)
    losses: list[float] = []
    compile_seconds = 0.0
    for word in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        if word.strip() == "report":
            answer = {
                **system.report(),
                "system": args.worker,
                "compile_seconds": compile_seconds,
                "first_loss": losses[0],
                "loss": losses[-1],
                "steps": len(losses),
            }
        elif word.strip() == "prepare":
            compile_seconds = system.prepare()
            losses += system.run(2)  # not timed: memory is taken, kernels are chosen
            answer = {}
        else:
            losses += system.run(args.steps)
            answer = {
                "cpu_seconds": time.process_time() - cpu,
                "seconds": time.perf_counter() - wall,
            }
        print(json.dumps(answer), file=answers, flush=True)


def model_config(args: argparse.Namespace) -> Any:
    """LlavaConfig of `--size` and `--train`, with room for `--length`."""
    from llava_jax.config import LanguageConfig, LlavaConfig, LoraConfig, VisionConfig

    small = LlavaConfig(
        vision=VisionConfig(112, 14, width=256, layers=8, heads=4, mlp_width=1024),
        language=LanguageConfig(
            width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1376
        ),
    )
    made = {
        "tiny": LlavaConfig.tiny(),
        "65m": small,
        "7b": LlavaConfig.v15_7b(),
        "13b": LlavaConfig.v15_13b(),
    }[args.size]
    positions = max(made.language.max_positions, args.length)
    language = replace(made.language, max_positions=positions)
    lora = LoraConfig(128, 256.0, 0.0) if args.train == "lora" else None
    return replace(made, language=language, lora=lora)


def peak_host_memory() -> tuple[float, str]:
    """(GB, what) of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return used / 1e9, "resident on the host"


class Ours:
    """llava_jax: the step that a run of `finetune_7b` with these settings compiles."""

    def __init__(self, args: argparse.Namespace):
        from llava_jax.train.heap import keep_freed_memory

        keep_freed_memory()  # as `llava-jax train` does
        if args.threads == 1:  # read when jax starts
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        import jax

        from llava_jax.sharding import make_mesh
        from llava_jax.train.model_io import fit_model
        from llava_jax.train.program import make_program, planned_params

        self.args, self.devices = args, jax.devices()
        self.config = self._settings()
        self.model = fit_model(self.config, model_config(args))
        self.mesh = make_mesh(**self.config.mesh)
        self.batch = self._batch()
        params = planned_params(self.model, self.mesh)
        self.program = make_program(self.config, self.model, params, self.mesh, steps=10_000)

    def _settings(self) -> Any:
        from llava_jax.train.config import load_config

        on_cpu, small = self.devices[0].platform == "cpu", self.args.size in ("tiny", "65m")
        settings = {
            "batch_size": self.args.rows,
            "data.max_length": self.args.length,
            "trainable": ",".join(TRAIN[self.args.train]),
            "lora_dropout": 0.0,
            "clip_norm": 1.0,
            "warmup_ratio": 0.0,
            "dtype": "float32" if on_cpu else "bfloat16",
            "remat": "none" if small else "full",
            "unroll_layers": small,
        }
        given = [f"{name}={value}" for name, value in settings.items()]
        return load_config("finetune_7b", [f"--config.{x}" for x in given + self.args.settings])

    def _batch(self) -> dict[str, Any]:
        """One batch as the loader makes it: every row full, one picture, the answer at its end."""
        import numpy as np

        from llava_jax.batch import Shape, collate
        from llava_jax.text.example import Example

        rng, size = np.random.default_rng(0), self.model.vision.image_size
        text, answer = text_and_answer(self.args, self.model)
        rows = []
        for _ in range(self.args.rows):
            ids = np.array([1, -200, *rng.integers(3, self.model.language.vocab_size, text)])
            labels = np.where(np.arange(len(ids)) >= len(ids) - answer, ids, -100)
            picture = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
            rows.append([Example(ids, (picture,), labels)])
        return collate(rows, Shape(len(rows), self.args.length, 1, answer), self.model)

    def prepare(self) -> float:
        """Random weights and the compiled step; seconds of compiling."""
        import jax

        from llava_jax.sharding import put_batch
        from llava_jax.train.control import Flags, put_flags

        program = self.program
        self.put = lambda: put_batch(self.batch, self.mesh, self.config.grad_accum)
        self.flags = put_flags(Flags(), self.mesh)
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            lowered = program.step.lower(program.state, program.frozen, self.put(), self.flags)
            self.step = lowered.compile()
            seconds = time.perf_counter() - start
            self.frozen = random_arrays(program.frozen)
            self.state = program.start(random_arrays(program.state.params))
        return seconds

    def run(self, steps: int) -> list[float]:
        """The losses of so many steps; the host waits for the last one only."""
        import jax

        metrics = []
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, one = self.step(self.state, self.frozen, self.put(), self.flags)
                metrics.append(one["loss"])
        return [float(loss) for loss in metrics]

    def report(self) -> dict[str, Any]:
        """What does not change from turn to turn."""
        import jax
        import jax.numpy as jnp

        device = self.devices[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        gigabytes, of = (memory / 1e9, "a device") if memory else peak_host_memory()
        dtype = jnp.dtype(self.config.dtype)
        x = jnp.ones((SQUARE[device.platform != "cpu"],) * 2, dtype)
        product = jax.jit(jnp.matmul)

        def trained(tree):
            return sum(leaf.size for leaf in tree.values())

        moving = trained(self.program.state.params)
        peak = peak_of(device.device_kind)
        return {
            "device": device.platform,
            "device_name": processor() if device.platform == "cpu" else device.device_kind,
            "devices": len(self.devices),
            "dtype": self.config.dtype,
            "versions": versions("jax", "jaxlib", "flax", "optax"),
            "parameters": moving + trained(self.program.frozen),
            "trained": moving,
            "rows": self.args.rows,
            "real_tokens": int((self.batch["segments"] > 0).sum()),
            "measured_matmul_flops": len(self.devices)
            * matmul_rate(lambda: product(x, x).block_until_ready(), len(x), device.platform),
            "peak_flops": peak and peak * len(self.devices),
            "peak_memory_gb": gigabytes,
            "memory_of": of,
        }


SQUARE = (1024, 8192)
"""Rows of the matrices whose product is timed: on a CPU, on an accelerator."""


def matmul_rate(product: Any, n: int, platform: str) -> float:
    """FLOP/s of the quickest of ten n x n products; by processor time on a CPU."""
    clock = time.process_time if platform == "cpu" else time.perf_counter
    times = []
    for _ in range(11):
        start = clock()
        product()
        times.append(clock() - start)
    return 2 * n**3 / min(times[1:])


def versions(*names: str) -> dict[str, str]:
    """{package: version}."""
    return {name: version(name) for name in names}


def text_and_answer(args: argparse.Namespace, config: Any) -> tuple[int, int]:
    """Tokens of text in a row, and how many of them are supervised."""
    text = args.length - 1 - config.image_tokens
    answer = round(args.supervised * args.length)
    if not 0 < answer < text:
        raise SystemExit(
            f"--length {args.length}: {text} positions are left beside the picture's "
            f"{config.image_tokens}, {answer} are to be supervised"
        )
    return text, answer


def random_arrays(abstract: Any) -> Any:
    """Normal noise of standard deviation 0.02, each array made where it lies; norms are 1."""
    import jax
    import jax.numpy as jnp

    def one(name: str, leaf: Any, seed: int) -> Any:
        def make(key):
            if name.endswith(".scale"):
                return jnp.ones(leaf.shape, leaf.dtype)
            return (0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)).astype(leaf.dtype)

        return jax.jit(make, out_shardings=leaf.sharding)(jax.random.key(seed))

    return {name: one(name, leaf, i) for i, (name, leaf) in enumerate(abstract.items())}


class Theirs:
    """transformers: LlavaForConditionalGeneration in torch, eager, with its scaled dot product."""

    def __init__(self, args: argparse.Namespace):
        import torch
        import transformers

        self.args, self.config = args, model_config(args)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if args.threads:
            torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        v, t = self.config.vision, self.config.language
        text = {
            "model_type": "llama",
            "vocab_size": t.vocab_size,
            "hidden_size": t.width,
            "intermediate_size": t.mlp_width,
            "num_hidden_layers": t.layers,
            "num_attention_heads": t.heads,
            "num_key_value_heads": t.kv_heads,
            "head_dim": t.head_width,
            "max_position_embeddings": t.max_positions,
        }
        vision = {
            "model_type": "clip_vision_model",
            "hidden_size": v.width,
            "intermediate_size": v.mlp_width,
            "num_hidden_layers": v.layers,
            "num_attention_heads": v.heads,
            "image_size": v.image_size,
            "patch_size": v.patch_size,
        }
        self.image_token = t.vocab_size - 1
        config = transformers.LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=self.image_token,
            image_seq_length=self.config.image_tokens,
        )
        with torch.device(self.device):
            self.net = transformers.LlavaForConditionalGeneration(config)

    def prepare(self) -> float:
        """Freezes what `--train` leaves alone; nothing is compiled."""
        import torch

        learns = {"full": ("projector", "language_model", "lm_head"), "projector": ("projector",)}
        if self.args.train == "lora":
            import peft

            names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
            linears = rf".*language_model.*\.({names.replace(' ', '|')})"
            lora = peft.LoraConfig(r=128, lora_alpha=256, lora_dropout=0.0, target_modules=linears)
            self.net = peft.get_peft_model(self.net, lora)
        for name, value in self.net.named_parameters():
            value.requires_grad_(
                any(w in name for w in learns.get(self.args.train, ("projector", "lora_")))
            )
            if not value.requires_grad:
                value.data = value.data.to(self.dtype)
        if self.args.size in ("7b", "13b"):
            self.net.gradient_checkpointing_enable()
            self.net.enable_input_require_grads()
        self.net.train()
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, weight_decay=0.0)
        text, answer = text_and_answer(self.args, self.config)
        rows, size = self.args.rows, self.config.vision.image_size
        image = torch.full((rows, self.config.image_tokens), self.image_token)
        ids = torch.cat(
            [torch.ones(rows, 1).long(), image, torch.randint(3, self.image_token, (rows, text))], 1
        )
        labels = ids.clone()
        labels[:, :-answer] = -100
        self.batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(rows, 3, size, size),
            "labels": labels,
        }
        return 0.0

    def run(self, steps: int) -> list[float]:
        """The losses of so many steps."""
        import torch

        losses = []
        for _ in range(steps):
            batch = {name: value.to(self.device) for name, value in self.batch.items()}
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = self.net(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return [float(loss) for loss in losses]

    def report(self) -> dict[str, Any]:
        """What does not change from turn to turn."""
        import torch

        on_gpu = self.device == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else processor()
        gigabytes, of = peak_host_memory()
        if on_gpu:
            gigabytes, of = torch.cuda.max_memory_allocated() / 1e9, "a device"
        x = torch.ones((SQUARE[on_gpu],) * 2, dtype=self.dtype, device=self.device)

        def product():
            y = x @ x
            if on_gpu:
                torch.cuda.synchronize()
            return y

        return {
            "device": self.device,
            "device_name": name,
            "devices": 1,
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": versions("torch", "transformers"),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "trained": sum(p.numel() for p in self.trained),
            "rows": self.args.rows,
            "real_tokens": self.args.rows * self.args.length,
            "measured_matmul_flops": matmul_rate(product, len(x), self.device),
            "peak_flops": peak_of(name),
            "peak_memory_gb": gigabytes,
            "memory_of": of,
        }


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()
