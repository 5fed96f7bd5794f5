"""The image gate against hostile and odd files made here, and against the shared corpus."""

import base64
import os
import re
import struct
import tempfile
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, ImageError
from llava_jax.images.decode import (
    CODES,
    Limits,
    decode_data_uri,
    open_image,
    refuse_address,
)
from llava_jax.images.pixels import normalize, to_pixels
from tests.conftest import json_lines, shared

# No digits before: 100x600000 is a size.
ADDRESS = re.compile(r"(?<![0-9A-Za-z])0x[0-9a-fA-F]{6,}|<_io|/tmp|/work|Traceback|object at")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            *chunks,
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        ]
    )


def rle_bmp(width: int, height: int, body: bytes) -> bytes:
    start = 14 + 40 + 1024
    size = start + len(body)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, start) + info + bytes(1024) + body


def webp_header(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans(times: int) -> bytes:
    """A progressive JPEG whose last pass over the picture is repeated."""
    data = encoded(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * times + b"\xff\xd9"


def code_of(source, **options) -> str:
    with pytest.raises(ImageError) as refused:
        open_image(source, **options)
    error = refused.value
    assert not ADDRESS.search(str(error)), str(error)
    assert "\n" not in str(error)
    assert CODES[error.code] in str(error)
    return error.code


HOSTILE = {
    "nothing": (b"", "empty"),
    "text": (b"GIF? no, only words", "unknown_format"),
    "tiff": (encoded(picture(), "TIFF"), "unknown_format"),
    "ico": (encoded(picture(), "ICO"), "unknown_format"),
    "ppm": (encoded(picture(), "PPM"), "unknown_format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),
    "bare magic": (b"\xff\xd8\xff", "damaged"),
    "bare png magic": (b"\x89PNG\r\n\x1a\n", "damaged"),
    "bare webp magic": (b"RIFF\x04\0\0\0WEBP", "damaged"),
    "no width": (png(0, 5), "damaged"),
    "51 MP": (png(8000, 6400), "too_many_pixels"),
    "182 MP": (png(13500, 13500), "too_many_pixels"),
    "2^62 pixels": (png(2**31 - 1, 2**31 - 1), "too_many_pixels"),
    "webp 16384 x 16384": (webp_header(16384, 16384), "too_many_pixels"),
    "webp too long": (webp_header(9000, 10), "side_too_long"),
    "1 x 65535": (png(1, 65535, rows=bytes(4 * 65535)), "side_too_long"),
    "8193 x 1": (png(8193, 1, rows=bytes(3 * 8193 + 1)), "side_too_long"),
    "compressed text of 70 MB": (
        png(4, 4, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70 * 2**20)))),
        "damaged",
    ),
    "slow run-length bmp": (rle_bmp(7000, 7000, b"\0\1"), "too_costly"),
    "progressive with 900 scans": (many_scans(900), "too_costly"),
    "large webp": (encoded(Image.new("RGB", (5000, 4000)), "WEBP", method=0), "too_costly"),
    "half a jpeg": (encoded(picture(300, 200), "JPEG")[:5000], "damaged"),
    "half a gif": (encoded(picture(300, 200), "GIF")[:9000], "damaged"),
    "half a webp": (encoded(picture(300, 200), "WEBP")[:2000], "damaged"),
    "half a bmp": (encoded(picture(300, 200), "BMP")[:2000], "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused_by_code(case):
    data, code = HOSTILE[case]
    begin = time.process_time()
    assert code_of(data) == code
    assert time.process_time() - begin < 2.0


def test_every_code_is_one_line_of_plain_words():
    for code, text in CODES.items():
        assert re.fullmatch(r"[a-z0-9_]+", code)
        assert re.fullmatch(r"[\w ,]+", text)


def test_byte_limit_counts_before_decoding(tmp_path):
    data = encoded(picture())
    limits = Limits(max_bytes=len(data) - 1)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source in (data, path, BytesIO(data)):
        assert code_of(source, limits=limits) == "too_many_bytes"
    assert open_image(data, Limits(max_bytes=len(data))).size == (40, 30)


def test_limits_are_settings():
    wide = encoded(Image.new("RGB", (9000, 20)))
    with pytest.raises(ImageError, match=r"longer on one side .* \(the limit is max_side 8,192\)"):
        open_image(wide)
    assert open_image(wide, Limits(max_side=9000)).size == (9000, 20)
    for name, code in {
        "max_bytes": "too_many_bytes",
        "max_pixels": "too_many_pixels",
        "max_side": "side_too_long",
        "max_decode_bytes": "too_costly",
        "max_decode_work": "too_costly",
    }.items():
        with pytest.raises(ImageError, match=f"the limit is {name} 9\\)") as refused:
            open_image(encoded(picture()), Limits(**{name: 9}))
        assert refused.value.code == code


@pytest.mark.parametrize("value", [0, -1, "8192", True, None, float("nan")])
def test_a_limit_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_side is .*(not a whole number|must be at least 1)"):
        Limits(max_side=value)


def test_more_pixels_than_pillow_opens_are_refused_as_a_limit():
    with pytest.raises(
        ConfigError, match="max_pixels is 200000000, but must be from 1 to 178,956,970"
    ):
        Limits(max_pixels=200_000_000)


def test_a_hundred_megapixels_where_they_are_allowed(recwarn):
    data = encoded(Image.new("L", (10_000, 10_000)))
    limits = Limits(max_side=10_000, max_pixels=100_000_000, max_decode_bytes=2**30)
    assert open_image(data, limits).size == (10_000, 10_000)
    assert not recwarn.list


def test_files_that_are_not_there_or_not_files(tmp_path):
    assert code_of(tmp_path / "none.png") == "not_found"
    assert code_of(tmp_path) == "not_a_file"
    assert code_of("a\0b") == "unreadable"
    os.mkfifo(tmp_path / "pipe")  # reading it would block for ever
    assert code_of(tmp_path / "pipe") == "not_a_file"
    assert code_of(BytesIO(), name="image 2") == "empty"


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/a.png",
        "HTTP://example.com/x/a.png?size=9#top",
        "s3://bucket/a.png",
        "file://server/share/a.png",
        Path("https://example.com/a.png"),  # which is https:/example.com/a.png
    ],
)
def test_addresses_are_named_as_such(address):
    assert code_of(address) == "address"
    with pytest.raises(
        ImageError, match=r"^a\.png: addresses are not fetched \(download it first\)$"
    ):
        open_image(address)
    with pytest.raises(ImageError, match="^sample 7: addresses"):
        refuse_address(str(address), "sample 7")


def test_files_may_be_named_in_other_ways(tmp_path, monkeypatch):
    (tmp_path / "a b.png").write_bytes(encoded(picture()))
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = (tmp_path / "a b.png").as_uri()
    assert "%20" in uri
    for name in (
        "~/a b.png",
        uri,
        uri.replace("file://", "FILE://localhost"),
        uri.replace("file://", "file:"),
    ):
        assert open_image(name).size == (40, 30)
    for name in ("a:b.png", "C://a.png", "~nobody-here/a.png", "https.png"):
        assert code_of(name) == "not_found"
        refuse_address(name)


def test_a_folder_is_named_as_such(tmp_path):
    with pytest.raises(ImageError, match=r"not a regular file \(it is a folder: name a file in it"):
        open_image(tmp_path)


def test_the_message_names_the_image_but_not_its_folder(tmp_path):
    with pytest.raises(ImageError, match=r"^none\.png: the file does not exist$"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match=r"^image 2: there are no bytes$"):
        open_image(b"", name="image 2")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_each_format_is_told_by_content(kind, tmp_path):
    path = tmp_path / "wrong.name"
    path.write_bytes(encoded(picture(), kind))
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    other = tuple(f for f in Limits().formats if f != kind)
    assert code_of(path, limits=Limits(formats=other)) == "unknown_format"


def test_every_mode_becomes_the_same_rgb_as_convert():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        source = picture(mode="L").convert("I;16") if mode == "I;16" else picture(mode=mode)
        data = encoded(source)
        expected = Image.open(BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_alpha_is_dropped():
    clear = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert open_image(encoded(clear)).getpixel((0, 0)) == (200, 100, 50)


def test_exif_turns_only_when_asked():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(picture(), "PNG", exif=exif)
        assert open_image(data).size == (40, 30)
        turned = open_image(data, exif=True)
        assert turned.size == ((30, 40) if orientation >= 5 else (40, 30))
    exif[0x0112] = 6
    turned = open_image(encoded(picture(), "PNG", exif=exif), exif=True)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(picture()), -1))


def test_only_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_data_uris():
    data = encoded(picture())
    text = base64.b64encode(data).decode()
    assert decode_data_uri(f"data:image/png;base64,{text}") == data
    assert decode_data_uri(f"DATA:image/x;charset=utf-8;base64,{text}") == data
    for uri, code in {
        "https://example.com/a.png": "bad_data_uri",
        "file:///etc/passwd": "bad_data_uri",
        "data:text/html;base64,AAAA": "bad_data_uri",
        "data:image/png,AAAA": "bad_data_uri",
        "data:image/png;base64,": "empty",
        "data:image/png;base64,A!AA": "bad_base64",
        "data:image/png;base64,AAA": "bad_base64",
        "data:image/png;base64,é": "bad_base64",
    }.items():
        with pytest.raises(ImageError) as refused:
            decode_data_uri(uri)
        assert refused.value.code == code, uri
    with pytest.raises(ImageError, match="larger than allowed"):
        decode_data_uri("data:image/png;base64," + "A" * 16, Limits(max_bytes=8))


def test_flipped_bits_never_raise_anything_else():
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encoded(picture(64, 48), kind)
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.integers(1, 6)):
                broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
            assert attempt(bytes(broken)) in {"RGB", *CODES}


def attempt(source) -> str:
    """The mode of the opened image, or the code of the refusal, whose text must be clean."""
    try:
        return open_image(source).mode
    except ImageError as e:
        said = str(e).replace(source.name, "") if isinstance(source, Path) else str(e)
        if ADDRESS.search(said):
            pytest.fail(f"{source!r:.80}: the message leaks: {e}")
        return e.code


def corpus() -> list[dict]:
    return json_lines(shared("bad-images/manifest.jsonl"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_corpus_of_bad_images():
    """Every verdict, colour, time and memory growth of the shared corpus."""
    psutil = pytest.importorskip("psutil")
    folder, config, process = shared("bad-images"), LlavaConfig(), psutil.Process()
    rows, before = corpus(), set(os.listdir(tempfile.gettempdir()))
    assert rows
    to_pixels(Image.new("RGB", (300, 300)), config)  # numba compiles once for all pictures
    for row in rows:
        memory, begin = process.memory_info().rss, time.process_time()
        verdict = attempt(folder / row["file"])
        if verdict == "RGB":
            image = open_image(folder / row["file"])
            for ratio in ("pad", "square"):
                pixels = to_pixels(image, LlavaConfig(image_aspect_ratio=ratio))
                assert pixels.shape == (336, 336, 3)
                values = normalize(pixels, config.vision.image_mean, config.vision.image_std)
                assert np.isfinite(values).all()
        assert time.process_time() - begin <= row["max_seconds"], row["file"]
        growth = (process.memory_info().rss - memory) / 2**20
        assert growth <= row["max_rss_growth_mb"], (row["file"], growth)
        assert row["expect"] in ("ok" if verdict == "RGB" else "reject", "either"), row["file"]
        if verdict == "RGB" and "stored" in row:  # absent where Pillow refuses: a text of 70 MB
            assert image.size == tuple(row["stored"]["size"]), row["file"]
            mean = np.asarray(image).reshape(-1, 3).mean(axis=0)
            assert np.abs(mean - row["mean_rgb_first_frame_no_exif"]).max() <= 3, row["file"]
    assert not {f for f in set(os.listdir(tempfile.gettempdir())) - before if "PIL" in f}


def test_corpus_orientations_swap_the_sides():
    folder = shared("bad-images")
    for row in corpus():
        if row["expect"] == "ok" and row["stored"].get("exif_orientation") in (5, 6, 7, 8):
            width, height = row["stored"]["size"]
            assert open_image(folder / row["file"], exif=True).size == (height, width)


def test_a_data_uri_is_opened_as_such():
    uri = "DATA:image/png;base64," + base64.b64encode(encoded(picture())).decode()
    assert np.array_equal(np.asarray(open_image(uri)), np.asarray(picture()))
    with pytest.raises(ImageError) as caught:
        open_image("data:image/png;base64,iVBOR")
    assert caught.value.code == "bad_base64"


def test_a_long_name_is_shortened():
    """Base64 that is no data URI is taken for a file name."""
    with pytest.raises(ImageError) as caught:
        open_image("iVBORw0KGgo" * 100_000)
    assert caught.value.message.startswith("iVBORw0KGgo")
    assert len(str(caught.value)) < 200


def test_an_empty_name_is_no_folder():
    with pytest.raises(
        ImageError, match=r"'': the file does not exist \(an empty file name was given"
    ):
        open_image("")
