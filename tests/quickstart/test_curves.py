"""The loss picture."""

import json

import numpy as np
from PIL import Image

from llava_jax.quickstart.cards import moving_average
from llava_jax.quickstart.curves import TITLES, draw_curves, read_curves


def test_moving_average():
    assert np.allclose(moving_average(np.array([4.0, 2.0, 6.0, 1.0]), 3), [3, 4, 3, 3.5])


def test_a_panel_for_every_part(tmp_path):
    for name in TITLES:
        (tmp_path / name).mkdir()
        rows = ({"step": i, "loss": 1 / i} for i in range(1, 30))
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with Image.open(draw_curves(tmp_path)) as picture:
        assert picture.width > 1000
    assert [len(curve.losses) for curve in read_curves(tmp_path)] == [29] * len(TITLES)
