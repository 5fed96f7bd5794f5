"""What a work directory says of its run, and which settings may change when that is resumed."""

import errno
import json
from pathlib import Path

import pytest

from llava_jax.digests import SUMS
from llava_jax.errors import ConfigError
from llava_jax.train.config import load_config
from llava_jax.train.resume import (
    DONE,
    SETTINGS,
    begin,
    check_begun_from,
    check_same,
    goes_on,
    read_record,
    shared_settings,
)
from llava_jax.util import write_text


def config(*changes):
    return load_config("finetune_7b", [f"--config.{change}" for change in changes])


def test_processes_share_all_settings_but_places_on_their_host():
    ours = shared_settings(config("data.path=a.json", "model.init=a", "data.threads=3"))
    theirs = shared_settings(config("data.path=b.json", "model.init=b", "data.image_folder=c"))
    assert ours == theirs
    for change in ("lr=1.0", "steps=3", "data.pack=True", "exact_match=True"):
        assert shared_settings(config(change)) != ours


def test_without_a_run_nothing_is_wrong(tmp_path):
    assert check_same(config(), tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        ["mesh.fsdp=4", "mesh.data=2"],
        ["save_every=7", "save_minutes=1.5", "keep_checkpoints=9", "exact_match=True"],
        ["data.threads=0", "data.path=moved.json", "data.image_folder=moved", "data.bad_limit=0.5"],
        ["remat=none", "unroll_layers=True", "grad_accum=4"],
    ],
)
def test_what_only_says_where_and_when_may_change(tmp_path, changes):
    begin(config(), tmp_path)
    assert json.loads((tmp_path / SETTINGS).read_text())["lr"] == 2e-5
    assert check_same(config(*changes), tmp_path) == sorted(c.partition("=")[0] for c in changes)


@pytest.mark.parametrize(
    "change",
    [
        "lr=1.0",
        "dtype=float32",
        "steps=7",
        "epochs=2.0",
        "batch_size=64",
        "data.pack=True",
        "seed=1",
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_would_make_it_another_run_is_an_error(tmp_path, change, finished):
    begin(config(), tmp_path)
    if finished:
        (tmp_path / DONE).write_text("{}")
    name = change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} was .* and is") as info:
        check_same(config(change), tmp_path)
    assert "another --workdir" in str(info.value)
    assert (str(tmp_path / "export") in str(info.value)) == finished


def test_accumulation_is_part_of_the_run_where_micro_batches_are_weighed_alike(tmp_path):
    begin(config("loss_average=micro"), tmp_path)
    with pytest.raises(ConfigError, match="grad_accum"):
        check_same(config("loss_average=micro", "grad_accum=2"), tmp_path)


def test_more_steps_are_the_same_run_at_a_constant_rate_only(tmp_path):
    constant = ["warmup_ratio=0.0", "lr_end_ratio=1.0"]
    begin(config(*constant, "steps=5"), tmp_path)
    assert check_same(config(*constant, "steps=9"), tmp_path) == ["steps"]
    with pytest.raises(ConfigError, match="steps was 5 and is 3; it cannot be made shorter"):
        check_same(config(*constant, "steps=3"), tmp_path)
    begin(config("steps=5"), tmp_path)
    with pytest.raises(ConfigError, match="steps was 5 and is 9; its rate follows the number"):
        check_same(config("steps=9"), tmp_path)


def test_a_run_that_stopped_early_goes_on_where_it_no_longer_would():
    done = {"early": {"of": 20, "waited": 2}}
    assert not goes_on(done, config("early_stop=2"), [])
    assert goes_on(done, config("early_stop=3"), ["early_stop"])
    assert goes_on(done, config(), ["early_stop"])
    assert not goes_on({}, config(), ["early_stop"])
    assert goes_on({}, config(), ["steps"])


def test_a_work_directory_may_be_moved_with_its_stages(tmp_path):
    (tmp_path / "new" / "two").mkdir(parents=True)
    begin(config("model.init=old/one/export"), tmp_path / "new" / "two")
    moved = config(f"model.init={tmp_path}/new/one/export")
    assert check_same(moved, tmp_path / "new" / "two") == ["model.init"]
    with pytest.raises(ConfigError, match=r"model\.init"):
        check_same(config("model.init=elsewhere/one/export"), tmp_path / "new" / "two")


def test_other_weights_where_the_run_began_are_another_run(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    run.mkdir()
    ours = config(f"model.init={model}")
    begin(ours, run)
    (model / SUMS).write_text(f"{'0' * 64}  model.safetensors\n")
    check_begun_from(ours, run)  # it began before this was recorded
    begin(ours, run)
    (model / SUMS).write_text(f"{'1' * 64}  README.md\n{'0' * 64}  model.safetensors\n")
    check_begun_from(ours, run)
    (model / SUMS).write_text(f"{'1' * 64}  model.safetensors\n")
    with pytest.raises(ConfigError, match="began with other weights than .*move .*run away"):
        check_begun_from(ours, run)
    (model / SUMS).unlink()
    check_begun_from(ours, run)


def test_a_setting_that_another_version_of_this_package_has_is_passed_over(tmp_path):
    begin(config(), tmp_path)
    kept = json.loads((tmp_path / SETTINGS).read_text())
    del kept["save_minutes"]
    (tmp_path / SETTINGS).write_text(json.dumps({**kept, "of_old": 1}))
    assert check_same(config(), tmp_path) == []


def test_what_was_there_stays_until_the_new_text_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_text(path, '{"steps": 1}')

    def full_disk(self, data):
        with open(self, "wb") as file:
            file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, '{"steps": 2}')
    assert read_record(path) == {"steps": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["done.json"]
    write_text(path, '{"steps": 2, "said": "\u00e9"}')
    assert read_record(path) == {"steps": 2, "said": "\u00e9"}


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', b"[]", b"3", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "done.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"done\.json is damaged.*remove this file"):
        read_record(path)


def test_a_setting_that_an_older_run_did_not_have_was_at_its_default(tmp_path):
    begin(config(), tmp_path)
    path = tmp_path / SETTINGS
    older = json.loads(path.read_text())
    for name in ("z_loss", "param_groups"):
        del older[name]
    path.write_text(json.dumps(older))
    assert check_same(config(), tmp_path) == []
    with pytest.raises(ConfigError, match=r"z_loss was 0\.0 and is 5\.0"):
        check_same(config("z_loss=5.0"), tmp_path)
    with pytest.raises(ConfigError, match="param_groups was"):
        check_same(config("param_groups=projector lr=0"), tmp_path)
