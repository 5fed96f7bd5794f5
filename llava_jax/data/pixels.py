"""From an image path to the tower's pixels: the gate, preprocessing, a cache, augmentation."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax import storage
from llava_jax.config import LlavaConfig
from llava_jax.data.stored import Packed
from llava_jax.errors import ImageError
from llava_jax.images import resample
from llava_jax.images.decode import DEFAULT_LIMITS, Limits, open_pixels, refusal
from llava_jax.images.pixels import to_pixels

SHIFT = 4  # pixels that the augmentations move a picture by, at most
Random = np.random.RandomState | np.random.Generator


class Cache:
    """Keeps what it is given until `capacity` bytes are used; shared by threads."""

    def __init__(self, capacity: int):
        self._capacity, self._used = capacity, 0
        self._items: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: Any) -> Any:
        """The item, or None."""
        return self._items.get(key)

    def put(self, key: Any, item: Any, size: int) -> None:
        """Keeps `item` of `size` bytes if there is room."""
        with self._lock:
            if key not in self._items and self._used + size <= self._capacity:
                self._items[key] = item
                self._used += size


class ImageStore:
    """Pixels of the images below a folder or address, decoded once if they fit into `cache`."""

    def __init__(
        self,
        folder: str | Path,
        config: LlavaConfig,
        cache: Cache,
        limits: Limits = DEFAULT_LIMITS,
    ):
        self._folder, self._config, self._cache = folder, config, cache
        self._limits = limits
        if config.vision.image_size >= 224:  # of photographs: compiled now, not at a step's first
            resample.is_fast()

    def pixels(self, path: str, row: int = 0, k: int = 0) -> np.ndarray:
        """uint8[H, W, 3], not to be written to. Raises ImageError, which names the relative path.

        row, k: which record of its file shows it, as which of its pictures; packed data want to know.
        """
        key = (self._folder, path)
        found = self._cache.get(key)
        if found is None:
            found = self._load(path, row, k)
            size = 300 if isinstance(found, ImageError) else found.nbytes + 200
            self._cache.put(key, found, size)
        if isinstance(found, ImageError):
            raise ImageError(found.message, code=found.code, fix=found.fix)
        return found

    def _load(self, path: str, row: int, k: int) -> np.ndarray | ImageError:
        try:
            source = self._source(path, row, k)
            return to_pixels(open_pixels(source, self._limits, path), self._config)
        except ImageError as e:
            fix = e.fix and e.fix.replace("is max_", "is data.max_")  # its setting here
            return ImageError(e.message, code=e.code, fix=fix)

    def _source(self, path: str, row: int, k: int) -> Any:
        return storage.source(storage.join(self._folder, path))


class PackedImages(ImageStore):
    """Pixels of the pictures of packed data."""

    def __init__(self, path: str, config: LlavaConfig, cache: Cache, limits: Limits):
        super().__init__(path, config, cache, limits)
        self._packed = Packed(path)

    def _source(self, path: str, row: int, k: int) -> bytes:
        if data := self._packed.picture(row, k):
            return data
        raise refusal("not_found", path)


def augment(pixels: np.ndarray, rule: str, rng: Random) -> np.ndarray:
    """uint8[H, W, 3] moved by up to SHIFT pixels, edges repeated; "flip_shift4" mirrors half as well.

    Meant for small pictures whose answers do not name a side. The rule "" changes nothing.
    """
    if not rule:
        return pixels
    down, right, mirror = rng.random(3)
    down, right = int(down * (2 * SHIFT + 1)) - SHIFT, int(right * (2 * SHIFT + 1)) - SHIFT
    if rule == "flip_shift4" and mirror < 0.5:
        pixels = pixels[:, ::-1]
    height, width = pixels.shape[:2]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return pixels[rows[:, None], columns]
