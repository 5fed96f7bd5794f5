"""The shards of `llava_jax.store.write`, made by Apache Beam: on this machine, Dataflow, Flink or Spark.

apache-beam caps versions that the core needs newer, so it has an environment of its own (extra `beam`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_jax.store.folder import Job
from llava_jax.store.write import Run, finished, write_shard
from llava_jax.util import need


def beam_run(options: list[str]) -> Run:
    """What `pack` takes as `run`: a pipeline with one element for each shard.

    options: of the pipeline, such as --runner=DataflowRunner. Every machine must see the JSON, the
    images and the output under the same paths.
    """
    beam = need("apache_beam", "for --beam", "llava_jax[beam]")

    def run(job: Job, numbers: list[int]) -> Iterable[dict[str, Any]]:
        with beam.Pipeline(argv=options) as pipeline:
            shards = pipeline | beam.Create(numbers) | beam.Reshuffle()
            _ = shards | beam.Map(lambda number: write_shard(job, number)["shard"])
        for number in numbers:
            row = finished(job, number)
            yield row or write_shard(job, number)  # none: its machine sees another folder

    return run
