"""Visual Genome: ten regions of each picture, drawn; a picture with fewer gives all of them.

The paper samples ten for pictures with more (arXiv 2310.03744, appendix). Its 86,417 pictures are
fewer than the owner's 108,077, and which ones is not published (LLaVA issue 804): here it is all of them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.boxes import from_corner
from llava_jax.datasets.source import File, Record, Source, about_image
from llava_jax.datasets.sources.regions import region_pair
from llava_jax.errors import ConfigError

URL = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"


@dataclass(kw_only=True)
class VisualGenome(Source):
    """regions: how many of a picture."""

    name = "visual_genome"
    published = 86_417
    files: ClassVar = {
        "images": File("image_data.json", URL),
        "regions": File("region_descriptions.json", URL),
    }

    image: str = "vg/{folder}/{id}.jpg"
    regions: int = 10

    def __post_init__(self):
        if self.regions < 1:
            raise ConfigError(f"visual_genome: regions is {self.regions}, not a number from 1")

    def records(self) -> Iterator[Record]:
        known = {}
        for row in self.rows(self.path("images")):
            folder = row["url"].split("/")[-2]  # .../VG_100K_2/1.jpg
            known[row["image_id"]] = folder, row["width"], row["height"]
        for row in self.rows(self.path("regions")):
            image_id = row["id"] if "id" in row else row["regions"][0]["image_id"]
            folder, width, height = known[image_id]
            rng = random.Random(f"{self.seed} visual_genome {image_id}")
            regions = row["regions"]
            pairs = []
            for r in rng.sample(regions, len(regions)):
                box = from_corner([r[k] for k in ("x", "y", "width", "height")])
                if pair := region_pair(r["phrase"], box, width, height, rng):
                    pairs.append(pair)
                if len(pairs) == self.regions:
                    break
            if not pairs:
                self.skipped["no region"] += 1
                continue
            path = self.image_path(folder=folder, id=image_id)
            yield about_image(f"VG_{image_id}", path, pairs)


SOURCE = VisualGenome
