"""Which conversation template a checkpoint was made for, determined by its files."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from llava_jax.convert.io.folder import read_json
from llava_jax.errors import WeightError
from llava_jax.text.chat_template import recognise

log = logging.getLogger(__name__)

DEFAULT = "vicuna_v1"
MAX_TEXT = 1_000_000  # bytes of a chat template
# Rows of llava/serve/cli.py's choice by the model's name that hold for LLaVA-1.5's own code; what
# else it calls v0 or v1 is DEFAULT here, which all of LLaVA-1.5 was trained with.
_NAMES = (("llama-2", "llava_llama_2"), ("mistral", "mistral_instruct"))


def of_folder(folder: Path, kind: str, name: str) -> str:
    """The template for the checkpoint in `folder`, of one of source.KINDS, called `name`.

    An original's is chosen as the original does it, by model_type and name; Hugging Face's is
    recognised by its chat template, which is never run. Warns if it is not Vicuna's.
    Raises WeightError for a malformed file.
    """
    if kind != "hf":
        found = by_name(folder, name)
        if found:
            return found
    file, text = chat_template(folder)
    if text is None:
        return DEFAULT
    found = recognise(text)
    if found == DEFAULT:
        return DEFAULT
    use = found if found and kind == "hf" else DEFAULT
    if use == found:
        said = f"its chat template {found} is used"
    else:
        which = found or "not a known one, and is never run"
        said = f"the chat template is {which}; {use} is used instead"
    _warn_once(f"{folder / file}: {said} (--template names another)")
    return use


def by_name(folder: Path, name: str) -> str | None:
    """The template that the original picks for `folder`, called `name`; None where it is DEFAULT."""
    data = read_json(folder / "config.json")
    base = str(data.get("_name_or_path") or "")
    for why in (str(data.get("model_type") or ""), _last(name), _last(base)):
        for part, template in _NAMES:
            if part in why.lower():
                _warn_once(
                    f"{folder}: template {template} for {why!r}, as the original chooses: "
                    "--template names another"
                )
                return template
    return None


def _last(name: str) -> str:
    """A model's name from its path (get_model_name_from_path of the original)."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    return (
        "_".join(parts[-2:])
        if parts and parts[-1].startswith("checkpoint-")
        else "".join(parts[-1:])
    )


def chat_template(folder: Path) -> tuple[str, str | None]:
    """(file, Jinja text) of the folder's chat template, of the first file that has one.

    transformers asks them in this order. Raises WeightError for a template that is not a string.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEXT:
            raise WeightError(f"{path} is larger than {MAX_TEXT} bytes")
        text = path.read_text("utf-8", errors="replace")
        return path.name, text if text.strip() else None
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        found = read_json(folder / file).get("chat_template")
        if found:
            return file, _text_of(found, folder / file)
    return "", None


def _text_of(found: Any, where: Path) -> str:
    """The template, or of several the one named default."""
    if isinstance(found, list):
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        found = found.get("default") or next(iter(found.values()), None)
    if not isinstance(found, str):
        raise WeightError(f"{where}: chat_template is not a string")
    return found


@cache
def _warn_once(text: str) -> None:
    """A folder is opened several times on the way to a checked export."""
    log.warning("%s", text)
