"""What holding a model's decoder in 8 or 4 bits costs: perplexity and logits beside the whole model.

    python bench/quantize.py [--model tiny] [--pictures 30]

Every kind of question of the quickstart is asked about pictures that it never trains on. Perplexity is
that of the right answers' tokens; the other columns compare logits at the same tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np

import llava_jax
from llava_jax.batch import collate, prompt_shape
from llava_jax.model import Request
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.text.example import Example

KINDS = ("", "int8", "nf4")
ROWS = 16


def examples(model, folder: Path):
    """[(prompt with its right answer, tokens of the answer)] of the held-out questions."""
    found = []
    for row in map(json.loads, (folder / "heldout.jsonl").read_text().splitlines()):
        request = Request(row["text"], folder / row["image"])
        prompt = model.with_pixels(model.example(request))
        said = [*model.tokenizer.encode(row["answer"], add_bos=False), model.tokenizer.eos_id]
        found.append((Example(np.concatenate([prompt.ids, said]), prompt.images), len(said)))
    return found


def logits(model, asked) -> list[np.ndarray]:
    """float32[tokens of the answer, V] that predict each, per example."""
    g = model.generator

    @jax.jit
    def forward(leaves, batch):
        network = g.model(leaves)
        return network.logits(network(batch))

    whole = [one for one, _ in asked]
    shape, found = prompt_shape(whole, model.config), []
    for start in range(0, len(asked), ROWS):
        some = [*asked[start : start + ROWS]]
        full = some + [some[0]] * (ROWS - len(some))
        out = np.asarray(
            forward(g.leaves, collate([[one] for one, _ in full], shape, model.config))
        )
        for row, (one, many) in zip(out, some):
            end = one.length(model.config.image_tokens) - 1
            found.append(row[end - many : end])
    return found


def main() -> None:
    """Prints one row per way of holding the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pictures", type=int, default=30)
    args = parser.parse_args()
    print(
        "| held in | decoder, MB | perplexity | mean logit difference | largest | same first choice |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        folder, first = make_dataset(tmp, train=1, held_out=args.pictures), None
        for kind in KINDS:
            model = llava_jax.load(args.model, quantize=kind)
            asked = examples(model, folder)
            rows = np.concatenate(logits(model, asked))  # [tokens, V]
            right = np.concatenate([one.ids[-many:] for one, many in asked])
            logprobs = rows - np.log(
                np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)
            )
            logprobs -= rows.max(-1, keepdims=True)
            loss = -logprobs[np.arange(len(right)), right].mean()
            first = rows if first is None else first
            off = np.abs(rows - first)
            same = (rows.argmax(-1) == first.argmax(-1)).mean()
            size = sum(
                x.nbytes for n, x in model.generator.params() if n.startswith("language.layers")
            )
            print(f"| {kind or 'its own type'} | {size / 1e6:.2f} | {np.exp(loss):.4f} "
                  f"| {off.mean():.4f} | {off.max():.3f} | {same:.2%} |")  # fmt: skip


if __name__ == "__main__":
    main()
