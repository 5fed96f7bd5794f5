"""Records that somebody made: LLaVA's form, Hugging Face's messages, ShareGPT, JSON or parquet."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_jax.datasets.shapes import read_rows, saver, to_ours
from llava_jax.datasets.source import Record, Source, check_names, placed
from llava_jax.errors import ConfigError, SampleError


@dataclass(kw_only=True)
class Records(Source):
    """paths: files below the folder. pictures: where those that are inside of records are kept, a
    folder below the image folder of the training run (relative paths begin at `folder`)."""

    name = "records"

    image: str = "{}"
    paths: tuple[str, ...] = ()
    pictures: str = ""

    def __post_init__(self):
        if not self.paths:
            raise ConfigError("records: paths is empty", fix='paths = ["mine.jsonl"]')
        check_names(self.paths, "records: paths")
        if self.pictures and (
            self.pictures in (".", "..") or Path(self.pictures).name != self.pictures
        ):
            raise ConfigError(f"records: pictures is {self.pictures!r}, not the name of a folder")

    def inputs(self) -> list[Path]:
        found = [self.folder / path for path in self.paths]
        for path in found:
            if not path.is_file():
                raise SampleError(f"records: no such file {path}")
        return found

    def records(self) -> Iterator[Record]:
        save = saver(self.folder / self.pictures) if self.pictures else None
        index = 0
        for path in self.inputs():
            for n, row in enumerate(read_rows(path, self.told)):
                try:
                    record = to_ours(row, index, save)
                    if "image" in record:
                        record["image"] = placed(self.image, record["image"])
                except SampleError as e:
                    raise SampleError(f"{path}[{n}]: {e.message}", fix=e.fix) from None
                index += 1
                yield record


SOURCE = Records
