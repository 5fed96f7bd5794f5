"""From a record of the data set to token ids with a place for every image feature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.data.batch import Expanded, bucket, choose_turns, expand, row_needs, without_id
from llava_jax.data.check import Dataset
from llava_jax.data.epoch import TURNS
from llava_jax.data.order import lasting_random
from llava_jax.data.pixels import Cache
from llava_jax.data.settings import DataSettings
from llava_jax.errors import SampleError
from llava_jax.text.sample import Example, ExampleMaker

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

    def __call__(self, place: int, seat: int, epoch: int) -> Expanded:
        """The sample of record `place` as it is seen at `seat` of an epoch.

        Raises SampleError for one that cannot be trained, or fits into no bucket.
        """
        s = self._settings
        example = self._example(place)
        if s.turns_per_sample:
            rng = lasting_random(s.seed, epoch, seat, TURNS)
            example = choose_turns(example, s.turns_per_sample, rng)
        sample = expand(example, self._image_tokens, s.max_length, idle=s.compat)
        tokens, images, targets = row_needs([sample])
        bucket(tokens, s.length_buckets, "length", sample.id)
        bucket(images, s.image_buckets, "image", sample.id)
        bucket(targets, s.target_buckets, "target", sample.id)
        return sample

    def _example(self, place: int) -> Example:
        found = self._cache.get(place)
        if found is None:
            try:
                found = self._make(self._data.records[place], self._data.ids[place])
            except SampleError as e:
                found = e
            size = 300 if isinstance(found, SampleError) else 12 * len(found.input_ids) + 600
            self._cache.put(place, found, size)
        if isinstance(found, SampleError):
            raise SampleError(found.message, fix=found.fix)
        return found


def example_maker(settings: DataSettings, model_config: LlavaConfig, tokenizer: Any) -> MakeExample:
    """How a run's settings make an Example of a record."""
    s = settings
    # Turns are drawn, and conversations cut, after images took their places; a sample of all its
    # independent turns gets the length here, so that it leaves out turns instead of halving one.
    ahead = s.compat or (s.turns == "independent" and not s.turns_per_sample)
    maker = ExampleMaker(
        tokenizer,
        version=s.version,
        max_length=s.max_length if ahead else None,
        image_tokens=model_config.image_tokens,
        turns=s.turns,
        compat=s.compat,
        use_im_start_end=model_config.use_im_start_end,
    )

    def make(record: Any, name: str) -> Example:
        example = replace(maker(record), id=name)
        return without_id(example, tokenizer.pad_id) if s.compat else example

    return make
