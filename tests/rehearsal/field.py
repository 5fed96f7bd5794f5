"""Runs the inputs of ../shared/data/field: small files on which the package once failed."""

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.command import Done, run


@dataclass(frozen=True)
class Field:
    """One input in `case`; what its make.py writes lies in `out`."""

    case: Path
    out: Path

    def script(self, name: str = "make.py", *words: str) -> str:
        """Runs a script of the input as its README says; returns what it printed."""
        before, argv = list(sys.path), sys.argv
        sys.argv = [name, *words]
        sys.path.insert(0, str(self.case))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                runpy.run_path(str(self.case / name), run_name="__main__")
        finally:
            sys.path[:], sys.argv = before, argv
            sys.modules.pop("common", None)
        return said.getvalue()

    def train(self, workdir: Path, data: Path, **changes: Any) -> Done:
        """The training command of the inputs' READMEs, changed by `changes`, in its own process."""
        settings = {
            "model.init": self.out / "base_hf",
            "data.image_folder": self.out / "img",
            "batch_size": 4,
            "steps": 4,
            "dtype": "float32",
            "remat": "none",
            "data.max_length": 256,
            "data.path": data,
            **changes,
        }
        words = [f"--config.{name}={value}" for name, value in settings.items()]
        return run(
            *("train", "--config", "finetune_7b", "--quiet", "--workdir", workdir, *words),
            cwd=self.case,
        )


def open_field(name: str, out: Path, monkeypatch) -> Field:
    """The input `name`, with its surroundings made; skips where the inputs are absent."""
    from tests.conftest import shared

    folder = shared("field")
    monkeypatch.setenv("FIELD_OUT", str(out))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if not (folder / name).is_dir():
        pytest.skip(f"there is no input {name!r}")
    found = Field(folder / name, out)
    if not (out / "img").exists():
        monkeypatch.chdir(folder)
        Field(folder, out).script("prepare.py")
    monkeypatch.chdir(folder / name)
    return found
