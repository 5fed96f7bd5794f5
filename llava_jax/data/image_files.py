"""Whether the images of a data set are files, found out before a model is loaded."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_jax import storage
from llava_jax.data.bad import Bad, TooManyBad, bad_sample
from llava_jax.errors import SampleError

MOSTLY = 0.9
"""Part of a folder's images that must be missing for the folder itself to be called wrong."""

Images = tuple[str, ...]
"""The paths of a record's images."""

_NO_FILE = "the image file does not exist"
NOT_PACKED = "missing when the data were packed"


def missing_images(images: Sequence[Images], folders: Sequence[str]) -> dict[int, str]:
    """{index in `images`: full path of its first image that is not a file}; names in exact case.

    images: the paths of each record; folders: the image folder of each. A folder is listed once.
    """
    listed: dict[tuple[str, str], Callable[[str], bool]] = {}
    missing: dict[int, str] = {}
    for n, (paths, folder) in enumerate(zip(images, folders)):
        for path in paths:
            head, _, name = path.rpartition("/")
            holds = listed.get((folder, head))
            if holds is None:
                holds = listed[folder, head] = _files_in(storage.join(folder, head))
            if not holds(name):
                missing[n] = _full(folder, path)
                break
    return missing


def _files_in(folder: str) -> Callable[[str], bool]:
    """Whether a name is that of a file in `folder`, which is listed once."""
    remote = storage.is_address(folder)
    try:
        return storage.files_in(folder).__contains__
    except FileNotFoundError:
        return lambda name: False
    except PermissionError:  # a folder that may be entered but not listed
        if remote:  # a request for each image would take hours: training says which are not there
            return lambda name: True
        return lambda name: os.path.isfile(os.path.join(folder, name))
    except (OSError, ValueError) as error:
        if remote:
            raise SampleError(f"{folder}: cannot be listed ({error})") from error
        return lambda name: False  # ValueError: a null byte or half a surrogate pair in the name


def _full(folder: str, path: str) -> str:
    full = storage.join(folder, path)
    return full if storage.is_address(full) else os.path.abspath(full).replace("\0", "")


def missing_image(index: int, sample_id: str, path: str) -> Bad:
    """A Bad for the image at full `path`, which is not a file."""
    folder = os.path.dirname(path)
    if os.path.exists(path) and not os.path.isfile(path):
        return bad_sample(index, sample_id, f"{path}: a folder, pipe or device", kind=_NO_FILE)
    if storage.is_folder(folder):
        return bad_sample(index, sample_id, f"{path}: the file does not exist", kind=_NO_FILE)
    kind = f"the folder {folder} does not exist"
    return bad_sample(index, sample_id, f"{path}: {kind}", kind=kind)


def unpacked_image(index: int, sample_id: str, path: str) -> Bad:
    """A Bad for the image at `path` of its folder, which was not there when the data were packed."""
    fix = "add the picture and run the same llava-jax data pack again"
    return bad_sample(index, sample_id, f"{path}: {NOT_PACKED}", kind=NOT_PACKED, fix=fix)


def refuse_wrong_folder(
    images: Sequence[Images], folders: Sequence[str], missing: dict[int, str]
) -> None:
    """Raises TooManyBad, naming folder and path, where a folder lacks (nearly) all its images.

    missing: of `missing_images` for the same images, none of packed data, and folders.
    """
    shown = defaultdict(list)  # folder -> indices of its records with images
    for n, folder in enumerate(folders):
        if images[n]:
            shown[folder].append(n)
    for folder, indices in shown.items():
        lost = [n for n in indices if n in missing]
        if len(lost) < MOSTLY * len(indices):
            continue
        path, full = images[lost[0]][0], missing[lost[0]]
        what = "none" if len(lost) == len(indices) else f"only {len(indices) - len(lost):,}"
        where = f"{folder!r} holds" if folder else "is empty, and the current folder holds"
        better = _folder_with(path, folder)
        raise TooManyBad(
            f"data.image_folder {where} {what} of the images of {len(indices):,} samples; "
            f"looked for {full}",
            fix=f"set data.image_folder={better}"
            if better
            else f"set data.image_folder to the folder that {path} is below",
        )


def _folder_with(path: str, folder: str) -> str | None:
    """A folder close to `folder` in which `path` is a file."""
    if storage.is_address(folder):
        return None
    base = Path(folder or ".").absolute()
    try:
        below = sorted(p for p in base.iterdir() if p.is_dir())[:100] if base.is_dir() else []
    except OSError:
        below = []
    return next((str(near) for near in (base.parent, *below) if os.path.isfile(near / path)), None)
