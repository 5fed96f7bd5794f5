"""Where a checkpoint is: a local folder or file, or a repository of the Hugging Face hub."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import llava_jax
from llava_jax.errors import WeightError
from llava_jax.util import expanded

_ASSETS = Path(llava_jax.__file__).parent / "assets"
SHIPPED = {name: _ASSETS / name for name in ("tiny", "tiny-clip", "tiny-vicuna")}
"""Models that come with this package, by the name that stands for them everywhere."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
SAFE = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # of the cache, not the network


def looks_like_id(name: str) -> bool:
    """Whether `name` could be a hub id such as "liuhaotian/llava-v1.5-7b" (or "...@revision")."""
    return _ID.fullmatch(str(name)) is not None and ".." not in str(name)


def local(name: str | Path) -> Path:
    """Where `name` is if it is on this machine: a folder or file, or one of SHIPPED."""
    return SHIPPED.get(str(name)) or expanded(name)


def resolve(name: str | Path, allow_pickle: bool = False) -> Path:
    """The local folder (or file) of a path, hub id or name of SHIPPED.

    A hub id is downloaded unless it is cached. A name of SHIPPED never means a folder; ./name does.
    Only the files of SAFE are fetched, and .bin files with `allow_pickle`.
    Raises WeightError when there is neither: absent, gated, or no network; OSError when the cache
    cannot be written.
    """
    if str(name) in SHIPPED:
        if not SHIPPED[str(name)].is_dir():
            raise WeightError(
                f"this installation has no {name} model", fix="llava-jax quickstart makes one"
            )
        return SHIPPED[str(name)]
    path = expanded(name)
    if path.exists():
        return path
    if not looks_like_id(str(name)):
        raise WeightError(f"{name}: no such folder or file")
    repo, _, revision = str(name).partition("@")
    return _download(repo, revision or None, allow_pickle)


def _download(repo: str, revision: str | None, allow_pickle: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [*SAFE, "*.bin"] if allow_pickle else SAFE
    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns)
        )
    except errors.GatedRepoError:
        raise WeightError(
            f"{repo} is gated on the Hugging Face hub",
            fix="accept its terms on its page there, then run `hf auth login`",
        ) from None
    except errors.RevisionNotFoundError:
        raise WeightError(f"{repo} has no revision {revision!r} on the Hugging Face hub") from None
    except errors.RepositoryNotFoundError:
        raise WeightError(
            f"{repo} is neither a local folder nor a public repository of the Hugging Face hub",
            fix="check the name; if it is private, run `hf auth login`",
        ) from None
    except Exception as error:  # requests, httpx and OS errors of other kinds mean the same here
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise WeightError(
            f"{repo} is not in the local cache and the Hugging Face hub did not answer "
            f"({type(error).__name__})",
            fix="check the network, or give a local folder",
        ) from None
