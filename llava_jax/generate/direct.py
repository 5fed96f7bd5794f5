"""Answers to prompts that are ids and pixels already, without text: for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from llava_jax.batch import batch_bucket, check_prompt
from llava_jax.errors import PromptError
from llava_jax.generate.engine import Engine
from llava_jax.generate.generator import Generator
from llava_jax.generate.job import Job
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example


def answer(
    generator: Generator,
    prompts: Sequence[Example],
    settings: SamplingSettings | Sequence[SamplingSettings] = SamplingSettings(),  # noqa: B008
    *,
    keep_logits: bool = False,
) -> list[Job]:
    """Answers prompts (Examples without labels, with pixels for images) together, in order.

    Raises PromptError when a prompt is malformed or leaves no room for an answer.
    """
    if not prompts:
        raise PromptError("there are no prompts")
    rows = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
    if len(rows) != len(prompts):
        raise PromptError(f"{len(rows)} sampling settings for {len(prompts)} prompts")
    for i, prompt in enumerate(prompts):
        name = "the prompt" if len(prompts) == 1 else f"prompt {i} of the batch"
        check_prompt(prompt, generator.config, name)
    slots = batch_bucket(len(prompts))
    engine = Engine(generator, slots, keep_logits=keep_logits)
    jobs = [engine.submit(Job(p, s)) for p, s in zip(prompts, rows)]
    engine.run(jobs)
    return jobs
