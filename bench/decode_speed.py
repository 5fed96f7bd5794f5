"""Prefill and decode speed on this machine, beside Hugging Face transformers, in one process.

    python bench/decode_speed.py [--batch 1 8] [--tokens 64] [--threads 1]

A random model of 65 M parameters (decoder 512 x 8, vocabulary 32000; tower 256 x 8, 64 features
per image) answers prompts of one image and 64 text tokens, in float32. Times are processor seconds, the
best of `--repeats`: on a busy machine wall time says nothing.
"""

import argparse
import os
import time

SIZES = {
    "text": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "vision": {
        "model_type": "clip_vision_model",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
}
IMAGE, TEXT = 31999, 64


def best(action, repeats: int) -> float:
    """Processor seconds of the quickest of `repeats` runs, after one that does not count."""
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


def hugging_face(args):
    """(function of (rows, tokens) that answers, the folder its weights were saved to)."""
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **SIZES["text"]},
        vision_config=SIZES["vision"],
        image_token_index=IMAGE,
        image_seq_length=64,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(args.folder)
    pixels = torch.zeros(1, 3, 112, 112)
    row = torch.cat([torch.full((64,), IMAGE), torch.arange(3, 3 + TEXT)])

    def answer(rows: int, tokens: int) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=row.repeat(rows, 1),
                attention_mask=torch.ones(rows, len(row), dtype=torch.long),
                pixel_values=pixels.repeat(rows, 1, 1, 1),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )

    return answer


def ours(args):
    """The same over this package's generator."""
    import numpy as np

    from llava_jax import generate
    from llava_jax.convert import load_checkpoint
    from llava_jax.settings import SamplingSettings
    from llava_jax.text.example import Example

    checkpoint = load_checkpoint(args.folder)
    generator = generate.Generator(
        checkpoint.config, checkpoint.params, consume=True, eos_ids=(-1,)
    )
    pixels = np.zeros((112, 112, 3), np.float32)
    prompt = Example(np.asarray([-200, *range(3, 3 + TEXT)], np.int32), (pixels,))

    def answer(rows: int, tokens: int) -> None:
        generate.answer(generator, [prompt] * rows, SamplingSettings(max_new_tokens=tokens))

    return answer


def main() -> None:
    """Prints one line per system and batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default="/tmp/decode_speed", help="where the weights go")
    args = parser.parse_args()
    if args.threads == 1:  # before jax is imported
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
            " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
    for name, make in (("transformers", hugging_face), ("llava_jax", ours)):
        answer = make(args)
        for rows in args.batch:
            prefill = best(lambda: answer(rows, 1), args.repeats)  # noqa: B023
            whole = best(lambda: answer(rows, args.tokens + 1), args.repeats)  # noqa: B023
            step = (whole - prefill) / args.tokens
            print(
                f"{name:13} batch {rows}: prefill {prefill:.3f} s, "
                f"decode {step * 1e3:.1f} ms per step, {rows / step:.0f} tokens/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
