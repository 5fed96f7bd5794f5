"""Gets a benchmark's files from their owners, checked by hash and remembered.

pooch downloads and checks; ours is what it lacks: hashes are ours to give only where the file is
fixed in a public repository, so any other file's hash is noted in fetched.json when it first
arrives, and a file that differs later is refused (pooch would silently download it again). The addresses
are in fetch.toml.
"""

import shutil
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_jax.errors import LlavaError
from llava_jax.eval.task import get_task
from llava_jax.util import need, read_object, write_json

RECORD = "fetched.json"


@cache
def sets() -> dict[str, dict[str, Any]]:
    """Where each benchmark's files are, and `sha256` of those that do not change."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def fetch(task: str, out: Path, *, org: str | None = None, images: bool = False) -> Iterator[Path]:
    """Downloads what a benchmark needs into `out` and unpacks archives; yields each path.

    Args:
      org: hub organisation, where files come from the hub; by default their owner's.
      images: image archives too (gigabytes).
    Raises:
      LlavaError: no network, a gated or vanished file, another hash, or a set that is only given
        out by hand.
    """
    name = get_task(task).name
    found = sets().get(name, {"by_hand": "it is no benchmark of this package"})
    if "files" not in found:
        by_hub = "get it with: hf download --repo-type dataset {hub} --local-dir DATA/{name}"
        how = found.get("by_hand") or by_hub.format(name=name, **found)
        raise LlavaError(f"{name}: cannot be downloaded: {how}")
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    owner = org or found.get("org", "")
    try:
        for url in (*found["files"], *(found.get("images", ()) if images else ())):
            yield _get(url.format(org=owner), out)
    finally:
        if made and not any(out.iterdir()):  # it would pass for the benchmark's
            out.rmdir()


def _get(url: str, out: Path) -> Path:
    pooch = need("pooch", "to fetch a benchmark's files", "llava_jax[eval]")
    path, record = out / url.rsplit("/", 1)[-1], out / RECORD
    known = read_object(record) if record.exists() else {}
    wanted = sets()["sha256"].get(path.name) or known.get(path.name, {}).get("sha256")
    if not path.exists():
        _download(pooch, url, path, wanted)
        digest = pooch.file_hash(str(path))
        known[path.name] = {"url": url, "sha256": digest, "bytes": path.stat().st_size}
        write_json(record, known, indent=1)
    elif wanted and (digest := pooch.file_hash(str(path))) != wanted:
        what = f"{path}: has hash {digest[:12]}…, not {wanted[:12]}…"
        raise LlavaError(what, fix="remove it and fetch again")
    if path.suffix == ".zip":
        _unpack(path, out)
    return path


def _download(pooch: Any, url: str, path: Path, sha256: str | None) -> None:
    """Writes `path` once the whole file is there and has the hash, if one is known."""
    from requests import exceptions

    by_hand = f"or download {url} elsewhere and put it into {path.parent}"
    pooch.get_logger().setLevel("WARNING")
    download = pooch.HTTPDownloader(timeout=60)
    try:
        pooch.retrieve(url, sha256, fname=path.name, path=path.parent, downloader=download)
    except exceptions.HTTPError as e:
        code = e.response.status_code if e.response is not None else 0
        words, fix = f"HTTP {code}", "try --org"
        if code in (401, 403):
            words, fix = f"is gated ({words})", "ask for access"
        raise LlavaError(f"{url}: {words}", fix=f"{fix}, {by_hand}") from None
    except exceptions.ChunkedEncodingError:
        raise LlavaError(f"{url}: the connection ended early", fix="fetch again") from None
    except exceptions.RequestException as e:
        reason = str(getattr(e.args[0], "reason", e) if e.args else e).rpartition(": ")[2]
        words = f"{urlsplit(url).netloc} cannot be reached ({reason})"
        raise LlavaError(words, fix=f"go online, {by_hand}") from None
    except ValueError:  # pooch's, of the hash
        words = f"{url}: the file has another hash than {str(sha256)[:12]}…"
        raise LlavaError(words, fix="fetch again; or the owner changed it") from None


def _unpack(path: Path, out: Path) -> None:
    """Unpacks what is not there yet in full, each file under its name once it is whole. Ours and not
    pooch's: a member outside `out` is an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                target = (out / member.filename).resolve()
                if not target.is_relative_to(out.resolve()):
                    raise LlavaError(f"{path}: holds a file outside itself: {member.filename!r}")
                whole = target.is_file() and target.stat().st_size == member.file_size
                if not member.is_dir() and not whole:
                    _extract(archive, member, target)
    except zipfile.BadZipFile:
        raise LlavaError(f"{path}: is not a zip archive", fix="remove it and fetch again") from None


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        with archive.open(member) as source, part.open("wb") as file:
            shutil.copyfileobj(source, file)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
