"""What `llava-jax data check` finds: kinds, what each means, and what is found in a record or picture."""

from __future__ import annotations

import hashlib
import resource
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax import storage
from llava_jax.data.records import check_record, record_name
from llava_jax.errors import ImageError, LlavaError, SampleError
from llava_jax.images.decode import Limits, format_of, open_image
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.example import LEFT_OUT, TRUNCATED, Example
from llava_jax.text.records import TAG_NOTES, record_id
from llava_jax.text.sample import ExampleMaker, check_trained

MALFORMED, ROLES, UNANSWERED, EMPTY_LABELS = (
    "malformed record",
    "roles out of order",
    "no answer",
    "nothing to train",
)
MISSING, NOT_A_PICTURE, CORRUPT, OVERSIZE, DEADLY = (
    "missing picture",
    "not a picture",
    "corrupt picture",
    "oversize picture",
    "deadly picture",
)
EXTENSION, TOO_LONG, CUT_PICTURE = "wrong extension", "too long", "cut at a picture"
DOUBLE_RECORD, DOUBLE_PICTURE, ALIKE = "record twice", "picture twice", "pictures look alike"
SEEN_PICTURE, SEEN_QUESTION = "picture of an evaluation", "question of an evaluation"

BAD = {
    MALFORMED: "training leaves it out: it cannot be a conversation",
    ROLES: "training leaves it out: human and gpt do not take turns",
    UNANSWERED: "training leaves it out: no turn has an answer",
    EMPTY_LABELS: "training leaves it out: no token of it would be trained",
    MISSING: "training leaves it out: there is no such file, in exact case",
    NOT_A_PICTURE: "training leaves it out: the file is no JPEG, PNG, WEBP, GIF or BMP",
    CORRUPT: "training leaves it out: the picture does not decode to its end",
    OVERSIZE: "training leaves it out: it is beyond a limit of data.max_...",
    DEADLY: "the process that decoded it ended or never did, twice",
}
"""What training would not take -> why."""

NOTES = {
    "empty answers": "its questions are left out",
    "unanswered question": "the last question has no answer, and is left out",
    "leading answer": "an answer comes before any question, and is left out",
    **TAG_NOTES,
    "trained as a conversation": "independent turns are not possible with pictures in later turns",
    "mismatch": "the original's label mask fails, and it trains on nothing of it",
    TOO_LONG: "it is cut at the limit",
    CUT_PICTURE: "the limit falls on a picture or before one, which is then not shown",
    EXTENSION: "the file is a picture, but of another format than its name says",
    DOUBLE_RECORD: "the same pictures and turns as a record before",
    DOUBLE_PICTURE: "the same bytes as another file",
    ALIKE: "other bytes, but the same picture in small",
    SEEN_PICTURE: "a picture of what --against names, or one that looks the same",
    SEEN_QUESTION: "a question of eight words or more that is in what --against names",
}
"""What training takes, and a person should know of -> what comes of it."""

_SUFFIXES = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG"}
_SUFFIXES |= {"webp": "WEBP", "gif": "GIF", "bmp": "BMP"}
_OF_CODE = {"unknown_format": NOT_A_PICTURE, "empty": NOT_A_PICTURE, "not_found": MISSING}
_OF_CODE |= {"not_a_file": MISSING, "unreadable": MISSING, "damaged": CORRUPT, "no_size": CORRUPT}


_OF_TEXT = {"do not alternate": ROLES, "no turn has an answer": UNANSWERED}
_OF_TEXT |= {"there is nothing to train": EMPTY_LABELS}


class Finding(NamedTuple):
    """Something about a record or a picture. kind: of BAD or NOTES; detail: one line."""

    kind: str
    detail: str


# A record -----------------------------------------------------------------------------------------


class OfRecord(NamedTuple):
    """What is found in a record, and a digest of what it trains."""

    id: str
    images: tuple[str, ...]
    digest: bytes
    findings: list[Finding]


def record_job(
    make: ExampleMaker, file: str
) -> Callable[[Sequence[tuple[int, Any]]], list[OfRecord]]:
    """A job of llava_jax.processes: (index, record) of many to what is found in each."""
    whole = ExampleMaker(**{**_settings(make), "max_length": None})

    def of(index: int, record: Any) -> OfRecord:
        name = record_id(record, index)
        try:
            turns, images = check_record(record, f"{file}[{index}]")
        except SampleError as e:
            where = record_name(record, f"{file}[{index}]")
            detail = e.message.removeprefix(f"sample {where}: ")
            return OfRecord(name, (), b"", [Finding(MALFORMED, detail)])
        digest = hashlib.blake2b(repr((images, turns)).encode("utf-8", "replace"), digest_size=12)
        return OfRecord(name, images, digest.digest(), _in_record(record, name, make, whole))

    return lambda chunk: [of(index, record) for index, record in chunk]


def _settings(make: ExampleMaker) -> dict[str, Any]:
    names = ("max_length", "image_tokens", "turns", "compat", "use_im_start_end", "tokenizer")
    return {name: getattr(make, name) for name in names} | {"version": make.version.name}


def _in_record(
    record: Mapping[str, Any], name: str, make: ExampleMaker, whole: ExampleMaker
) -> list[Finding]:
    found, limit = [], make.max_length
    try:
        full = whole(record, name)
        cut = full.truncated(limit, make.image_tokens)
        if TRUNCATED in cut.notes and full.turns is not None:
            cut = make(record, name)  # independent turns that do not fit are left out
        for note, count in cut.notes.items():
            if note not in (TRUNCATED, LEFT_OUT):
                found.append(Finding(note, f"{count} times" if count > 1 else ""))
        length = full.length(make.image_tokens)
        if cut.length(make.image_tokens) < length:
            found.append(Finding(TOO_LONG, f"{length:,} positions, and the limit is {limit:,}"))
            if lost := _lost_pictures(full, cut, limit or 0, make.image_tokens):
                found.append(Finding(CUT_PICTURE, lost))
        if not make.compat:
            check_trained(cut, limit)
    except LlavaError as e:
        text = e.message.removeprefix(f"sample {name}: ")
        kind = next((kind for words, kind in _OF_TEXT.items() if words in text), MALFORMED)
        found.append(Finding(kind, text))
    return found


def _lost_pictures(full: Example, cut: Example, limit: int, image_tokens: int) -> str:
    """Which of its pictures the limit takes, in words; "" for none."""
    if len(cut.images) == len(full.images):
        return ""
    ends = np.cumsum(np.where(full.ids == IMAGE_TOKEN, image_tokens, 1))
    slots = ends[full.ids == IMAGE_TOKEN]
    through = bool(((slots - image_tokens < limit) & (limit < slots)).any())
    words = f"{len(full.images) - len(cut.images)} of {len(full.images)} pictures are not shown"
    return f"position {limit:,} is inside of a picture: {words}" if through else words


# A picture ----------------------------------------------------------------------------------------


class OfPicture(NamedTuple):
    """What is found in a picture. digest: of its bytes. look: of it in small; b"" says nothing."""

    path: str
    digest: bytes
    look: bytes
    findings: list[Finding]


def picture_job(
    folder: str, limits: Limits
) -> Callable[[Sequence[str]], tuple[list[OfPicture], int]]:
    """A job of llava_jax.processes: paths below a folder to what is found; and the process's peak, MB."""

    warnings.simplefilter("ignore")  # of Pillow, in a process of our own: the finding says it

    def work(paths: Sequence[str]) -> tuple[list[OfPicture], int]:
        return [of_picture(folder, path, limits) for path in paths], peak_mb()

    return work


def of_picture(folder: str, path: str, limits: Limits) -> OfPicture:
    """What is found in one picture, which is decoded as training would."""
    full = storage.join(folder, path)
    try:
        data = storage.read(full, limits.max_bytes + 1)
        digest = hashlib.blake2b(data, digest_size=12).digest()
        image = open_image(data, limits, path)
    except ImageError as e:
        text = e.message.removeprefix(f"{path}: ") + (f" ({e.fix})" if e.fix else "")
        return OfPicture(path, b"", b"", [Finding(_OF_CODE.get(e.code, OVERSIZE), text)])
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        return OfPicture(path, b"", b"", [Finding(MISSING, why)])
    found, kind = [], format_of(data)
    said = path.rpartition(".")[2].lower()
    if _SUFFIXES.get(said) != kind:
        found.append(Finding(EXTENSION, f"it is a {kind}"))
    return OfPicture(path, digest, look_of(image), found)


def look_of(image: Image.Image) -> bytes:
    """144 bits: which neighbours are brighter in the picture at 9 x 9; b"" for plain colours and slopes.

    The difference hash of image search: another encoding or size changes few bits, another crop many.
    """
    small = np.asarray(image.convert("L").resize((9, 9), Image.Resampling.BOX), np.int16)
    bits = [np.diff(small, axis=axis).ravel() > 0 for axis in (0, 1)]
    if not all(8 <= side.sum() <= len(side) - 8 for side in bits):  # they would all look alike
        return b""
    return np.packbits(np.concatenate(bits)).tobytes()


class Looks:
    """Finds pictures that look alike: looks that differ in at most CLOSE bits and share a quarter."""

    CLOSE = 10

    def __init__(self) -> None:
        self._quarters: list[dict[int, list[int]]] = [{}, {}, {}, {}]
        self._looks: list[int] = []
        self._names: list[str] = []

    def find(self, look: bytes) -> str | None:
        """The name of a picture that looks the same; None for none, or if `look` says nothing."""
        value = int.from_bytes(look, "big")
        for quarter, known in zip(self._cut(value), self._quarters if look else ()):
            for at in known.get(quarter, ()):
                if (self._looks[at] ^ value).bit_count() <= self.CLOSE:
                    return self._names[at]
        return None

    def add(self, look: bytes, name: str) -> None:
        """Takes a picture."""
        if look:
            value = int.from_bytes(look, "big")
            for quarter, known in zip(self._cut(value), self._quarters):
                known.setdefault(quarter, []).append(len(self._looks))
            self._looks.append(value)
            self._names.append(name)

    @staticmethod
    def _cut(value: int) -> list[int]:
        return [value >> 36 * n & (1 << 36) - 1 for n in range(4)]


def peak_mb() -> int:
    """The most memory that this process had at a time, in MB."""
    try:  # ru_maxrss would begin at what the process that started this one had
        status = Path("/proc/self/status").read_text()
        return -(-int(status.partition("VmHWM:")[2].split()[0]) * 1024 // 1_000_000)
    except (OSError, IndexError):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, else KiB
        return -(-resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 1_000_000)
