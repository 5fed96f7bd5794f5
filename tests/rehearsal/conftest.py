"""What the rehearsals share: the mixture in small and the models to start from, made once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal import mixture, models


@dataclass(frozen=True)
class Mixture:
    """Both sets in `folder`, and their manifest (see tests.rehearsal.mixture.make)."""

    folder: Path
    manifest: dict[str, Any]

    def settings(self, part: str) -> dict[str, Any]:
        """Where a part ("instruct" or "captions") lies, as settings of a run."""
        files = self.manifest[part]
        return {
            "data.path": self.folder / files["file"],
            "data.image_folder": self.folder / files["image_folder"],
        }


@pytest.fixture(scope="session")
def mix(tmp_path_factory) -> Mixture:
    """240 records of stage 2, 201 of stage 1."""
    folder = tmp_path_factory.mktemp("mixture")
    return Mixture(folder, mixture.make(folder))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Callable[..., Path]:
    """model("vicuna" | "clip" | "original" | "hugging_face", **options): its folder, made once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = getattr(models, kind)(folder / f"{kind}_{len(made)}", **options)
        return made[key]

    return get
