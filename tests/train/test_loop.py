"""Whole runs on a tiny model: what they leave behind, killing, stopping, resuming, refusing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from llava_jax.convert import load_checkpoint
from llava_jax.digests import SUMS
from llava_jax.errors import ConfigError, Diverged, LlavaError, NotSaved
from llava_jax.train import loop, program
from llava_jax.train.config import load_config
from llava_jax.train.log import METRICS, read_metrics
from llava_jax.train.stages import run_stages
from tests.train.run import make_data, make_model, overrides


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    data = make_data(folder / "data")
    return make_model(folder, data), data


def config_of(made, **changes):
    return load_config("common", overrides(*made, **changes))


def curve(workdir):
    """What must be bit-identical between two runs: everything but the clock."""
    return [
        {k: v for k, v in row.items() if not k.endswith("seconds")}
        for row in read_metrics(workdir / METRICS)
    ]


EVENTS: list[str] = []
"""What the loop of `uninterrupted` did: "put" a batch, or the method in which it read from a device."""


def watched(value: property) -> property:
    def read(array):
        if threading.current_thread() is threading.main_thread():
            names = [frame.f_code.co_name for frame, _ in traceback.walk_stack(None)]
            EVENTS.append(names[names.index("train") - 1] if "train" in names else "")
        return value.fget(array)

    return property(read)


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        put = loop.put_batch
        patch.setattr(loop, "put_batch", lambda *a: (EVENTS.append("put"), put(*a))[1])
        patch.setattr(ArrayImpl, "_value", watched(ArrayImpl._value))
        config = config_of(made, **{"mesh.fsdp": 1, "mesh.data": 8})
        export = run_stages(config, workdir, quiet=True)
    return workdir, export


def test_the_loop_waits_for_the_devices_only_to_log_and_to_save(uninterrupted):
    """A step is logged when the next one has begun; its batch was placed before: no device waits for us."""
    during = EVENTS[EVENTS.index("put") :]
    assert set(during) - {"together", ""} == {"put", "after", "drain"}
    logged = [i for i, event in enumerate(during) if event in ("after", "drain")][::6]  # 6 values
    assert len(logged) == 12
    for step, i in enumerate(logged, 1):
        saved = step % 4 == 0  # where the loop has to wait for the step
        assert during[i] == ("drain" if saved else "after")
        assert during[:i].count("put") == step + (not saved)


def test_a_run_leaves_log_curve_board_model_and_report(uninterrupted, made):
    workdir, export = uninterrupted
    rows = curve(workdir)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(r["tokens"] > 0 and r["ok"] for r in rows)
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "data_report.json").read_text())["bad_count"] == 0
    before, after = load_checkpoint(made[0]), load_checkpoint(export)
    assert after.config == before.config
    for name, value in after.params.items():
        moved = not np.array_equal(value, before.params[name])
        assert moved == name.startswith(("projector.", "language.")), name


def test_a_finished_run_is_not_run_again(uninterrupted, made):
    workdir, export = uninterrupted
    stamp = (export / "llava_jax.json").stat().st_mtime_ns
    # What a folder that became read-only in the middle of a removal kept.
    half = workdir / "checkpoints" / ".2.tmp" / "state"
    half.mkdir(parents=True)
    config = config_of(made, **{"mesh.fsdp": 1, "mesh.data": 8})
    assert run_stages(config, workdir, quiet=True) == export
    assert (export / "llava_jax.json").stat().st_mtime_ns == stamp
    assert not half.parent.exists()


def test_an_export_that_is_gone_is_made_again(uninterrupted, made, tmp_path):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    shutil.rmtree(workdir / "export")
    config = config_of(made, **{"mesh.fsdp": 1, "mesh.data": 8})
    export = run_stages(config, workdir, quiet=True)
    again, before = load_checkpoint(export), load_checkpoint(uninterrupted[1])
    assert all(np.array_equal(again.params[n], v) for n, v in before.params.items())
    assert (workdir / "done.json").read_text() == (uninterrupted[0] / "done.json").read_text()
    assert curve(workdir) == curve(uninterrupted[0])
    for name in ("export", "checkpoints"):
        shutil.rmtree(workdir / name)
    with pytest.raises(ConfigError, match="finished run, but its export and checkpoints are gone"):
        run_stages(config, workdir, quiet=True)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 1.0}, "finished with other settings: lr was 0.003 and is 1.0"),
        ({"steps": 20}, "steps was 12 and is 20"),
        ({"data.max_length": 300, "seed": 1}, "data.max_length was .* seed was"),
    ],
)
def test_a_finished_run_refuses_other_settings(uninterrupted, made, changes, says):
    workdir = uninterrupted[0]
    config = config_of(made, **{"mesh.fsdp": 1, "mesh.data": 8, **changes})
    with pytest.raises(ConfigError, match=says) as info:
        run_stages(config, workdir, quiet=True)
    assert "another --workdir" in str(info.value)
    assert json.loads((workdir / "config.json").read_text())["lr"] == 3e-3


def test_a_finished_run_may_be_asked_again_from_elsewhere(uninterrupted, made):
    config = config_of(made, **{"mesh.fsdp": 8, "save_every": 7, "data.threads": 0})
    assert run_stages(config, uninterrupted[0], quiet=True) == uninterrupted[1]


@pytest.mark.slow  # quick: tests/train/test_resume.py::test_more_steps_are_the_same_run_at_a_constant_rate_only
def test_more_steps_at_a_constant_rate_are_the_longer_run(made, tmp_path):
    changes = {"warmup_ratio": 0.0, "lr_end_ratio": 1.0, "save_every": 1000}
    run_stages(config_of(made, **changes, steps=6), tmp_path / "longer", quiet=True)
    run_stages(config_of(made, **changes, steps=4), tmp_path / "twice", quiet=True)
    run_stages(config_of(made, **changes, steps=6), tmp_path / "twice", quiet=True)
    assert curve(tmp_path / "twice") == curve(tmp_path / "longer")
    done = json.loads((tmp_path / "twice" / "done.json").read_text())
    assert done == json.loads((tmp_path / "longer" / "done.json").read_text())


def test_a_setting_of_a_later_stage_is_refused_before_the_first_begins(made, tmp_path):
    config = config_of(made, steps=2)
    with config.unlocked():
        config.stages.one = {"trainable": ("projector",)}
        config.stages.two = {"loss_average": "sum"}
    with pytest.raises(ConfigError, match="loss_average 'sum'"):
        run_stages(config, tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_still_draws_its_curve(made, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llava_jax.train.program.make_step",
        lambda *_, **__: _never_finite,  # every step is bad
    )
    with pytest.raises(Diverged, match="2 steps in a row were skipped"):
        run_stages(config_of(made, save_every=1000, max_skipped=2), tmp_path, quiet=True)
    assert (tmp_path / "loss.png").exists()
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [len(curve(tmp_path))] == [3]  # the third had begun when the second was read
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    found = [(r["step"], r["why"], len(r["ids"])) for r in rows]
    assert found == [(1, "not finite", 8), (2, "not finite", 8), (3, "not finite", 4)]
    with pytest.raises(Diverged, match=r"model\.init=.*last_good, .*max_skipped above 3"):
        run_stages(config_of(made, save_every=1000, max_skipped=2), tmp_path, quiet=True)
    assert len(curve(tmp_path)) == 3  # not a step further
    load_checkpoint(tmp_path / "last_good")


def _never_finite(state, frozen, batch):
    nan = jnp.float32(jnp.nan)
    norms = (nan[None], nan[None])
    return state, {
        **{"loss": nan, "micro_loss": nan[None], "grad_norm": nan, "norms": norms},
        "ok": jnp.bool(False),
    }


def start(made, workdir, **changes):
    command = [sys.executable, "-m", "llava_jax", "train", "--config", "common", "--quiet"]
    command += ["--workdir", str(workdir), *overrides(*made, **changes)]
    return subprocess.Popen(
        command, env=os.environ.copy(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_steps(process, workdir, steps, seconds=240):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if len(read_metrics(workdir / METRICS)) >= steps:
            return
        time.sleep(0.01)
    pytest.fail(f"no {steps} steps: {process.communicate()[0]}")


def test_killed_at_a_random_step_it_goes_on_bit_identically(uninterrupted, made, tmp_path):
    changes = {"mesh.fsdp": 1, "mesh.data": 8}
    process = start(made, tmp_path, **changes)
    wait_for_steps(process, tmp_path, int(np.random.default_rng().integers(5, 11)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "export").exists()
    run_stages(config_of(made, **changes), tmp_path, quiet=True)
    assert curve(tmp_path) == curve(uninterrupted[0])
    ours, theirs = (load_checkpoint(w / "export").params for w in (tmp_path, uninterrupted[0]))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_asked_to_stop_it_saves_first(uninterrupted, made, tmp_path):
    changes = {"mesh.fsdp": 1, "mesh.data": 8, "save_every": 1000}
    process = start(made, tmp_path, **changes)
    wait_for_steps(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "state saved" in out, out
    assert process.returncode == 75, out
    stopped_at = len(curve(tmp_path))
    assert stopped_at < 12
    run_stages(config_of(made, **changes), tmp_path, quiet=True)
    assert curve(tmp_path) == curve(uninterrupted[0])


def test_resumed_on_another_mesh_it_gives_the_same_losses(uninterrupted, made, tmp_path):
    run_stages(config_of(made, **{"mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path, quiet=True)
    ours, theirs = ([r["loss"] for r in curve(w)] for w in (tmp_path, uninterrupted[0]))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_two_stages_follow_each_other(made, tmp_path):
    config = config_of(made, steps=2)
    with config.unlocked():
        config.stages.one = {"trainable": ("projector",), "lr": 1e-3}
        config.stages.two = {"trainable": ("projector", "language"), "steps": 3}
    export = run_stages(config, tmp_path, quiet=True)
    assert export == tmp_path / "two" / "export"
    assert len(curve(tmp_path / "one")) == 2
    assert len(curve(tmp_path / "two")) == 3
    one = load_checkpoint(tmp_path / "one" / "export").params
    start_params = load_checkpoint(made[0]).params
    assert np.array_equal(one["language.head.kernel"], start_params["language.head.kernel"])
    (tmp_path / "one" / "export" / SUMS).write_text(f"{'0' * 64}  model.safetensors\n")
    with pytest.raises(ConfigError, match="two holds a run that began with other weights"):
        run_stages(config, tmp_path, quiet=True)


def test_lora_run_writes_adapters(made, tmp_path):
    changes = {"lora_rank": 4, "lora_alpha": 8.0, "trainable": "('projector','lora')", "steps": 2}
    export = run_stages(config_of(made, **changes), tmp_path, quiet=True)
    checkpoint = load_checkpoint(export)
    assert checkpoint.config.lora is not None
    assert np.abs(checkpoint.params["language.layers.attn.q.lora_b"]).max() > 0


def test_qlora_leaves_the_base_to_the_bit_and_exports_the_moving_average(made, tmp_path, caplog):
    changes = {"lora_rank": 4, "lora_alpha": 8.0, "trainable": "('projector','lora')", "steps": 20}
    changes |= {"quantize": "int8", "ema_decay": 0.5, "z_loss": 1e-4, "save_every": 20}
    export = run_stages(config_of(made, **changes), tmp_path, quiet=True)
    after, before = load_checkpoint(export), load_checkpoint(made[0]).params
    assert after.config.quantize == ""
    for name, value in before.items():
        assert name.startswith("projector") or np.array_equal(after.params[name], value), name
    import orbax.checkpoint as ocp

    name = "language.layers.attn.q.lora_b"
    raw = ocp.PyTreeCheckpointHandler().restore(tmp_path / "checkpoints" / "20" / "state")
    averages = [v for v in raw["opt_state"].values() if v.shape == raw["params"][name].shape]
    assert any(np.array_equal(after.params[name], v) for v in averages)
    assert not np.array_equal(after.params[name], raw["params"][name])
    load_checkpoint(export, merge=True)
    assert "was trained over a base in int8" in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"trainable": "('language','lora')", "lora_rank": 4, "quantize": "nf4"},
            "quantize is 'nf4'",
        ),
        ({"trainable": "('projektor',)"}, "projektor"),
        ({"trainable": "('lora',)"}, "set lora_rank"),
        ({"mesh.fsdp": 3}, "does not fit"),
        ({"batch_size": 12}, "12 rows .* multiple of 8"),
        ({"optimizer": "sgd"}, "sgd"),
        ({"model.init": "/nowhere"}, "nowhere"),
        ({"data.path": "/no.json"}, "no.json"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(made, tmp_path, changes, says):
    with pytest.raises((LlavaError, FileNotFoundError), match=says) as info:
        run_stages(config_of(made, **changes), tmp_path, quiet=True)
    assert "\n" not in str(info.value)


def test_a_broken_picture_s_step_is_skipped_and_resuming_changes_nothing(
    made, tmp_path, monkeypatch
):
    """A loss that is not finite at step 3: the update is skipped, its samples are listed, once."""
    put, make_loss = loop.put_batch, program.make_loss
    given = []

    def broken(batch, *rest):
        given.append(0)
        if first + len(given) == 3:
            batch = {**batch, "images": np.full_like(batch["images"], 255)}
        return put(batch, *rest)

    def poisoned(*args):
        loss = make_loss(*args)

        def run(trained, frozen, batch, key=None):
            white = (batch["images"] == 255).all()
            return loss(trained, frozen, batch, key) * jnp.where(white, jnp.nan, 1.0)

        return run

    monkeypatch.setattr(loop, "put_batch", broken)
    monkeypatch.setattr(program, "make_loss", poisoned)
    config = {
        "mesh.fsdp": 1,
        "mesh.data": 8,
        "save_every": 2,
        "warmup_ratio": 0.0,
        "lr_end_ratio": 1.0,
    }
    first = 0
    run_stages(config_of(made, **config, steps=4), tmp_path / "whole", quiet=True)
    given.clear()
    run_stages(config_of(made, **config, steps=3), tmp_path / "twice", quiet=True)
    shutil.rmtree(tmp_path / "twice" / "checkpoints" / "3")  # as if killed before it was saved
    first, _ = 2, given.clear()
    run_stages(config_of(made, **config, steps=4), tmp_path / "twice", quiet=True)
    assert [row["ok"] for row in curve(tmp_path / "whole")] == [True, True, False, True]
    for name in ("skipped.jsonl", "done.json"):
        ours, theirs = ((tmp_path / w / name).read_text() for w in ("twice", "whole"))
        assert ours == theirs
    assert json.loads((tmp_path / "whole" / "done.json").read_text())["skipped"] == 1
    assert str(curve(tmp_path / "twice")) == str(curve(tmp_path / "whole"))  # NaN is not NaN


def test_the_newest_checkpoint_is_damaged_and_the_run_is_the_same(
    uninterrupted, made, tmp_path, caplog
):
    workdir = shutil.copytree(uninterrupted[0], tmp_path / "copy")
    (workdir / "done.json").unlink()
    shutil.rmtree(workdir / "export")
    path = max((workdir / "checkpoints" / "12").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    export = run_stages(config_of(made, **{"mesh.fsdp": 1, "mesh.data": 8}), workdir, quiet=True)
    assert "checkpoint 12 is not used" in caplog.text
    assert curve(workdir) == curve(uninterrupted[0])
    again, before = load_checkpoint(export), load_checkpoint(uninterrupted[1])
    assert all(np.array_equal(again.params[n], v) for n, v in before.params.items())


def test_a_disk_that_fills_up_pauses_saving_and_not_training(
    uninterrupted, made, tmp_path, monkeypatch, caplog
):
    """Saves of steps 4 and 8 fail, that of step 12 succeeds; then none does, and the run says so."""
    from llava_jax.train import checkpoint

    real, left = checkpoint.write_sums, [2]

    def full(folder):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(28, "No space left on device", str(folder))
        real(folder)

    monkeypatch.setattr(checkpoint, "write_sums", full)
    config = {"mesh.fsdp": 1, "mesh.data": 8}
    run_stages(config_of(made, **config), tmp_path / "a", quiet=True)
    assert caplog.text.count("is not saved: no space left on device") == 2
    assert curve(tmp_path / "a") == curve(uninterrupted[0])
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == ["12"]
    left[0] = 99
    caplog.clear()
    with pytest.raises(NotSaved, match="the state after step 12 is not saved"):
        run_stages(config_of(made, **config), tmp_path / "b", quiet=True)
    ends = [line.rpartition(")")[2] for line in caplog.messages if "is not saved: no" in line]
    assert ends == ["; training goes on", "; training goes on", "", ""]
    assert (tmp_path / "b" / "export").exists()  # the model had room
