"""Compiles decoding and reading of prompts for hardware that need not be here, and counts what they move.

    python -m bench aot                                  # 7B on v5e, H100 and H200; needs their compilers
    python -m bench aot --hardware 1xH100 --held nf4 --batch 1 8 64 --layers 4

No weights, no device: shapes alone, as `llava-jax plan` compiles training steps (docs/scale.md). Of a token's
step are counted the bytes that its kernels read and write in device memory, by the compiled program, and
what any program must read: the weights that are held, and the keys and values of `--valid` positions. Their
ratio is the share of the bandwidth's limit that would be reached if every kernel ran at full bandwidth:
what is lost to copies and temporaries, not to kernels that are slow or to gaps between them.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import replace
from typing import Any

from bench import frame, models

HELD = ("bfloat16", "int8", "nf4")
HEAD = (
    "hardware", "held", "batch", "must read, MB", "moves, MB", "share", "kernels",
    "temporary, MB", "at least, ms", "compiled in, s",
)  # fmt: skip


def main(name: str, words: list[str]) -> int:
    """Prints the tables. Ends the program where a compiler is not installed."""
    parser = frame.parser(__doc__, threads=0)
    parser.add_argument("--size", choices=models.SIZES, default="7b")
    parser.add_argument("--hardware", nargs="+", default=["v5e-4", "1xH100", "1xH200"])
    parser.add_argument("--held", nargs="+", choices=HELD, default=list(HELD))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--capacity", type=int, default=1024, help="positions of a slot")
    parser.add_argument("--valid", type=int, default=700, help="positions that are filled")
    parser.add_argument("--layers", type=int, help="of the decoder, fewer than the size has")
    args = parser.parse_args(words)

    from llava_jax.errors import ConfigError

    before = dict(os.environ)
    try:
        return compare(name, args)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    finally:  # the benchmarks after this one are for what is here
        os.environ.clear()
        os.environ.update(before)


def compare(name: str, args: argparse.Namespace) -> int:
    """Compiles everything, and prints and writes the tables."""
    from llava_jax.plan import compile as compiler
    from llava_jax.plan.topology import parse_topology

    topologies = [parse_topology(one) for one in args.hardware]
    compiler.prepare(topologies)
    decoded = []
    for topology in topologies:
        for held in args.held:
            for batch in args.batch:
                decoded.append(decoding(topology, held, batch, args))
                print(decoded[-1], flush=True)
    read = [reading(topology, args) for topology in topologies]
    for head, rows in ((HEAD, decoded), (READ, read)):
        frame.show([*head], [[one[key] for key in head] for one in rows])
    versions = {k: v for t in topologies for k, v in compiler.versions(t).items()}
    frame.record(name, args, decode=decoded, read=read, compilers=versions)
    return 0


class Shapes:
    """A Generator of abstract parameters on one device of a topology, and what its programs take."""

    def __init__(self, topology: Any, held: str, args: argparse.Namespace):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from llava_jax.generate import Generator, weights
        from llava_jax.plan.compile import devices_of
        from llava_jax.sharding import make_mesh

        config = models.model_config(args.size)
        layers = args.layers or config.language.layers
        language = replace(config.language, layers=layers)
        self.config = replace(
            config, language=language, quantize="" if held == "bfloat16" else held
        )
        mesh = make_mesh(fsdp=1, devices=devices_of(topology)[:1])
        here = NamedSharding(mesh, PartitionSpec())

        class Described(Generator):
            """Holds shapes where a Generator holds arrays."""

            def set_params(self, params: Any, *, consume: bool = False) -> None:
                self.graphdef, self.state = weights.graph(self.config, self.compute, self.unrolled)
                named = {
                    ".".join(map(str, path)): v for path, v in weights.nnx.to_flat_state(self.state)
                }
                self.leaves = [_held(name, v) for name, v in named.items()]
                self.names, self.version, self.eyes = list(named), 1, {}
                self._treedef = jax.tree.structure(self.state)

        def _held(name: str, variable: Any) -> Any:
            x = variable.get_value()
            scales = name.endswith(".scales")
            dtype = jnp.bfloat16 if x.dtype == jnp.float32 and not scales else x.dtype
            return jax.ShapeDtypeStruct(x.shape, dtype, sharding=here)

        table = {"language.embed.embedding": jax.ShapeDtypeStruct((), jnp.bfloat16)}
        self.generator = Described(self.config, table, mesh=mesh)
        self.put = lambda tree: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree
        )

    def state(self, slots: int, capacity: int) -> Any:
        """The State of so many slots."""
        import jax

        with self.generator.scope():
            return self.put(jax.eval_shape(lambda: self.generator._new_state(slots, capacity, 1)))

    def limits(self, rows: int) -> Any:
        """Of answers that are not constrained."""
        import jax
        import jax.numpy as jnp

        from llava_jax.generate.state import Limits

        words = -(-self.config.language.vocab_size // 32)
        shape = jax.ShapeDtypeStruct
        return self.put(Limits(shape((rows,), bool), shape((rows, words), jnp.uint32)))

    def weights(self) -> int:
        """Bytes of the weights that a token reads: not the tower, nor the table of embeddings."""
        skip = ("vision", "projector", "language.embed")
        named = zip(self.generator.names, self.generator.leaves)
        return sum(
            math.prod(x.shape) * x.dtype.itemsize for n, x in named if not n.startswith(skip)
        )


def decoding(topology: Any, held: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """A row of the table, by HEAD."""
    import jax
    import jax.numpy as jnp

    from llava_jax.plan import hlo

    shapes = Shapes(topology, held, args)
    generator = shapes.generator
    number, live = (shapes.put(jax.ShapeDtypeStruct(*x)) for x in (((), "int32"), ((batch,), bool)))
    with generator.scope():
        lowered = generator.decode.lower(
            *(generator.leaves, shapes.state(batch, args.capacity), live, shapes.limits(batch)),
            *(number, number),
            keep_logits=False,
        )
    compiled, seconds = _compiled(lowered)
    module = hlo.parse(compiled.as_text())
    entry = 2 * shapes.config.language.layers * shapes.config.language.kv_heads
    entry *= shapes.config.language.head_width * jnp.dtype(generator.compute.dtype).itemsize
    must = shapes.weights() + batch * args.valid * entry
    whole_blocks = -(-args.valid // generator.block) * generator.block
    loop = max((one for one in _loops(module, module.entry)), key=lambda n: _size(module, n))
    moved, kernels = _moved(module, loop)
    moved += batch * whole_blocks * entry
    return {
        "hardware": topology.name,
        "held": held,
        "batch": batch,
        "must read, MB": must / 1e6,
        "moves, MB": moved / 1e6,
        "share": must / moved,
        "kernels": kernels,
        "temporary, MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "at least, ms": moved / topology.chip.hbm * 1e3,
        "compiled in, s": seconds,
        "weights, MB": shapes.weights() / 1e6,
    }


READ = ("hardware", "tokens", "weights, MB", "moves, MB", "temporary, MB", "at least, ms")


def reading(topology: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A row for one chunk of a prompt in bfloat16, by READ."""
    import jax
    import numpy as np

    from llava_jax.generate.sampling import Controls
    from llava_jax.generate.state import Chunk
    from llava_jax.plan import hlo, traffic

    shapes = Shapes(topology, "bfloat16", args)
    generator = shapes.generator
    tokens, row = np.zeros((1, generator.chunk), np.int32), np.zeros(1, np.int32)
    chunk = Chunk(
        tokens=tokens,
        places=tokens,
        positions=tokens,
        ahead=row,
        slots=row,
        start=row,
        length=row,
        last=row > 0,
    )
    controls = jax.tree.map(np.asarray, Controls.rows(1))
    with generator.scope():
        lowered = generator.read.lower(
            *(generator.leaves, shapes.state(1, args.capacity), shapes.put(chunk)),
            shapes.put(controls),
        )
    compiled, _ = _compiled(lowered)
    moved = traffic.hbm_bytes(hlo.parse(compiled.as_text()))
    products = sum(
        math.prod(x.shape)
        for n, x in zip(generator.names, generator.leaves)
        if n.startswith("language.layers") and n.endswith(".kernel")
    )
    flops = 2 * products * generator.chunk
    seconds = max(moved / topology.chip.hbm, flops / topology.chip.flops)
    return {
        "hardware": topology.name,
        "tokens": generator.chunk,
        "moves, MB": moved / 1e6,
        "weights, MB": shapes.weights() / 1e6,
        "at least, ms": seconds * 1e3,
        "temporary, MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }


def _compiled(lowered: Any) -> tuple[Any, float]:
    start = time.monotonic()
    return lowered.compile(), round(time.monotonic() - start, 1)


# What a turn of the loop over tokens moves ----------------------------------------------------------


def _loops(module: Any, name: str) -> list[str]:
    """Bodies of the loops in a computation."""
    whiles = [one for one in module.computations[name].values() if one.op == "while"]
    return [body for one in whiles for body in one.called("body")]


def _size(module: Any, name: str) -> int:
    """Instructions of a computation and of the loops and branches in it."""
    keys = ("body", "branch_computations", "true_computation", "false_computation", "to_apply")
    inside = module.computations[name].values()
    called = [c for one in inside if one.op != "fusion" for key in keys for c in one.called(key)]
    return len(inside) + sum(_size(module, c) for c in called)


def _moved(module: Any, name: str) -> tuple[float, int]:
    """(bytes, kernels) of one run of a computation, but for attention over the cache.

    Of a conditional the cheapest branch counts: that of greedy answers.
    """
    from llava_jax.plan import traffic

    total, kernels, computation = 0.0, 0, module.computations[name]
    for one in computation.values():
        if one.op == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            branches = [_moved(module, b) for key in keys for b in one.called(key)]
            more = min(branches, default=(0.0, 0))
        elif one.op == "call":
            more = _moved(module, one.called("to_apply")[0])
        elif one.op == "while":  # attention by XLA; its keys are counted by the caller
            more = 0.0, sum(_moved(module, body)[1] for body in one.called("body"))
        elif one.op in traffic.FREE or one.op.endswith("-done"):
            continue
        elif "mha_forward" in one.rest:  # attention by Pallas
            more = 0.0, 1
        else:
            more = traffic.moved_by(module, computation, one), 1
        total, kernels = total + more[0], kernels + more[1]
    return total, kernels
