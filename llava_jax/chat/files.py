"""Names of files as people type them, schemas, and conversations as files."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError


def file_names(text: str) -> list[str]:
    """File names as a shell reads them, so that quoted and dropped ones work; else the whole text."""
    from llava_jax.images.decode import local_path

    if text and os.path.exists(local_path(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe in a name
        return [text]


def file_name(text: str) -> str:
    """One file's name, with the quotes that Tab gives it or without."""
    names = file_names(text)
    return names[0] if len(names) == 1 else text


def read_schema(text: str) -> dict[str, Any]:
    """OpenAI's response_format of a JSON schema: its text, or the file that has it.

    Raises ConfigError, also for a schema that no model can follow, and LlavaError without llguidance.
    """
    from llava_jax.generate.constrain import check_format

    name = "the JSON schema"
    if not text.lstrip().startswith("{"):
        name, path = text, Path(text).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{name}: no schema can be read there", fix="--json FILE") from None
    schema = parsed(text, name)
    if not isinstance(schema, dict):
        raise ConfigError(f"{name} is not a JSON object")
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    check_format(form)
    return form


def parsed(text: str, name: str) -> Any:
    """JSON. Raises ConfigError, which calls it `name`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{name} is not JSON") from None


def write_conversation(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    shown: Sequence[Sequence[str]],
    settings: Mapping[str, Any],
) -> None:
    """Writes a conversation to a new file: Markdown where its name ends in .md, else JSON.

    shown: the names of each question's images. Raises ConfigError; a file that is there stays.
    """
    if not name:
        raise ConfigError("which file?", fix="/save talk.json or /save talk.md")
    images = iter(shown)
    rows = [_row(m, next(images, ()) if m["role"] == "user" else ()) for m in messages]
    path = Path(name).expanduser()
    text = _markdown(rows) if path.suffix == ".md" else _json(rows, settings)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{name} is there already", fix="another name") from None
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror or 'it cannot be written'}") from None


def _row(message: Mapping[str, Any], images: Sequence[str]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return {"role": message["role"], "images": list(images), "text": content}


def _json(rows: Sequence[dict[str, Any]], settings: Mapping[str, Any]) -> str:
    messages: list[dict[str, Any]] = []
    for row in rows:
        parts = [{"type": "image_url", "image_url": {"url": _uri(n)}} for n in row["images"]]
        words = [{"type": "text", "text": row["text"]}]
        messages.append(
            {"role": row["role"], "content": [*parts, *words] if parts else row["text"]}
        )
    if system := settings.get("system"):
        messages.insert(0, {"role": "system", "content": system})
    return json.dumps({"messages": messages}, indent=1, ensure_ascii=False) + "\n"


def _uri(name: str) -> str:
    return name if name.startswith("file:") else Path(name).expanduser().absolute().as_uri()


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    parts = []
    for row in rows:
        parts.append("## You" if row["role"] == "user" else "## Model")
        parts += [f"![{Path(n).name}](<{_uri(n)}>)" for n in row["images"]]
        parts.append(row["text"])
    return "\n\n".join(parts) + "\n"
