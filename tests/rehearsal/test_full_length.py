"""The real lengths: 576 tokens a picture, 32,000 words, records past 2,048 positions.

The model is narrow; tokens, pictures, positions and vocabulary are those of LLaVA-1.5.
"""

import json
import math
from pathlib import Path

import pytest

from tests.rehearsal.command import losses, metrics, ok, report, train_words
from tests.rehearsal.models import FULL_LENGTH

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def long_data(mix, tmp_path_factory) -> tuple[Path, int]:
    """(a part of the mixture, how many of its records are longer than 2,048 positions)."""
    part = mix.manifest["instruct"]
    records = json.loads((mix.folder / part["file"]).read_text())
    bad = {row["index"] for row in part["bad"]}
    several = [r for r in records if isinstance(r, dict) and isinstance(r.get("image"), list)]
    pictures = [i for i in part["sources"]["vg"] if i not in bad][:4]
    # Four pictures are 2,304 positions: the fourth does not fit, and no picture is cut in part.
    four = {**several[0], "id": "four", "image": [*several[0]["image"], several[0]["image"][0]]}
    four["conversations"] = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "<image>\n<image>\n<image>\nAnd these?"},
        {"from": "gpt", "value": "Cats."},
    ]
    chosen = [records[i] for i in (*part["long"], *pictures)] + several[:1] + [four]
    path = tmp_path_factory.mktemp("long") / "long.json"
    path.write_text(json.dumps(chosen))
    return path, len(part["long"]) + 1


def test_a_whole_epoch_at_the_real_lengths(mix, model, long_data, tmp_path):
    path, longer = long_data
    records = len(json.loads(path.read_text()))
    settings = mix.settings("instruct") | {
        "model.init": model("hugging_face", size=FULL_LENGTH),
        "data.path": path,
        "batch_size": 4,
    }
    ok(*train_words("finetune_7b", tmp_path / "run", settings))
    rows, told = metrics(tmp_path / "run"), report(tmp_path / "run")
    assert len(rows) == math.ceil(records / 4)
    assert all(map(math.isfinite, losses(tmp_path / "run")))
    assert (told["samples"], told["bad"], told["cut"]) == (records, [], longer)
    # No row is longer than 2,048 positions; those of the long ones are full.
    assert max(row["tokens"] for row in rows) <= 4 * 2048
    assert sum(row["tokens"] for row in rows) > longer * 1728

    folder = tmp_path / "hf"
    ok("convert", tmp_path / "run" / "export", folder, "--to", "hf", "--check")
    config = json.loads((folder / "config.json").read_text())
    assert config["image_seq_length"] == 576
    picture = mix.folder / "images" / "00000" / "000000000.jpg"
    words = ("--image", picture, "--prompt", "What is this?", "--max-new-tokens", "8")
    ours, theirs = (
        ok("chat", "--model", m, *words).out for m in (tmp_path / "run" / "export", folder)
    )
    assert ours == theirs
