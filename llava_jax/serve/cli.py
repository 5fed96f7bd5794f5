"""`llava-jax serve`: a model behind OpenAI's API, on this machine unless told otherwise."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from pathlib import Path

from llava_jax.errors import ConfigError
from llava_jax.settings import (
    SERVING,
    ImageLimits,
    ServeSettings,
    add_loading_options,
    add_options,
    loading_options,
    rows,
)
from llava_jax.util import need

KEY = "LLAVA_JAX_API_KEY"
LIMITS = rows(ImageLimits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--model", default="tiny", help="checkpoint folder or hub id (default: tiny)"
    )
    parser.add_argument("--name", help="what clients call it (default: the last part of --model)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send (default: ${KEY}, or one is made)"
    )
    loading = add_loading_options(parser)
    loading.add_argument(
        "--template", metavar="NAME", help="conversation template (default: the model's)"
    )
    add_options(parser.add_argument_group("limits"), SERVING, SERVING)
    add_options(parser.add_argument_group("image limits"), LIMITS, LIMITS)


def run(args: argparse.Namespace, *, demo: bool = False) -> int:
    """Runs the command, until SIGTERM or Ctrl-C. Raises LlavaError for what cannot be used.

    demo: with the chat page at /.
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        need(module, "to serve", "llava_jax[serve]")
    from llava_jax.images.decode import Limits
    from llava_jax.serve.fetch import Fetcher
    from llava_jax.serve.server import listen

    given = vars(args)
    settings = ServeSettings(**{name: given[name] for name in SERVING if name in given})
    limits = Limits(**{name: given[name] for name in LIMITS if name in given})
    Fetcher(settings.allow_urls, settings.url_seconds, 1)  # its checks
    key, made = api_key(args.api_key)
    name, loading = args.name or Path(args.model).name or "model", loading_options(args)
    if name in loading["adapters"]:
        raise ConfigError(
            f"model and adapter are both called {name!r}", fix="--name names the model"
        )
    sock = listen(args.host, args.port)  # before minutes of loading
    host, port = sock.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if host not in ("127.0.0.1", "::1"):
        print("others reach this server: put one that speaks https in front of it", file=sys.stderr)
    print(f"loading {args.model} ...", flush=True)

    from llava_jax.generate.compile_cache import use_compile_cache
    from llava_jax.model import load
    from llava_jax.serve.app import build_app
    from llava_jax.serve.server import serve
    from llava_jax.serve.worker import Worker

    start = time.monotonic()
    use_compile_cache()
    model = load(
        args.model,
        **loading,
        limits=limits,
        template=args.template,
    )
    worker = Worker(model, settings)

    def ready() -> None:
        seconds = time.monotonic() - start
        beside = f" (with {', '.join(loading['adapters'])})" if loading["adapters"] else ""
        print(f"{name}{beside} answers at {url}/v1 after {seconds:.0f} s", flush=True)

    worker.on_ready = ready
    if made:
        print(f"API key, made for this run: {key}", flush=True)
    if demo:
        print(f"the page: {url}/{f'#key={key}' if made else ' (it asks for your key)'}", flush=True)
    serve(build_app(worker, name, key, page=demo), worker, sock)
    return 0


def api_key(given: str | None) -> tuple[str, bool]:
    """(the key, whether it was made here). Raises ConfigError for one that no header can hold."""
    key = given if given is not None else os.environ.get(KEY, "")
    if given == "":
        raise ConfigError("--api-key is empty", fix="leave it out, and one is made")
    if not all("!" <= c <= "~" for c in key):
        raise ConfigError("the API key has characters other than visible ASCII ones")
    return (key, False) if key else (secrets.token_urlsafe(24), True)
