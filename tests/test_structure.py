"""Rules of the whole repository: who may import whom, what importing may do, what files may hold."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from llava_jax import cli

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("convert", "eval", "configs")  # lie at the top, install as llava_jax.NAME

# Room -> the rooms it may import. Every room may import itself and the BASE.
BASE = {
    "digests",
    "errors",
    "config",
    "params",
    "processes",
    "progress",
    "reader",
    "storage",
    "util",
}
BASE |= {"setting", "settings", "chips", "flops"}
NETWORK = {"quant", "products", "attention", "layers", "clip", "budget", "llama", "llava"}
MAY_IMPORT = {
    "digests": set(),
    "errors": set(),
    "config": set(),
    "params": set(),
    "processes": set(),
    "progress": set(),
    "reader": set(),
    "storage": set(),
    "util": set(),
    "chips": set(),
    "flops": set(),
    "setting": set(),
    "settings": set(),
    "text": set(),
    "images": set(),
    "batch": {"text", "images"},
    "quant": set(),
    "sharding": set(),
    "attention": {"sharding"},
    "products": {"quant", "sharding"},
    "layers": {"attention", "products", "quant"},
    "clip": {"attention", "layers", "sharding"},
    "llama": {"attention", "layers", "products"},
    "budget": set(),
    "llava": {"layers", "products", "sharding", "clip", "budget", "llama"},
    "data": {"text", "images", "batch"},
    "store": {"data", "images"},
    "datasets": {"text", "images", "data", "convert", "store"},
    "convert": NETWORK | {"sharding", "text", "batch"},
    "generate": NETWORK | {"sharding", "text", "images", "batch"},
    "model": NETWORK | {"sharding", "text", "images", "batch", "generate", "convert"},
    "report": set(),
    "train": NETWORK
    | {"sharding", "text", "images", "data", "convert", "generate", "model", "configs"}
    | {"report", "eval"},
    "plan": {"sharding", "batch", "data", "convert", "train"},
    "chat": {"text", "images", "generate", "model"},
    "serve": {"text", "images", "generate", "model"},
    "eval": {"text", "images", "batch", "generate", "model", "sharding"},
    "inspect": {"convert"},
    "configs": set(),
    "cli": set(),
    "__main__": {"cli"},
    "quickstart": NETWORK
    | {"sharding", "text", "images", "batch", "data", "generate"}
    | {"model", "train", "convert", "configs", "report"},
}
# Never import jax.
LIGHT = {*BASE, *("text", "store", "images", "batch", "cli", "inspect", "configs", "datasets")}

# Slow to import, or in an extra: only inside functions.
LAZY = {
    *("transformers", "grain", "orbax", "torch", "matplotlib", "tensorboardX", "huggingface_hub"),
    *("tensorflow_datasets", "array_record", "openpyxl", "gguf", "fastapi", "uvicorn", "gradio"),
    *("pooch", "openai", "jinja2", "fsspec", "ray", "pyarrow", "apache_beam", "etils"),
    *("wandb", "mlflow", "av", "llguidance"),
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its installed name."""
    found = {}
    for top in ("llava_jax", *BESIDE):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            if top in BESIDE:
                parts.insert(0, "llava_jax")
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def room(module: str) -> str:
    """llava_jax.text.tokenizer -> text; the package itself is the room ""."""
    return [*module.split("."), ""][1]


@cache
def repository_files() -> list[Path]:
    """The files that git knows or would add; all files where this is no git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        skip = {"build", "dist", "runs", "__pycache__"}
        paths = [
            p for p in ROOT.rglob("*") if not skip & set(p.parts) and ".egg-info" not in str(p)
        ]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def imports(module: str) -> list[tuple[str, int, bool]]:
    """(imported module, line, at import time?) of each import statement of `module`."""
    path = modules()[module]
    found = []

    def visit(node: ast.AST, top: bool):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # for the type checker only
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = resolve(module, path, node)
            found.append((base, node.lineno, top))
            found.extend(
                (f"{base}.{alias.name}", node.lineno, top)
                for alias in node.names
                if f"{base}.{alias.name}" in modules()
            )
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, ast.FunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def resolve(module: str, path: Path, node: ast.ImportFrom) -> str:
    """The absolute name behind `from X import ...`."""
    if not node.level:
        return node.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, node.module] if node.module else package)


@pytest.mark.parametrize("module", modules())
def test_import_direction(module):
    own = room(module)
    if not own:
        return
    assert own in MAY_IMPORT, f"give the room {own!r} its place in MAY_IMPORT"
    allowed = MAY_IMPORT[own] | BASE | {own, ""}
    for name, line, _ in imports(module):
        if name == "llava_jax" or name.startswith("llava_jax."):
            assert room(name) in allowed, f"{module}:{line}: {own} must not import {name}"


def test_the_architecture_page_says_who_may_import_whom():
    """Its table of rooms is MAY_IMPORT, a row for rooms that share a job."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room | job | may use |")[2].partition("\n\n")[0]
    seen = set()
    for row in table.splitlines()[2:]:
        _, names, _, may, _ = row.split("|")
        rooms, listed = set(re.findall(r"`(\w+)/?`", names)), set(re.findall(r"`(\w+)`", may))
        listed |= NETWORK | {"sharding"} if "the network" in may else set()
        allowed = set().union(*(MAY_IMPORT[name] for name in rooms)) - rooms
        assert listed == allowed, row
        seen |= rooms
    assert seen == MAY_IMPORT.keys()


def test_rooms_form_no_cycle():
    reached: dict[str, set[str]] = {}

    def below(name: str, path: tuple[str, ...]) -> set[str]:
        assert name not in path, " -> ".join((*path, name))
        if name not in reached:
            direct = MAY_IMPORT.get(name, set())
            reached[name] = direct.union(*(below(d, (*path, name)) for d in direct))
        return reached[name]

    for name in MAY_IMPORT:
        below(name, ())


@pytest.mark.parametrize("module", modules())
def test_heavy_libraries_are_imported_where_used(module):
    for name, line, top in imports(module):
        library = name.partition(".")[0]
        assert not (top and library in LAZY), f"{module}:{line}: import {library} inside a function"
        if library == "torch":
            assert room(module) == "convert", f"{module}:{line}: torch belongs to convert"


def test_configs_import_only_ml_collections_and_the_table():
    for module in modules():
        if room(module) == "configs":
            for name, line, _ in imports(module):
                library = name.partition(".")[0]
                ours = name.startswith(("llava_jax.configs", "llava_jax.settings"))
                fine = library == "ml_collections" or library in sys.stdlib_module_names or ours
                assert fine, f"{module}:{line}: {name}"


def slot_builders(tree: ast.AST) -> list[int]:
    """Lines that write the array `slots` of a batch: a key, a keyword, or one of several names.

    Reading it, as in batch["slots"] or {n: batch[n] for n in (...)}, is not writing.
    """
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            read.add(id(node.slice))
        if isinstance(node, ast.DictComp) and isinstance(node.value, ast.Subscript):
            read.update(map(id, ast.walk(node)))  # {name: batch[name] for name in (...)}
    written = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "slots" and id(node) not in read
    ]
    keywords = [
        n.value.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.keyword)
        and n.arg == "slots"
        and not isinstance(n.value, ast.Constant)  # @dataclass(slots=True)
    ]
    return written + keywords


def test_only_batch_builds_slots():
    for module, path in modules().items():
        lines = slot_builders(ast.parse(path.read_text(encoding="utf-8")))
        if module == "llava_jax.batch":
            assert lines, "llava_jax/batch.py no longer builds slots: mend this test"
        else:
            assert not lines, (
                f"{module}:{lines[0]}: llava_jax/batch.py alone makes arrays of examples"
            )


@pytest.mark.parametrize(
    "code",
    ['{"slots": x}', 'batch["slots"] = x', "Rows(slots=x)", 'for n in ("tokens", "slots"): f(n)'],
)
def test_a_second_builder_of_slots_is_found(code):
    assert slot_builders(ast.parse(code))
    assert not slot_builders(ast.parse('f(batch["slots"], {n: batch[n] for n in ("slots",)})'))


IMPORT_ALL = """
import importlib, json, os, sys
before = dict(os.environ)
for name in {names!r}:
    importlib.import_module(name)
heavy = [m for m in ("jax", "torch", "transformers", "grain", "orbax", "matplotlib") if m in sys.modules]
devices = False
if "jax" in sys.modules:
    from jax._src import xla_bridge
    devices = xla_bridge.backends_are_initialized()
changed = sorted(k for k in {{*before, *os.environ}} if k.startswith(("JAX_", "XLA_")) and before.get(k) != os.environ.get(k))
print(json.dumps([heavy, devices, changed]))
"""


def import_in_new_process(names: list[str]) -> tuple[list[str], bool, list[str]]:
    """Imports modules; returns (heavy libraries that came along, devices touched?, environment)."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(names=names)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


# Loaded only by the program they plug into, so only where that is installed.
PLUG_INS = {"llava_jax.eval.lmms_model": "lmms_eval"}


def test_importing_touches_no_device_and_no_setting():
    absent = {m for m, host in PLUG_INS.items() if not importlib.util.find_spec(host)}
    names = [m for m in modules() if not m.endswith("__main__") and m not in absent]
    heavy, devices, changed = import_in_new_process(names)
    assert not set(heavy) & (LAZY - {"grain", "orbax"})
    assert not devices
    assert not changed


def test_light_rooms_import_no_jax():
    names = [m for m in modules() if room(m) in LIGHT | {""} and not m.endswith("__main__")]
    assert import_in_new_process(names)[0] == []


def test_files_are_short():
    for path in repository_files():
        if path.suffix == ".py":
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 450, f"{path.relative_to(ROOT)}: {lines} lines"


# Read from top to bottom, by design: the training loop.
MAY_BE_LONG = {"llava_jax.train.loop.train": 120}


def test_functions_are_short_and_modules_say_what_they_are():
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) or not tree.body, f"{module} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                limit = MAY_BE_LONG.get(f"{module}.{node.name}", 60)
                assert lines <= limit, f"{module}:{node.lineno}: {node.name} has {lines} lines"


def test_files_are_small():
    for path in repository_files():
        limit = 3_000_000 if "assets" in path.parts else 1_000_000  # the shipped tiny checkpoint
        assert path.stat().st_size <= limit, path.relative_to(ROOT)


# Split, so that this file does not find itself.
FORBIDDEN = {
    "trust_remote" + "_code": "runs code that lies beside weights",
    r"(?<![\w.\-])/(work|root|home|Users)/[\w.]": "a path of one machine",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_no_file_holds(pattern):
    for path in repository_files():
        if path.suffix in {".py", ".md", ".toml", ".yml", ".yaml", ".cfg", ".in", ".json", ""}:
            found = re.search(pattern, path.read_text(encoding="utf-8", errors="ignore"))
            where = path.relative_to(ROOT)
            assert not found, f"{where}: {found and found[0]!r}: {FORBIDDEN[pattern]}"


def test_every_room_has_tests():
    tests = [p.relative_to(ROOT / "tests") for p in (ROOT / "tests").rglob("test_*.py")]
    told = {part for t in tests for part in (*t.parts[:-1], t.stem.removeprefix("test_"))}
    rooms = {room(m) for m in modules()} - {"", "__main__", "errors"}
    missing = sorted(r for r in rooms if not any(t == r or t.startswith(f"{r}_") for t in told))
    assert not missing, f"no tests/NAME/ or tests/**/test_NAME.py for {missing}"
    for folder in {p.parent for p in (ROOT / "tests").rglob("*.py")}:
        assert (folder / "__init__.py").exists(), folder


def documents() -> list[Path]:
    return [p for p in repository_files() if p.suffix == ".md"]


def command_lines(path: Path) -> list[list[str]]:
    """The words of each `llava-jax ...` in the code of a document or the docstring of a config."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        blocks = [ast.get_docstring(ast.parse(text)) or ""]
    else:
        blocks = re.findall(r"```.*?\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    code = (b.replace("\\\n", " ") for b in blocks)
    lines = (line.strip() for block in code for line in re.split(r"\n|&&|\|", block))
    return [x.partition("#")[0].split()[1:] for x in lines if x.startswith("llava-jax ")]


def with_commands() -> list[Path]:
    return [*documents(), *sorted((ROOT / "configs").glob("*.py"))]


@pytest.mark.parametrize("path", with_commands(), ids=lambda p: p.name)
def test_documents_name_existing_commands_options_and_files(path):
    for words in command_lines(path):
        if not words or words[0].isupper() or words[0] in {"--help", "--version", "help"}:
            continue
        assert words[0] in cli.COMMANDS, f"{path.name}: llava-jax {words[0]}"
        parser = cli.Parser(prog=words[0])
        parser.add_argument("--debug")
        cli.COMMANDS[words[0]].function("add_arguments")(parser)
        cli.check_options(parser, [w for w in words[1:] if not w.startswith("--config.")])
        for word in words:
            config = re.match(r"configs/\w+\.py", word)
            assert not config or (ROOT / config[0]).exists(), f"{path.name}: {word}"


@pytest.mark.parametrize("path", documents(), ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_actions_are_pinned_by_commit():
    used = []
    for path in (ROOT / ".github" / "workflows").glob("*.y*ml"):
        used += re.findall(r"uses:\s*(\S+)", path.read_text(encoding="utf-8"))
    assert used
    for action in used:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
