"""`llava-jax demo`: the server with a chat page at /, a client of the API like any other.

The page is static and needs no other file and no network. Its key stands behind # in the link that
the command prints, which browsers keep to themselves; the page holds it for its tab.
"""

from __future__ import annotations

import argparse
import base64
import io
from importlib import resources
from typing import TYPE_CHECKING, Any

from llava_jax.serve import cli

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options: those of `serve`."""
    cli.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command, until SIGTERM or Ctrl-C. Raises LlavaError for what cannot be used."""
    return cli.run(args, demo=True)


def files() -> dict[str, tuple[bytes, str]]:
    """{path: (content, media type)} of everything that the page loads; none of it needs a key."""
    found = {}
    for file in resources.files("llava_jax").joinpath("assets/demo").iterdir():
        kind = TYPES[f".{file.name.rpartition('.')[2]}"]
        kind += "; charset=utf-8" if kind.startswith("text/") else ""
        found[f"/demo/{file.name}"] = (file.read_bytes(), kind)
    found["/"] = found.pop("/demo/page.html")
    return found


def seen(model: LlavaModel, url: str) -> dict[str, Any]:
    """A data URI of what the vision tower is given for a picture, and its side in pixels.

    Raises ImageError.
    """
    from PIL import Image

    from llava_jax.images.decode import decode_data_uri

    pixels = model.pixels(decode_data_uri(url, model.limits), exif=True)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"url": f"data:image/png;base64,{data}", "side": len(pixels)}
