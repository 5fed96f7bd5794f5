"""verify: what it finds in a folder; of damages, test_checkpoint.py."""

from llava_jax.train.verify import written


def test_what_links_lead_to_is_found_once(tmp_path):
    disk, run = tmp_path / "disk", tmp_path / "run"
    (disk / "2").mkdir(parents=True)
    (disk / "2" / "SHA256SUMS").touch()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    (run / "again").symlink_to(disk)
    (run / "loop").symlink_to(run)
    assert [f.resolve() for f in written(run)] == [disk / "2"]
