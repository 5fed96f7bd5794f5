"""The two systems that train.py lets take turns, each in a process of its own."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from bench import models
from bench.frame import peak_memory, processor
from bench.machine import SIDE, rate
from llava_jax.chips import peak_of

SYSTEMS = {"llava_jax": "bench.train_systems:Ours", "transformers": "bench.train_systems:Theirs"}
RESIDENT = "resident on the host"
TRAIN = {
    "full": ("projector", "language"),
    "lora": ("projector", "lora"),
    "projector": ("projector",),
}


def model_config(args: argparse.Namespace) -> Any:
    """LlavaConfig of `--size` and `--train`, of `--layers`, with room for `--length`."""
    from llava_jax.config import LoraConfig

    lora = LoraConfig(128, 256.0, 0.0) if args.train == "lora" else None
    config = models.model_config(args.size, args.length)
    layers = args.layers or config.language.layers
    return replace(config, language=replace(config.language, layers=layers), lora=lora)


class System:
    """What train.py asks of both. Kinds of them make `start` and `steps`."""

    def prepare(self) -> dict[str, float]:
        """Seconds of compiling. Two steps that are not timed: memory is taken, kernels are chosen."""
        seconds = self.start()
        self.losses = self.steps(2)
        return {"compile_seconds": seconds}

    def run(self, steps: int) -> None:
        """So many steps."""
        self.losses += self.steps(steps)

    def report(self) -> dict[str, Any]:
        """What does not change from turn to turn."""
        losses = {"first_loss": self.losses[0], "loss": self.losses[-1], "steps": len(self.losses)}
        return {**self.facts(), **losses}

    def start(self) -> float:
        raise NotImplementedError

    def steps(self, steps: int) -> list[float]:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        raise NotImplementedError


class Ours(System):
    """llava_jax: the step that a run of `finetune_7b` with these settings compiles."""

    def __init__(self, args: argparse.Namespace):
        from llava_jax.train.heap import keep_freed_memory

        keep_freed_memory()  # as `llava-jax train` does
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

    def start(self) -> float:
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

    def steps(self, steps: int) -> list[float]:
        """The losses of so many steps; the host waits for the last one only."""
        import jax

        metrics = []
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, one = self.step(self.state, self.frozen, self.put(), self.flags)
                metrics.append(one["loss"])
        return [float(loss) for loss in metrics]

    def facts(self) -> dict[str, Any]:
        """What does not change from turn to turn."""
        import jax
        import jax.numpy as jnp

        device = self.devices[0]
        memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
        gigabytes, of = (memory / 1e9, "a device") if memory else (peak_memory(), RESIDENT)
        dtype = jnp.dtype(self.config.dtype)
        x = jnp.ones((SIDE[device.platform != "cpu"],) * 2, dtype)
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
            "parameters": moving + trained(self.program.frozen),
            "trained": moving,
            "rows": self.args.rows,
            "real_tokens": int((self.batch["segments"] > 0).sum()),
            "measured_matmul_flops": len(self.devices)
            * matmul_rate(lambda: product(x, x).block_until_ready(), len(x)),
            "peak_flops": peak and peak * len(self.devices),
            "peak_memory_gb": gigabytes,
            "memory_of": of,
        }


def matmul_rate(product: Any, n: int) -> float:
    """FLOP/s of the quickest of ten n x n products."""
    return rate(product, 2.0 * n**3)["best"]


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


class Theirs(System):
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
        self.image_token = self.config.language.vocab_size + models.IMAGE
        config = models.transformers_config(self.config)
        with torch.device(self.device):
            self.net = transformers.LlavaForConditionalGeneration(config)

    def start(self) -> float:
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

    def steps(self, steps: int) -> list[float]:
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

    def facts(self) -> dict[str, Any]:
        """What does not change from turn to turn."""
        import torch

        on_gpu = self.device == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else processor()
        gigabytes, of = peak_memory(), RESIDENT
        if on_gpu:
            gigabytes, of = torch.cuda.max_memory_allocated() / 1e9, "a device"
        x = torch.ones((SIDE[on_gpu],) * 2, dtype=self.dtype, device=self.device)

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
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "trained": sum(p.numel() for p in self.trained),
            "rows": self.args.rows,
            "real_tokens": self.args.rows * self.args.length,
            "measured_matmul_flops": matmul_rate(product, len(x)),
            "peak_flops": peak_of(name),
            "peak_memory_gb": gigabytes,
            "memory_of": of,
        }
