"""The samples of examples/launch: well formed, and one training line that differs only around it."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from llava_jax import cli
from llava_jax.train.config import load_config

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "launch"
SAMPLES = sorted(p.name for p in FOLDER.iterdir())
RAY = ["--launcher", "ray", "--max-failures", "10"]


def training_line(name: str) -> list[str]:
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^\s*llava-jax train[^|'\n]*|(?<= )llava-jax train[^|'\n]*", text, re.M)
    return line.split()


def test_all_engines_have_a_sample():
    assert SAMPLES == ["jobset.yaml", "ray.sh", "skypilot.yaml", "slurm.sh", "xpk.sh"]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_line_is_the_same_and_its_settings_exist(name):
    line = training_line(name)
    assert line == training_line("slurm.sh") + RAY * (name == "ray.sh")
    args = cli.parse("train", line[2:])
    config = load_config(args.config, args.overrides)
    assert config.model.init.endswith("pretrain_7b/export")


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (65, 0, False), (75, 0, True), (137, 9, True), (137, 10, False)],
)
def test_slurm_queues_again_what_a_restart_may_mend(tmp_path, code, restarts, again):
    for name, line in (("srun", f"exit {code}"), ("scontrol", f"touch {tmp_path}/queued")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    env |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    ended = subprocess.run(["bash", str(FOLDER / "slurm.sh")], env=env, check=False).returncode
    assert (tmp_path / "queued").exists() == again
    assert ended == (0 if again else code)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_is_well_formed(name):
    path = FOLDER / name
    if path.suffix == ".sh":
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        return
    content = yaml.safe_load(path.read_text())
    if name == "jobset.yaml":
        assert (content["apiVersion"], content["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        (job,) = content["spec"]["replicatedJobs"]
        hosts, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
        chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
        rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        assert hosts["parallelism"] == hosts["completions"] == int(rows) * int(columns) // chips
    else:
        assert content["num_nodes"] == 4
        assert "JAX_COORDINATOR_ADDRESS" in content["run"]
