"""From a record of the data set to the Example that an epoch shows of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llava_jax.batch import Buckets, size_of
from llava_jax.config import LlavaConfig
from llava_jax.data.check import Dataset
from llava_jax.data.epoch import TURNS
from llava_jax.data.order import lasting_random
from llava_jax.data.pixels import Cache
from llava_jax.data.settings import DataSettings
from llava_jax.errors import SampleError
from llava_jax.text.example import Example, sample_turns
from llava_jax.text.sample import ExampleMaker, check_trained

MakeExample = Callable[[Any, str], Example]
"""(record, id) -> its Example. Raises SampleError."""


class Samples:
    """Makes the samples of a data set. Threads may share it."""

    def __init__(
        self,
        data: Dataset,
        make_example: MakeExample,
        settings: DataSettings,
        image_tokens: int,
        cache: Cache,
    ):
        self._data, self._make, self._settings = data, make_example, settings
        self._image_tokens, self._cache = image_tokens, cache
        self._buckets = buckets_of(settings)

    def __call__(self, place: int, seat: int, epoch: int) -> Example:
        """The sample of record `place` as it is seen at `seat` of an epoch.

        Raises SampleError for one that cannot be trained, or fits into no bucket.
        """
        s = self._settings
        example = self._example(place)
        if s.turns_per_sample:
            rng = lasting_random(s.seed, epoch, seat, TURNS)
            example = sample_turns(example, s.turns_per_sample, rng)
        example = example.truncated(s.max_length, self._image_tokens)
        if not s.compat:
            check_trained(example, s.max_length)
        self._buckets.hold(size_of([example], self._image_tokens), example.id)
        return example

    def _example(self, place: int) -> Example:
        found = self._cache.get(place)
        if found is None:
            try:
                found = self._make(self._data.records[place], self._data.ids[place])
            except SampleError as e:
                found = e
            size = 300 if isinstance(found, SampleError) else 12 * len(found.ids) + 600
            self._cache.put(place, found, size)
        if isinstance(found, SampleError):
            raise SampleError(found.message, fix=found.fix)
        return found


def example_maker(settings: DataSettings, model_config: LlavaConfig, tokenizer: Any) -> MakeExample:
    """How a run's settings make an Example of a record."""
    s = settings
    # Where all independent turns are trained, those that do not fit are left out; a conversation,
    # and turns that are drawn, are cut when they are given out.
    early = s.compat or (s.turns == "independent" and not s.turns_per_sample)
    maker = ExampleMaker(
        tokenizer,
        version=s.version,
        max_length=s.max_length if early else None,
        image_tokens=model_config.image_tokens,
        turns=s.turns,
        compat=s.compat,
        use_im_start_end=model_config.use_im_start_end,
    )

    def make(record: Any, name: str) -> Example:
        return replace(maker(record), id=name)

    return make


def buckets_of(settings: DataSettings) -> Buckets:
    """The padded sizes that the settings allow."""
    s = settings
    return Buckets(s.length_buckets, s.image_buckets, s.target_buckets)
