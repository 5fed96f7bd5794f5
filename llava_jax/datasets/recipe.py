"""A recipe: which sets a training file is made of, how much of each, and with which prompts.

seed = 0
[[set]]
source = "ocrvqa"        # a name of llava_jax.datasets.sources, of an installed package, or a .py file
folder = "ocrvqa"        # the owner's files, below --raw; by default the set's name
count = 80000            # or weight = 2.5: how often, a part of them drawn by the seed
prompt = "..."           # fields of the set, see its file: prompt, image, ...
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import string
import tomllib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llava_jax.datasets.source import Source
from llava_jax.errors import ConfigError, did_you_mean

HERE = Path(__file__).parent
GROUP = "llava_jax.datasets"
"""The entry point group of packages that bring sets: name = "package.module"."""
_OURS = ("source", "folder", "weight", "count")
_HIDDEN = ("skipped", "at", "told", "seed", "folder")


@dataclass(frozen=True)
class Part:
    """One set of a recipe. count: how many records of it; None: as many as there are, times weight."""

    source: Source
    weight: float = 1.0
    count: int | None = None

    def wanted(self, there: int) -> int:
        """How many records to take where there are so many."""
        return round(there * self.weight) if self.count is None else self.count


@dataclass(frozen=True)
class Recipe:
    """What `read_recipe` reads."""

    name: str
    seed: int
    parts: list[Part]
    text: str


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted((HERE / "recipes").glob("*.toml"))}


def read_recipe(name: str, raw: str | Path, only: tuple[str, ...] = ()) -> Recipe:
    """A recipe that is shipped, or a .toml file. raw: what folders of sets are below.

    only: the sets to keep, by name. Raises ConfigError, naming set and key.
    """
    path = shipped().get(name) or Path(name)
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except FileNotFoundError:
        known = ", ".join(shipped())
        fix = did_you_mean(name, shipped()) or f"{known}, or a .toml file"
        raise ConfigError(f"no recipe {name!r}", fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML ({e})") from None
    rows, seed = data.pop("set", None), data.pop("seed", 0)
    if data:
        raise ConfigError(f"{path}: {next(iter(data))!r} is neither seed nor set")
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"{path}: there are no sets", fix='begin each with [[set]] and source = "..."'
        )
    if type(seed) is not int:
        raise ConfigError(f"{path}: seed is {seed!r}, not a whole number")
    parts = [_part(row, path, Path(raw), seed) for row in rows]
    if only:
        names = [part.source.name for part in parts]
        for wanted in only:
            if wanted not in names:
                raise ConfigError(f"{path}: no set {wanted!r}", fix=f"one of {', '.join(names)}")
        parts = [part for part in parts if part.source.name in only]
    return Recipe(path.stem, seed, parts, text)


def _part(row: dict[str, Any], path: Path, raw: Path, seed: int) -> Part:
    name = row.get("source") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"{path}: a set has no source")
    made = find_source(name, path.parent)
    fields = {f.name: f for f in dataclasses.fields(made) if _has(made, f.name)}
    values = {key: value for key, value in row.items() if key not in _OURS}
    for key, value in values.items():
        if key not in fields:
            known = [*fields, *_OURS]
            fix = did_you_mean(key, known) or f"one of {', '.join(known)}"
            raise ConfigError(f"{path}: {name}: {key!r} is not a field of it", fix=fix)
        values[key] = _value(value, fields[key].default, f"{path}: {name}: {key}")
        if key == "image":
            _check_form(values[key], str(fields[key].default), f"{path}: {name}: image")
    weight, count = row.get("weight", 1.0), row.get("count")
    if type(weight) not in (int, float) or not 0 < weight <= 1000:
        raise ConfigError(f"{path}: {name}: weight is {weight!r}, not a number above 0, to 1000")
    if count is not None and (type(count) is not int or count < 1 or "weight" in row):
        raise ConfigError(f"{path}: {name}: count is a whole number from 1, without weight")
    folder = row.get("folder", made.name)
    if not isinstance(folder, str):
        raise ConfigError(f"{path}: {name}: folder is {folder!r:.60}, not text")
    source = made(folder=raw / folder, seed=seed, **values)
    return Part(source, float(weight), count)


def _has(made: type[Source], field: str) -> bool:
    """Whether a recipe may set a field. Of our sets, those that declare `image` or `prompt` use it."""
    if field in _HIDDEN:
        return False
    if field not in ("image", "prompt") or not made.__module__.startswith(
        f"{__package__}.sources."
    ):
        return True
    return any(field in vars(c).get("__annotations__", {}) for c in made.__mro__ if c is not Source)


def _check_form(form: str, default: str, where: str) -> None:
    """Raises ConfigError for a format string of pictures that names them all alike, or fails."""
    try:
        used = [name for _, name, *_ in string.Formatter().parse(form) if name is not None]
        known = [name for _, name, *_ in string.Formatter().parse(default) if name is not None]
    except ValueError as e:
        raise ConfigError(f"{where} is {form!r}: {e}") from None
    apart = set(used) & ({"id"} if "id" in known else set(known))  # of one picture from another
    many = used.count("") > known.count("")
    if default and (many or not (apart and set(used) <= set(known))):
        names = " and ".join("{" + name + "}" for name in known)
        raise ConfigError(f"{where} is {form!r}, and needs {names}", fix=f"as in {default!r}")


def _value(value: Any, default: Any, where: str) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    value = float(value) if type(value) is int and type(default) is float else value
    if type(value) is not type(default):
        kinds = {str: "text", tuple: "a list", int: "a whole number", float: "a number"}
        kind = kinds.get(type(default), "true or false")
        raise ConfigError(f"{where} is {value!r}, not {kind}")
    return value


def _source_of(module: Any, where: str) -> type[Source]:
    made = getattr(module, "SOURCE", None)
    if not (isinstance(made, type) and issubclass(made, Source) and hasattr(made, "name")):
        raise ConfigError(
            f"{where} has no SOURCE that is a Source with a name", fix="SOURCE = Pets"
        )
    return made


def find_source(name: str, base: Path = Path()) -> type[Source]:
    """The SOURCE of a module: a .py file (relative to `base`), one of ours, or an entry point's.

    A .py file is run: name only files that you trust.
    """
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(name).stem, base / name)
        if spec is None or spec.loader is None or not (base / name).is_file():
            raise ConfigError(f"no such source file {base / name}")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as e:  # whatever the code of a user does
            raise ConfigError(f"{base / name}: {type(e).__name__}: {e}") from e
        return _source_of(module, str(base / name))
    ours = sorted(
        p.stem for p in (HERE / "sources").glob("*.py") if p.stem not in ("__init__", "regions")
    )
    theirs = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name in ours:
        return importlib.import_module(f"llava_jax.datasets.sources.{name}").SOURCE
    if name in theirs:
        return _source_of(theirs[name].load(), name)
    fix = did_you_mean(name, [*ours, *theirs]) or f"one of {', '.join([*ours, *theirs])}"
    raise ConfigError(f"no source {name!r}", fix=fix)
