"""Files below an address such as gs://bucket/folder, by fsspec, where a setting may name one.

Only settings name addresses: a path in a record, or an image that somebody sends, is never fetched.
Errors are those of local files, OSError and FileNotFoundError, so that callers treat both alike.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError

# Two letters at least, so that C:// is a drive. "simplecache::s3://" is fsspec's way to chain.
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://")


def is_address(path: Any) -> bool:
    """Whether `path` is an address and not a path of a disk (NFS and mounted buckets are disks)."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def join(folder: str | Path, path: str) -> str:
    """The file `path` below a folder or address."""
    return f"{str(folder).rstrip('/')}/{path}" if is_address(folder) else os.path.join(folder, path)


def read(path: str | Path, limit: int | None = None) -> bytes:
    """The bytes of a file, the first `limit` at most. Raises OSError, and ConfigError for an address
    of a store that is unknown or whose library is not installed."""
    if not is_address(path):
        with open(path, "rb") as file:
            return file.read(-1 if limit is None else limit)
    with _as_os_errors(path):
        store, name = _open(path)
        return store.cat_file(name, start=None if limit is None else 0, end=limit)


@contextlib.contextmanager
def reading(address: str) -> Iterator[Any]:
    """The file at an address, open to be read a part at a time. Raises as `read`."""
    with _as_os_errors(address):
        store, name = _open(address)
        with store.open(name, "rb") as file:
            yield file


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. Raises as `read`, but not for one that is not there."""
    if not is_address(path):
        return os.path.isfile(path)  # False for a name that is too long, where Path's raises
    with _as_os_errors(path):
        store, name = _open(path)
        return store.isfile(name)


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder; of an address, whether anything is below it. Raises as `read`."""
    if not is_address(path):
        return os.path.isdir(path)
    with _as_os_errors(path):
        store, name = _open(path)
        return store.isdir(name)


def files_in(folder: str) -> set[str]:
    """The names of the files in a folder, by one listing. Raises as `read`."""
    if not is_address(folder):
        with os.scandir(folder or ".") as entries:
            return {e.name for e in entries if _is_file(e)}
    with _as_os_errors(folder):
        store, name = _open(folder)
        found = store.ls(name, detail=True)
        return {e["name"].rpartition("/")[2] for e in found if e["type"] == "file"}


@dataclass(frozen=True)
class Remote:
    """A file at an address, for `llava_jax.images.decode.open_image`, which reads what it allows."""

    address: str

    def read(self, limit: int) -> bytes:
        """The first `limit` bytes. Raises OSError."""
        return read(self.address, limit)


def source(path: str) -> Path | Remote:
    """What `open_image` opens for a path or address."""
    return Remote(path) if is_address(path) else Path(path)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _open(address: Any) -> tuple[Any, str]:
    """(file system, the name of `address` in it)."""
    import fsspec

    return fsspec.core.url_to_fs(address)


@contextlib.contextmanager
def _as_os_errors(address: Any) -> Iterator[None]:
    """Within it, the exceptions of fsspec and of each store's own client become a local file's."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from None
    except PermissionError:
        raise
    except ImportError as error:  # fsspec's own words: "Install s3fs to access S3"
        fix = " ".join(str(error).split())
        fix = fix[:1].lower() + fix[1:]
        raise ConfigError(f"{address}: its library is not installed", fix=fix) from None
    except ValueError as error:
        raise ConfigError(f"{address}: {' '.join(str(error).split())[:200]}") from None
    except Exception as error:  # botocore, aiohttp and others have their own
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(errno.EIO, said, address) from error
