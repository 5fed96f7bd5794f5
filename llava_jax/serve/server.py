"""Sockets, signals and the order of the end: no new requests, answers finish, then the engine stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.serve.worker import Worker

logger = logging.getLogger(__name__)
_FAREWELL = 5  # seconds for the words of refusal; then uvicorn cuts connections off


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address is taken or not of this machine."""
    if not 0 <= port < 2**16:  # some systems take a larger one modulo 65,536
        raise ConfigError(f"port is {port}, but must be from 0 to 65,535", fix="--port 8000")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1024)
        return sock
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen at {host}:{port}: {why}", fix="--port names another"
        ) from None


def make_server(app: Any, worker: Worker) -> Any:
    """A uvicorn server that ends by SIGTERM or Ctrl-C as one that did what it was asked to.

    Answers that are under way have settings.grace_seconds for their end, and are then refused in words.
    """
    import uvicorn

    grace = worker.settings.grace_seconds

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            late = asyncio.get_running_loop().call_later(grace, worker.end_answers)
            try:
                await super().shutdown(sockets)
            finally:
                late.cancel()

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # uvicorn's own would raise the signal again at the end, and the process would die of it.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            signals = (signal.SIGTERM, signal.SIGINT)
            before = {s: signal.signal(s, self.handle_exit) for s in signals}
            try:
                yield
            finally:
                for s, handler in before.items():
                    signal.signal(s, handler)

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=grace + _FAREWELL,
    )
    return Server(config)


def serve(app: Any, worker: Worker, sock: socket.socket) -> None:
    """Serves until a signal comes, and finishes what runs."""
    worker.start()
    try:
        make_server(app, worker).run(sockets=[sock])
    finally:
        worker.stop()
