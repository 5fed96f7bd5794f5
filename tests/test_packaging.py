"""What setup.py says, what wheel and sdist hold, and that every way of installing works."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from llava_jax import __version__, cli
from tests import test_structure as structure
from tests.test_structure import BESIDE, ROOT, repository_files

EXTRAS = {
    "cuda12",
    "cuda13",
    "tpu",
    "torch",
    "tfds",
    "fast",
    "beam",
    "gguf",
    "parquet",
    "wandb",
    "mlflow",
    "chair",
    "video",
    "eval",
    "lmms",
    "json",
    "ray",
    "serve",
    "browser",
    "test",
    "dev",
}

READ_SETUP = """
import json
import setuptools
from distutils.core import run_setup
d = run_setup("setup.py", stop_after="init")
print(json.dumps({"core": d.install_requires, "extras": d.extras_require, "python": str(d.python_requires)}))
"""


def run(*words: str | Path, cwd: Path, **env: str) -> str:
    """Runs a program; returns what it printed, or fails with what it complained about."""
    done = subprocess.run(
        [str(w) for w in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def needs() -> dict:
    return json.loads(run(sys.executable, "-c", READ_SETUP, cwd=ROOT).splitlines()[-1])


def names(requirements: list[str]) -> set[str]:
    from packaging.requirements import Requirement

    return {Requirement(r).name for r in requirements}


def test_extras(needs):
    assert set(needs["extras"]) == EXTRAS
    assert "pytest" in names(needs["extras"]["test"])
    assert names(needs["extras"]["test"]) < names(needs["extras"]["dev"])
    for accelerator in ("cuda12", "cuda13", "tpu"):
        assert f"jax[{accelerator}]" in needs["extras"][accelerator][0]


def test_core_is_free_of_torch_and_accelerators(needs):
    assert not names(needs["core"]) & {"torch", "torchvision", "tensorflow", "pytest"}
    assert not any("[" in r for r in needs["core"])
    assert needs["python"] == ">=3.11"


def test_lower_bounds_stand_above_known_weaknesses(needs):
    from packaging.requirements import Requirement

    bounds = {
        r.name: r.specifier for r in map(Requirement, needs["core"] + needs["extras"]["torch"])
    }
    assert not bounds["pillow"].contains("12.2")
    assert not bounds["torch"].contains("2.5.1")
    assert not bounds["transformers"].contains("5.2.0")


@pytest.mark.parametrize("lock", ["py311.txt", "py312.txt"])
def test_locks_satisfy_setup(needs, lock):
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    text = (ROOT / "requirements" / lock).read_text()
    locked = dict(re.findall(r"^(\S+)==(\S+)", text, re.M))
    assert text.count("==") == len(locked)
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", text.strip()))
    for need in map(Requirement, needs["core"] + needs["extras"]["test"]):
        name = canonicalize_name(need.name)
        assert name in locked, f"{lock} lacks {name}: renew it (CONTRIBUTING.md)"
        assert need.specifier.contains(locked[name]), f"{lock}: {name} {locked[name]}"


# Library -> the required or optional package that always brings it.
BROUGHT_BY = {
    "ml_dtypes": "jax",
    "requests": "pooch",
    "etils": "orbax-checkpoint",
    "yaml": "flax",
}
IMPORTED_AS = {"PIL": "pillow", "orbax": "orbax-checkpoint"}


def test_every_library_that_is_imported_is_asked_for(needs):
    """A package that comes along with another one today may not tomorrow."""
    asked = names(needs["core"]) | {n for extra in needs["extras"].values() for n in names(extra)}
    asked = {name.replace("-", "_") for name in asked}
    for module in structure.modules():
        for name, line, _ in structure.imports(module):
            library = name.partition(".")[0]
            if library in sys.stdlib_module_names or library == "llava_jax":
                continue
            package = BROUGHT_BY.get(library) or IMPORTED_AS.get(library, library)
            assert package.replace("-", "_") in asked, f"{module}:{line}: setup.py lacks {library}"


def test_every_extra_that_an_error_names_exists(needs):
    for package, extra in cli.EXTRAS.items():
        wanted = {name.replace("-", "_") for name in names(needs["extras"][extra])}
        assert package in wanted, f"[{extra}] does not bring {package}"


def test_package_is_typed():
    assert (ROOT / "llava_jax" / "py.typed").is_file()


def test_typings_lead_to_the_folders_beside_the_package():
    for name in ("convert", "eval", "configs"):
        link = ROOT / "typings" / "llava_jax" / name
        if not link.parent.exists():
            pytest.skip("an unpacked sdist has no typings")
        assert link.resolve() == ROOT / name


def test_ci_runs_the_commands_of_the_readme():
    line = next(
        x for x in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in x and "venv" in x
    )
    setup, _, test = line.rpartition(" && ")
    assert test.startswith("python -m pytest")
    assert "--slow" not in test
    assert ".venv" in setup
    assert "[test]" in setup


# ---- built and installed --------------------------------------------------------------------


def copy_of_the_checkout(target: Path) -> Path:
    for path in repository_files():
        to = target / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    return target


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """sdist, and the wheel built from the unpacked sdist (as a package index would get them)."""
    base = tmp_path_factory.mktemp("built")
    tree = copy_of_the_checkout(base / "tree")
    build = "from setuptools import build_meta as b; b.build_{}({!r})"
    run(sys.executable, "-c", build.format("sdist", str(base)), cwd=tree)
    [sdist] = base.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(base / "unpacked", filter="data")
    [unpacked] = (base / "unpacked").iterdir()
    run(sys.executable, "-c", build.format("wheel", str(base)), cwd=unpacked)
    [wheel] = base.glob("*.whl")
    return {"sdist": sdist, "unpacked": unpacked, "wheel": wheel}


def test_wheel_holds_every_file_of_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        files = set(wheel.namelist())
        metadata = wheel.read(f"llava_jax-{__version__}.dist-info/METADATA").decode()
    ours = {f for f in files if ".dist-info/" not in f}
    assert {f.partition("/")[0] for f in ours} == {"llava_jax"}
    expected = set()
    for path in repository_files():
        top = path.relative_to(ROOT).parts[0]
        if top in ("llava_jax", *BESIDE):
            inner = path.relative_to(ROOT).as_posix()
            expected.add(inner if top == "llava_jax" else f"llava_jax/{inner}")
    assert "llava_jax/py.typed" in expected
    assert ours == expected
    assert f"llava_jax-{__version__}.dist-info/licenses/LICENSE" in files
    assert "License-Expression: Apache-2.0" in metadata


def test_sdist_holds_what_a_packager_needs(built):
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"):
        assert (built["unpacked"] / name).is_file(), name


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's libraries, but not how this one has us."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder).strip()
    )
    # A .pth adds the folder alone; the .pth files in it (an editable install) are not read again.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *words: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*pip, "--no-build-isolation", *words, cwd=python.parent)


CHECK = """
import importlib.util, json
import llava_jax
out = {"file": llava_jax.__file__, "version": llava_jax.__version__}
for name in NAMES:
    out[name] = importlib.import_module(name).__file__
out["top"] = [n for n in ("eval", "convert", "configs", "tests") if importlib.util.find_spec(n)]
print(json.dumps(out))
"""
INNER = ["llava_jax.convert", "llava_jax.eval", "llava_jax.configs", "llava_jax.text"]


def check(python: Path, cwd: Path) -> dict:
    """Imports the parts of the package with `python` in `cwd`, and asks the command for help."""
    found = run(python, "-c", f"NAMES = {INNER}\n" + CHECK, cwd=cwd)
    assert "quickstart" in run(python, "-m", "llava_jax", "--help", cwd=cwd)
    return json.loads(found.splitlines()[-1])


def test_wheel_runs_outside_the_checkout(built, tmp_path):
    python = new_environment(tmp_path / "venv")
    install(python, built["wheel"])
    found = check(python, tmp_path)
    assert all(Path(found[n]).is_relative_to(tmp_path / "venv") for n in ["file", *INNER])
    assert found["top"] == []
    assert found["version"] == __version__
    command = tmp_path / "venv" / "bin" / "llava-jax"
    assert "commands:" in run(command, "--help", cwd=tmp_path)
    shown = run(command, "train", "--config", "finetune_task_lora_7b", "--show", cwd=tmp_path)
    assert "name = 'finetune_task_lora_7b'" in shown


def test_wheel_runs_inside_a_checkout(built, tmp_path):
    """The usual state of a CI: the checkout on sys.path goes before what is installed."""
    python = new_environment(tmp_path / "venv")
    install(python, built["wheel"])
    tree = copy_of_the_checkout(tmp_path / "tree")
    assert Path(check(python, tree)["llava_jax.eval"]).is_relative_to(tree)


def test_plain_checkout_runs(tmp_path):
    tree = copy_of_the_checkout(tmp_path / "tree")
    assert Path(check(new_environment(tmp_path / "venv"), tree)["file"]).is_relative_to(tree)


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_editable_install(tmp_path, mode):
    tree = copy_of_the_checkout(tmp_path / "tree")
    python = new_environment(tmp_path / "venv")
    install(python, f"--config-settings=editable_mode={mode}", "--editable", tree)
    for cwd in (tmp_path, tree):
        found = check(python, cwd)
        assert all(Path(found[n]).is_relative_to(tree) for n in INNER)
        # compat puts the checkout itself on sys.path; so does running inside of it.
        assert found["top"] == [] or mode == "compat" or cwd == tree
