"""A PNG without the texts that are too long for Pillow, which refuses the whole picture over them.

Editors and renderers keep prompts, histories and profiles in text chunks; no pixel depends on one.
Format: the PNG specification (W3C, third edition), 5.3 and 11.3.3. A chunk is a length, a name of four
letters, that many bytes and their CRC.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

_START = 8  # bytes of the signature
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_long_texts(data: bytes) -> bytes:
    """`data`, a PNG, without text and profile chunks larger than Pillow takes; itself if it has none.

    What Pillow takes stays, since orientations may stand in texts; what is damaged stays, for Pillow
    to refuse. At most MAX_TEXT_MEMORY bytes are decompressed, MAX_TEXT_CHUNK at a time.
    """
    from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

    budget = MAX_TEXT_MEMORY
    dropped: list[tuple[int, int]] = []
    for start, end in _chunks(data):
        name, body = data[start + 4 : start + 8], memoryview(data)[start + 8 : end - 4]
        crc = int.from_bytes(data[end - 4 : end])
        if name not in _TEXTS or zlib.crc32(body, zlib.crc32(name)) != crc:
            continue
        size, fits = _text_size(name, bytes(body), MAX_TEXT_CHUNK if budget > 0 else 0)
        budget -= size
        if not fits or budget < 0:
            dropped.append((start, end))
    if not dropped:
        return data
    starts = [0, *(end for _, end in dropped)]
    ends = [*(start for start, _ in dropped), len(data)]
    return b"".join(data[start:end] for start, end in zip(starts, ends))


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk that is whole."""
    start = _START
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if end > len(data):
            return
        yield start, end
        start = end


def _text_size(name: bytes, body: bytes, limit: int) -> tuple[int, bool]:
    """(bytes that a text takes once decompressed, up to `limit`; whether that is all of it)."""
    if name == b"tEXt":
        return len(body), True
    packed = _packed(name, body)
    if packed is None:
        return len(body), True
    if not limit:
        return 0, False
    unpack = zlib.decompressobj()
    try:
        size = len(unpack.decompress(packed, limit))
    except zlib.error:  # Pillow treats it as an empty text
        return 0, True
    return size, not unpack.unconsumed_tail


def _packed(name: bytes, body: bytes) -> bytes | None:
    """The compressed part of a chunk, None if it has none."""
    rest = body.partition(b"\0")[2]  # after the keyword or the profile's name
    if name == b"iTXt":
        if rest[:1] == b"\0" or rest[1:2] != b"\0":  # whether it is compressed, and how
            return None
        return rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after language and keyword
    return rest[1:]  # after the method
