"""Pictures by address, from hosts that the operator named. Without any, nothing is ever asked.

What vLLM needed four rounds for (CVE-2025-6242, 2026-24779, 2026-25960): one reading of the address, no
library's second one; its host resolved once, and connected to at the address that was looked at; each
redirect checked as the first address was; bytes and time of a whole request bounded.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import urljoin

from llava_jax.errors import ConfigError
from llava_jax.serve.errors import ApiError

PORT, MOST_REDIRECTS, MOST_LENGTH, PIECE = 443, 3, 2048, 2**16
# No user, port of choice, backslash, space or letter beyond ASCII, on which parsers differ.
_ADDRESS = re.compile(r"https://([a-z0-9.-]+)(?::443)?((?:/[!$-\[\]_a-z~]*)?(?:\?[!$-\[\]_a-z~]*)?)",
    re.IGNORECASE)  # fmt: skip
_HOST = re.compile(r"(?!-)[a-z0-9-]+(\.[a-z0-9-]+)*")


class Fetcher:
    """hosts: names with commas between them. seconds, most: time and bytes of a request's pictures."""

    def __init__(self, hosts: str, seconds: float, most: int):
        self.hosts = frozenset(h.strip().lower() for h in hosts.split(",") if h.strip())
        self.seconds, self.most = seconds, most
        for host in self.hosts:
            if not _HOST.fullmatch(host):
                what = f"allow_urls has {host!r}, which is no name of a host"
                raise ConfigError(what, fix="--allow-urls images.example.org,cdn.example.org")

    def check(self, url: str, name: str) -> tuple[str, str]:
        """(host, path) of an address that may be asked; name: of the picture. Raises ApiError."""
        found = _ADDRESS.fullmatch(url.partition("#")[0]) if len(url) <= MOST_LENGTH else None
        if not self.hosts or not found:
            also = (
                " nor https://HOST/PATH" if self.hosts else ": addresses and paths are not opened"
            )
            raise _refused(f"{name} is not a data URI{also} (send data:image/...;base64,...)")
        host, path = found[1].lower(), found[2]
        if host not in self.hosts:
            raise _refused(f"{name}: pictures are not fetched from that host")
        return host, path if path.startswith("/") else f"/{path}"

    def get(self, urls: Mapping[str, int]) -> dict[str, bytes]:
        """The bytes behind {address: number of its picture}, in a thread that may wait. Raises ApiError."""
        end, left, found = time.monotonic() + self.seconds, self.most, {}
        for url, number in urls.items():
            found[url] = self._get(url, f"image {number}", end, left)
            left -= len(found[url])
        return found

    def _get(self, url: str, name: str, end: float, most: int) -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            host, path = self.check(url, name)
            try:
                with _reply(host, path, end) as reply:
                    if reply.status not in (301, 302, 303, 307, 308):
                        data = _body(reply, name, most)
                        if time.monotonic() >= end:  # what was cut off may look like an end
                            raise TimeoutError
                        return data
                    url = urljoin(url, reply.getheader("location", ""))
            except (OSError, http.client.HTTPException, ValueError):
                late = time.monotonic() >= end
                why = "it took too long to arrive" if late else "it could not be fetched"
                raise _refused(f"{name}: {why}") from None
        raise _refused(f"{name}: its address leads on more than {MOST_REDIRECTS} times")


@contextmanager
def _reply(host: str, path: str, end: float) -> Iterator[http.client.HTTPResponse]:
    """What a host replies, over a connection that is cut at `end`, whatever it waits for."""
    raw = connect(public_address(host), max(0.01, end - time.monotonic()))
    handle = raw.dup()  # TLS takes the socket itself over
    cut = threading.Timer(max(0, end - time.monotonic()), _shut, [handle])
    cut.daemon = True
    cut.start()
    try:
        link = http.client.HTTPConnection(host, PORT)  # it does not connect where it has a socket
        link.sock = tls().wrap_socket(raw, server_hostname=host)
        try:
            headers = {"User-Agent": "llava_jax", "Accept": "image/*", "Connection": "close"}
            link.request("GET", path, headers=headers)
            yield link.getresponse()
        finally:
            link.close()
    finally:
        cut.cancel()
        raw.close()
        handle.close()


def public_address(host: str) -> str:
    """The first of a host's addresses. Raises OSError unless all of them are of the open internet."""
    found = resolve(host)
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = [address, *filter(None, _inside(address))]
        if any(not a.is_global or a.is_multicast for a in inner):
            raise OSError("an address that is not global")
    return found[0]


def _inside(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> list:
    """IPv4 addresses that an IPv6 one stands for: mapped, 6to4, Teredo, NAT64."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    nat64 = address in ipaddress.ip_network("64:ff9b::/96")
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if nat64 else None
    return [address.ipv4_mapped, address.sixtofour, *(address.teredo or ()), last]


def resolve(host: str) -> list[str]:
    """A host's addresses, from the system."""
    rows = socket.getaddrinfo(host, PORT, type=socket.SOCK_STREAM)
    return [str(row[4][0]) for row in rows]


def connect(address: str, seconds: float) -> socket.socket:
    """A connection to an address, never a name."""
    return socket.create_connection((address, PORT), timeout=seconds)


def tls() -> ssl.SSLContext:
    """The system's authorities, and the host's name checked."""
    return ssl.create_default_context()


def _shut(raw: socket.socket) -> None:
    try:
        raw.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended
        return


def _body(reply: http.client.HTTPResponse, name: str, most: int) -> bytes:
    if reply.status != 200:
        raise _refused(f"{name}: its host replied with status {reply.status}")
    parts, size = [], 0
    while part := reply.read1(PIECE):
        size += len(part)
        if size > most:
            raise _refused(f"{name}: fetched pictures are larger than the request may be")
        parts.append(part)
    if reply.length:  # it said more than it sent
        raise http.client.IncompleteRead(b"")
    return b"".join(parts)


def _refused(what: str) -> ApiError:
    return ApiError(400, what, code="image_address", param="messages")
