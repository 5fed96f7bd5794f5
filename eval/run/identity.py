"""Whose answers these are: what a folder of answers remembers, so that it never passes for another's.

A model is known by the bits of its tensors and its config, not by its folder's name; an answer by
its prompt and the bytes of its pictures.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import locked
from llava_jax.eval.questions import Question
from llava_jax.params import parameter_shapes
from llava_jax.util import installed_versions, read_object, take_lock, write_json

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)
ELSEWHERE = "use another --out, or move that folder away"
PACKAGES = ("llava_jax", "jax", "jaxlib", "flax", "numpy", "pillow", "tokenizers")


def model_identity(model: "LlavaModel") -> dict[str, Any]:
    """What a loaded model is: a digest of config, tokenizer and every parameter, and how many
    parameters it has, however many bits they are held in. Copies, shardings and folder names do not
    change it; another type (bf16) does."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(model.generator.leaves)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    sums = jax.device_get(jax.jit(lambda x: jax.tree.map(_checksum, x))(arrays))
    facts = {
        "config": model.config.to_dict(),
        "tokenizer": model.tokenizer.digest,
        "params": {k: [list(a.shape), str(a.dtype), *map(int, sums[k])] for k, a in arrays.items()},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    shapes = parameter_shapes(dataclasses.replace(model.config, lora=None))
    return {"fingerprint": digest, "parameters": sum(map(math.prod, shapes.values()))}


def _checksum(x: Any) -> Any:
    """Two numbers uint32 of all bits of an array and their places, without moving a shard."""
    import jax
    import jax.numpy as jnp

    if jnp.issubdtype(x.dtype, jnp.bool_) or x.dtype.itemsize < 1:
        x = x.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}.get(x.dtype.itemsize)
    if kind is None or x.dtype.name in ("int4", "uint4"):
        x, kind = x.astype(jnp.int32), jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    place = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
    place = (place ^ (place >> 12)) * jnp.uint32(0x297A2D39)
    mixed = bits * (place | 1), (bits ^ (place >> 7)) * jnp.uint32(0x9E3779B1)
    return jnp.stack([m.sum(dtype=jnp.uint32) for m in (mixed[0], mixed[1] ^ (mixed[1] >> 16))])


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"python": platform.python_version(), **installed_versions(PACKAGES)}


def check_run(path: Path, run: dict[str, Any], own: str) -> None:
    """Writes `run`, what is asked of whom, or compares it with what the folder's answers are from.

    Args:
      own: name of this process's own temporary file: parts may start at the same time.
    Raises:
      AnswerError: the folder belongs to another model or other settings, which it names.
    """
    if not path.exists():
        if _holds_answers(path.parent) or path.with_name("result.json").exists():
            what = f"{path.parent}: holds answers, but no run.json that says whose they are"
            raise AnswerError(what, fix=ELSEWHERE)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path.with_name(own), run, indent=1)
        path.with_name(own).replace(path)
        return
    old = read_object(path, AnswerError)
    if changed := [k for k, v in run.items() if old.get(k) != v]:
        was = ", ".join(f"{k} was {_short(old.get(k))}, is {_short(run[k])}" for k in changed)
        raise AnswerError(f"{path.parent}: holds answers of another run ({was})", fix=ELSEWHERE)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other processes from asking the same questions into one file, see `locked`.

    A folder without a single answer belongs to nobody: its run.json goes, before and after."""
    with locked(path):
        _disown(path)
        try:
            yield
        finally:
            _disown(path)


def _disown(own: Path) -> None:
    """Removes run.json, and rows that only say why there is no answer, where nothing else is there and
    no other process is about to answer. own: the lock of this one."""
    folder = own.parent
    if _holds_answers(folder):
        return
    with contextlib.ExitStack() as files:
        for lock in set(folder.glob(".answers-*.lock")) - {own}:
            if not take_lock(files.enter_context(lock.open("a"))):
                return
        for path in (folder / "run.json", *folder.glob("answers*.jsonl")):
            path.unlink(missing_ok=True)


def _holds_answers(folder: Path) -> bool:
    """Whether an answer file there has an answer, or anything that is not ours."""
    for path in folder.glob("answers*.jsonl"):
        with path.open("rb") as file:
            for line in file:
                try:
                    if not json.loads(line)["metadata"]["error"]:
                        return True
                except (ValueError, LookupError, TypeError, RecursionError):
                    return True
    return False


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)


class Digests:
    """Digests of questions: prompt and pictures. A picture is read once and then known by its size
    and time, which `save` keeps in `cache`."""

    def __init__(self, cache: Path | None = None):
        self._cache, self._changed = cache, False
        self._known: dict[str, list[Any]] = {}
        if cache is not None and cache.exists():
            try:
                self._known = read_object(cache, AnswerError)
            except AnswerError as e:  # what it held is taken anew
                logger.warning("%s", e)

    def of(self, question: Question, images: Sequence[Path | bytes]) -> str:
        """A digest of a question as it is asked."""
        digest = hashlib.sha256(question.prompt.encode("utf-8", "backslashreplace"))
        for image in images:
            inside = isinstance(image, bytes)
            digest.update(hashlib.sha256(image).digest() if inside else self._file(image))
        return digest.hexdigest()[:16]

    def _file(self, path: Path) -> bytes:
        state, name = path.stat(), str(path)
        stamp = [state.st_size, state.st_mtime_ns]
        known = self._known.get(name)
        try:
            if known and known[:2] == stamp:
                return bytes.fromhex(known[2])
        except (TypeError, ValueError, LookupError):
            pass  # the file is damaged
        digest = hashlib.sha256(path.read_bytes())
        self._known[name], self._changed = [*stamp, digest.hexdigest()], True
        return digest.digest()

    def save(self) -> None:
        """Keeps what was read."""
        if self._cache is not None and self._changed:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._cache, self._known)
            self._changed = False
