"""Shared test set-up: eight simulated CPU devices, fp32 at highest precision, the slow marker."""

import gc
import json
import os
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path

# Before the first import of jax: tests of sharding need several devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flag = "--xla_force_host_platform_device_count=8"
if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Tests that start processes, and later runs, need not compile the same programs again.
_cache = Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
LIGHT = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_decided = LIGHT in os.environ  # whoever set it has decided
LEVEL = "--xla_backend_optimization_level=1"  # of LLVM, where LIGHT does not ask for none
IN_ONE = "--xla_cpu_parallel_codegen_split_count=1"  # the cores are busy: parts are more work
# Of jaxlib 0.10; later ones have no choice. XLA's new emitters of fused loops load all of MLIR for each
# tiny program: half of the time to compile it.
PLAIN_LOOPS = "--xla_cpu_use_fusion_emitters=false"
# Of later ones: with it, collectives of simulated devices wait for each other for ever on two cores
# (jaxlib 0.12.0.1, train/test_loop.py::test_resumed_on_another_mesh_it_gives_the_same_losses).
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"

import pytest  # noqa: E402

_beside = Path(__file__).resolve().parents[2] / "shared" / "data"
LONG = ("rehearsal", "train", "documents", "parity")
"""Folders, the longest first."""
NOT_LIGHT = (
    *("quickstart/test_run.py", "/test_recipes.py", "/test_interrupted.py"),
    "/test_golden_lora.py",
)
"""Files that LIGHT is not for: so many steps that LLVM's first level pays, or a golden that is held to
float64, from which none at all rounds further than what users run. With --slow no file is compiled lightly."""
SHARED = Path(os.environ.get("LLAVA_JAX_TEST_DATA", _beside))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well")


def _place(folder: str) -> int:
    return LONG.index(folder) if folder in LONG else len(LONG)


def _quicker(name: str, flag: str) -> None:
    """Adds a flag of XLA, unless whoever started the tests has set it."""
    if name not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {flag}"


def pytest_configure(config):
    # nohup and a shell's background jobs ignore these; the tests send them to what they start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)
    if not (_decided or config.getoption("--slow")):  # no backend has read the flags yet
        _quicker("backend_optimization_level", LEVEL)
        _quicker("codegen_split_count", IN_ONE)
        if version("jaxlib").startswith("0.10."):
            _quicker("fusion_emitters", PLAIN_LOOPS)
    if not version("jaxlib").startswith("0.10."):
        _quicker("concurrency_optimized_scheduler", IN_ORDER)
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist: the order below, not by count
        config.option.loadscopereorder = False


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # thousands of tests and the modules they import: every later collection walked them
    gc.set_threshold(50_000, 20, 20)  # tracing makes objects by the million, few of them in cycles


def pytest_collection_modifyitems(config, items):
    # Files whose tests take longest come first, so that no worker ends long after the others.
    items.sort(key=lambda item: _place(Path(item.path).parent.name))
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compiles for most tests with JAX's switch for tests: LLVM's optimizations were half their time.

    Here, not in a fixture, so that it holds in fixtures of any scope, and in processes they start.
    """
    if _decided:
        return
    excepted = Path(item.path).as_posix().endswith(NOT_LIGHT)
    light = not (excepted or item.config.getoption("--slow"))
    os.environ[LIGHT] = str(int(light))
    if "jax" in sys.modules:
        sys.modules["jax"].config.update(LIGHT.lower(), light)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS of a process to start: this one's, with another number of simulated devices."""
    return re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


def shared(name: str) -> Path:
    """The folder `name` of the reference data (outputs of the original code); skips where absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data {name!r} is not beside this checkout")
    return path


def json_lines(path: Path) -> list:
    """The values of a JSON lines file; a line ends at a line feed only, whatever its strings hold."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").split("\n") if x.strip()]


def named(folder: str, pattern: str) -> list[str]:
    """Names of the reference data's files that fit; [pattern], whose tests then skip, without any."""
    return sorted(p.name for p in (SHARED / folder).glob(pattern)) or [pattern]


@pytest.fixture
def golden() -> Path:
    """Outputs of the original PyTorch code."""
    return shared("golden")
