"""CPU seconds of plain and chunked attention, forward and backward, beside each other.

    python bench/attention.py [--lengths 208 512 1024 2048 4096] [--heads 8] [--width 64]

Rows of about 4096 positions in all, in float32: one example a row, or examples of 256. Processor
seconds, the best of `--repeats` interleaved runs: on a busy machine wall time says nothing.
"""

import argparse
import time


def main() -> None:
    """Prints one line per length and kind of row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[208, 512, 1024, 2048, 4096])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for length in args.lengths:
        for example in {length, min(length, 256)}:
            plain, chunked = measure(length, example, args)
            print(f"T {length}, examples of {example}: plain {plain:.3f}, chunked {chunked:.3f}")


def measure(length: int, example: int, args: argparse.Namespace) -> list[float]:
    """[plain, chunked] seconds for rows of `length` positions that hold examples of `example`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llava_jax.attention import PLAIN, Causal, Choice, attention

    rows = max(1, 4096 // length)
    rng = np.random.default_rng(0)
    shape = (rows, length, args.heads, args.width)
    q, k, v, weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))
    segments, positions = divmod(np.tile(np.arange(length, dtype=np.int32), (rows, 1)), example)
    seen = Causal(jnp.asarray(segments + 1), jnp.asarray(positions))

    def program(choice):
        def total(q, k, v, seen):
            return (attention(q, k, v, seen, choice) * weights).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

    programs = [program(choice) for choice in (PLAIN, Choice("chunked"))]
    times: list[list[float]] = [[], []]
    for run in range(args.repeats + 1):
        for step, taken in zip(programs, times):
            start = time.process_time()
            jax.block_until_ready(step(q, k, v, seen))
            if run:  # the first compiles
                taken.append(time.process_time() - start)
    return [min(taken) for taken in times]


if __name__ == "__main__":
    main()
