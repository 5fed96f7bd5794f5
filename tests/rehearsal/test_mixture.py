"""The mixture's maker: right proportions, every kind of fault, equal files for equal arguments."""

import json
import subprocess
import sys

import pytest

from tests.rehearsal import mixture, odd, sources
from tests.rehearsal.command import ROOT


@pytest.mark.parametrize("total", [200, 240, 5000, 665_298])
def test_shares_add_up(total):
    counts = sources.shares(total)
    assert sum(counts.values()) == total
    for source in sources.SOURCES:
        exact = total * source.count / 665_298
        assert abs(counts[source.name] - exact) < 1 or counts[source.name] == 1


def test_the_full_file_has_the_published_counts():
    assert sources.shares(665_298) == {s.name: s.count for s in sources.SOURCES}


def test_every_kind_is_in_it(mix):
    part = mix.manifest["instruct"]
    kinds = {row["kind"] for row in part["bad"]}
    assert kinds == {b.kind for b in odd.BAD} | {f"picture {k}" for k in odd.BAD_PICTURES}
    assert len(part["long"]) >= 2
    assert 10 <= len(part["text_only"]) <= 20
    records = [r for r in json.loads((mix.folder / part["file"]).read_text()) if r != "a string"]
    assert len(records) + 1 == part["records"] == 240
    assert any(isinstance(r, dict) and isinstance(r.get("image"), list) for r in records)
    folders = {str(r["image"]).rpartition("/")[0] for r in records if "image" in r}
    assert folders > {
        *("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images"),
        *("vg/VG_100K", "vg/VG_100K_2"),
    }
    texts = [t.get("value", "") for r in records for t in r.get("conversations", [])]
    for prompt in (
        *(sources.SHORT, sources.LETTER, sources.CAPTION, sources.REGION, sources.BOX),
        "Reference OCR token:",
    ):
        assert any(prompt in text for text in texts), prompt


def test_too_few_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least"):
        mixture.make(tmp_path, records=20)


def test_the_script_makes_equal_files_for_equal_arguments(mix, tmp_path):
    words = [sys.executable, "-m", "tests.rehearsal.mixture", str(tmp_path), "--records", "240"]
    done = subprocess.run([*words, "--seed", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in sorted(mix.folder.rglob("*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(mix.folder)).read_bytes() == path.read_bytes()
