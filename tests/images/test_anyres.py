"""Tiles and grids equal to the original's."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from llava_jax.errors import ConfigError
from llava_jax.images.anyres import best_resolution, to_tiles
from llava_jax.images.pixels import normalize
from tests.conftest import shared
from tests.images.test_pixels import opened

GRID = [(8, 16), (16, 8), (16, 16), (24, 8), (8, 24)]


def test_the_grid_follows_the_shape_of_the_picture():
    sizes = [(100, 100), (300, 100), (100, 300), (200, 100), (4, 4)]
    expected = [(16, 16), (24, 8), (8, 24), (16, 8), (8, 16)]
    assert [best_resolution(size, GRID) for size in sizes] == expected


def test_tiles_go_row_by_row_behind_the_whole_picture():
    image = Image.new("RGB", (16, 16), (10, 0, 0))
    image.paste((200, 0, 0), (8, 0, 16, 8))
    tiles = to_tiles(image, 8, GRID)
    assert tiles.shape == (5, 8, 8, 3)
    assert tiles[:, 4, 4, 0].tolist()[1:] == [10, 200, 10, 10]


def test_the_rest_is_black_and_tiles_must_fit():
    tiles = to_tiles(Image.new("RGB", (60, 10), "white"), 8, GRID)
    assert tiles.shape == (4, 8, 8, 3)
    assert tiles[1, :, 4, 0].tolist() == [0, 0, 255, 255, 255, 255, 0, 0]
    with pytest.raises(ConfigError, match="not a multiple of the tile size 7"):
        to_tiles(Image.new("RGB", (9, 9)), 7, GRID)


def test_golden_grids_and_tiles():
    folder = shared("golden/images")
    reference = json.loads((folder / "images.json").read_text())
    grid = [(w, h) for w, h in reference["grid_pinpoints"]]
    for row in reference["best_resolution"]:
        assert list(best_resolution(tuple(row["size_wh"]), grid)) == row["best_wh"]
    for row in reference["images"]:
        for key, want in row["results"].items():
            processor, ratio = key.split("|")
            if ratio != "anyres" or "quirk" in want or "error" in want:
                continue
            rule = reference["processors"][processor]
            image = opened(folder / "src" / row["file"])
            tiles = to_tiles(image, rule["crop_size"]["height"], grid)
            values = normalize(tiles, rule["image_mean"], rule["image_std"]).transpose(0, 3, 1, 2)
            digest = hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
            assert digest == want["sha256_f32"], (row["file"], key)
