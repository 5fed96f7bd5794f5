"""How likely a model finds a given answer: the loss over the answer's tokens, the end included."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.batch import collate, prompt_shape, room_bucket
from llava_jax.text.constants import IGNORE
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
        config = self.model.config
        example = build_prompt(
            [asked, said],
            self.model.tokenizer,
            self.template,
            use_im_start_end=config.use_im_start_end,
            open_turn=False,
        )
        example = self.model.with_pixels(example)
        shape = prompt_shape([example], config)._replace(targets=room_bucket(example.target_count))
        batch = collate([[example]], shape, config)
        total, greedy = self._score(self.model.generator.leaves, batch)
        count = example.target_count
        return Score(float(total), -float(total) / count, bool(greedy), count)

    def _fn(self, leaves, batch):
        model = self.model.generator.model(leaves)
        targets = batch["targets"][0]  # [P]
        scored = targets != IGNORE
        logits = model.logits(model(batch)[0, batch["target_at"][0]])  # [P, V]
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        greedy = jnp.where(scored, logits.argmax(-1) == targets, True).all()
        return jnp.where(scored, logprob, 0.0).sum(), greedy
