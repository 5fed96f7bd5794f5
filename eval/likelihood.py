"""How likely a model finds a given answer: the loss over the answer's tokens, the end included."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.generate.layout import Prompt, length_bucket
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.prompt import build_prompt


@dataclass(frozen=True)
class Score:
    """total: sum of log-probabilities. mean_loss: -total per token. greedy: whether every token is
    the likeliest. tokens: how many."""

    total: float
    mean_loss: float
    greedy: bool
    tokens: int


class Likelihood:
    """Scores answers with a `llava_jax.LlavaModel`, one at a time, padded to length buckets."""

    def __init__(self, model: Any, template: str | None = None):
        self.model, self.template = model, template or model.config.template
        self._score = jax.jit(self._fn)

    def __call__(self, content: list[dict[str, Any]], answer: str) -> Score:
        """The score of `answer` to a user's turn of text and image parts (see llava_jax.model)."""
        asked = {"role": "user", "content": content}
        said = {"role": "assistant", "content": answer}
        extra = {"use_im_start_end": self.model.config.use_im_start_end}
        before = build_prompt([asked], self.model.tokenizer, self.template, **extra)
        whole = build_prompt(
            [asked, said], self.model.tokenizer, self.template, open_turn=False, **extra
        )
        pixels = tuple(self.model.pixels(i) for i in whole.images)
        prompt = Prompt(np.asarray(whole.ids, np.int32), pixels)
        self.model.generator.check(prompt)
        batch, start, end = self._batch(prompt, len(before.ids))
        total, greedy = self._score(self.model.generator._leaves, batch, start, end)
        count = int(end - start)
        return Score(float(total), -float(total) / count, bool(greedy), count)

    def _batch(self, prompt: Prompt, known: int) -> tuple[dict[str, np.ndarray], int, int]:
        """The prompt as a batch of one row, and the range of positions whose token is scored.

        known: ids before the answer.
        """
        config = self.model.config
        per_image, n = config.image_tokens, prompt.positions(config)
        length = length_bucket(n)
        tokens, slots = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        at = seen = start = 0
        for i, id_ in enumerate(prompt.ids.tolist()):
            start = at if i == known else start
            if id_ == IMAGE_TOKEN:
                slots[at : at + per_image] = np.arange(seen, seen + per_image)
                at, seen = at + per_image, seen + per_image
            else:
                tokens[at] = id_
                at += 1
        size = config.vision.image_size
        images = (
            np.stack(prompt.images) if prompt.images else np.zeros((0, size, size, 3), np.uint8)
        )
        batch = {
            "tokens": tokens,
            "slots": slots,
            "positions": np.where(np.arange(length) < n, np.arange(length), 0).astype(np.int32),
            "segments": (np.arange(length) < n).astype(np.int32),
            "images": images,
        }
        return {k: v[None] for k, v in batch.items()}, start, n

    def _fn(self, leaves, batch, start, end):
        model = self.model.generator._model(leaves)
        logits = model.logits(model(batch))[0, :-1]
        target = batch["tokens"][0, 1:]
        place = jnp.arange(len(target)) + 1
        scored = (place >= start) & (place < end)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        greedy = jnp.where(scored, logits.argmax(-1) == target, True).all()
        return jnp.where(scored, logprob, 0.0).sum(), greedy
