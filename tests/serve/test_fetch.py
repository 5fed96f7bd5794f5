"""Pictures by address: refused in every form by default; from the hosts that were named, and no others."""

import http.server
import socket
import ssl
import subprocess
import threading
from contextlib import ExitStack

import pytest

from llava_jax.errors import ConfigError
from llava_jax.serve import fetch
from llava_jax.serve.errors import ApiError
from llava_jax.serve.fetch import Fetcher
from tests.serve.conftest import NAME, picture, shown

PUBLIC, HOST = "93.184.215.14", "pictures.test"

# {} is host and port of a canary on loopback, {port} its port.
FORMS = """
http://{} http://{}/a.png https://{} https://{}/a.png HTTP://{} hTTpS://{}/a.png //{} //{}/a.png
http:{} http:/{} http:///{} https:///{} http:\\\\{} http:/\\{} https:\\\\{}/a http://user@{} https://a:b@{}/
https://pictures.test@{}/a.png https://pictures.test:443@{} https://{}#@pictures.test https://{}\\@pictures.test/
https://pictures.test\\@{}/ https://{}?pictures.test https://{}/pictures.test https://pictures.test.{}
http://localhost:{port}/ https://localhost:{port}/ http://LOCALHOST:{port} http://127.1:{port} http://127.0.1:{port}/a
http://2130706433:{port}/ http://0x7f000001:{port}/ http://0x7f.1:{port} http://0177.0.0.1:{port}/ http://0:{port}
http://0.0.0.0:{port}/ http://[::1]:{port}/ http://[::]:{port} http://[::ffff:127.0.0.1]:{port}/ https://[::1]:{port}
http://[0:0:0:0:0:ffff:7f00:1]:{port}/ http://①②⑦.⓪.⓪.①:{port}/ http://127。0。0。1:{port} http://127%2e0%2e0%2e1:{port}
http://[fe80::1%25lo]:{port}/ http://127.0.0.1.nip.io:{port}/ ftp://{}/a.png ftps://{} gopher://{}/_GET ws://{} wss://{}
dict://{}/ ldap://{} tftp://{} sftp://{}/a smb://{}/a s3://{}/a gs://{}/a jar:http://{}!/a view-source:http://{} data:http://{}
url:http://{} feed:http://{} file:///etc/passwd file:/etc/passwd FILE:///etc/passwd file://localhost/etc/passwd
file://{}/etc/passwd /etc/passwd ../../etc/passwd ~/.ssh/id_rsa \\\\{}\\share\\a.png /proc/self/environ /dev/zero
""".split()
FORMS += [
    " http://{}/a.png",
    "http://{}/a.png\n",
    "\thttps://{}/",
    "ht\ntp://{}/",
    "https://{}/\x00",
    "http://{} a",
]


@pytest.fixture
def canary():
    """(host and port, port); what connects to it is a failure."""
    with ExitStack() as held:
        sockets = [
            held.enter_context(socket.socket(family))
            for family in (socket.AF_INET, socket.AF_INET6)
        ]
        sockets[0].bind(("127.0.0.1", 0))
        port = sockets[0].getsockname()[1]
        try:
            sockets[1].bind(("::1", port))
        except OSError:  # no IPv6 here
            sockets.pop()
        for s in sockets:
            s.listen()
            s.settimeout(0.2)
        yield f"127.0.0.1:{port}", port
        for s in sockets:
            with pytest.raises(TimeoutError):
                s.accept()


@pytest.fixture
def asked(monkeypatch):
    """What was resolved and connected to, by this process."""
    seen = []

    def resolve(host):
        seen.append(f"resolve {host}")
        raise OSError

    monkeypatch.setattr(fetch, "resolve", resolve)
    return seen


def body(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"model": NAME, "messages": [{"role": "user", "content": parts}], "max_tokens": 2}


def test_by_default_no_form_of_address_or_path_is_asked(server, canary):
    assert len(FORMS) >= 60
    for form in FORMS:
        reply = server.post(body(form.format(canary[0], port=canary[1])))
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages"), form
        assert "root:" not in reply.text


def test_with_an_allowlist_no_form_reaches_another_host(canary, asked):
    fetcher = Fetcher(f"{HOST}, cdn.{HOST}", 2, 10**6)
    for form in FORMS:
        with pytest.raises(ApiError, match="data URI|not fetched from that host") as caught:
            fetcher.get({form.format(canary[0], port=canary[1]): 1})
        assert caught.value.status == 400
    assert asked == []  # not even a name was looked up
    with pytest.raises(ApiError, match="could not be fetched"):
        fetcher.get({f"HTTPS://{HOST.upper()}:443/a.png#part": 1})
    assert asked == [f"resolve {HOST}"]
    with pytest.raises(ApiError, match="not a data URI nor"):
        fetcher.get({f"https://{HOST}/{'a' * 3000}": 1})


@pytest.mark.parametrize("address", """127.0.0.1 10.0.0.1 192.168.1.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0
    224.0.0.1 198.18.0.1 ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 2002:7f00:1::
    64:ff9b::7f00:1 2001:0:7f00:1::""".split())  # fmt: skip
def test_addresses_that_are_not_global_are_refused(address, monkeypatch):
    monkeypatch.setattr(fetch, "resolve", lambda _: [PUBLIC, address])
    monkeypatch.setattr(fetch, "connect", lambda *_: pytest.fail("it connected"))
    with pytest.raises(ApiError, match="could not be fetched"):
        Fetcher(HOST, 2, 10**6).get({f"https://{HOST}/a.png": 1})


class Host(http.server.BaseHTTPRequestHandler):
    """A picture, and what else a host may reply."""

    def do_GET(self):
        steps = {"/hop": "/red.png", "/loop": "/loop", "/away": "https://127.0.0.1/x",
                 "/down": "http://pictures.test/red.png", "/file": "file:///etc/passwd"}  # fmt: skip
        if self.path in steps:
            self.send_response(302)
            self.send_header("Location", steps[self.path])
            return self.end_headers()
        self.send_response(404 if self.path == "/none" else 200)
        data = picture("red")
        if self.path == "/short":
            self.send_header("Content-Length", str(len(data)))
            data = data[:50]
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"x" * 60_000)
            if self.path == "/slow":
                while not self.server.stopped.wait(0.05):
                    self.wfile.write(b"x")
            self.wfile.write(b"" if self.path == "/empty" else data)
        except OSError:  # the other side has had enough
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = [folder / "key.pem", folder / "cert.pem"]
    words = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={HOST}"
    words += f" -addext subjectAltName=DNS:{HOST} -keyout {made[0]} -out {made[1]}"
    try:
        subprocess.run(words.split(), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return made


@pytest.fixture
def host(certificate, monkeypatch):
    """A https host on loopback that the fetcher takes for a public one; yields what was connected to."""
    key, cert = certificate
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    web.stopped = threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    web.socket = context.wrap_socket(web.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    port, seen = web.server_address[1], []
    real = socket.create_connection

    def connect(address, seconds):
        seen.append(address)
        return real(("127.0.0.1", port), timeout=seconds)

    monkeypatch.setattr(fetch, "connect", connect)
    names = []
    monkeypatch.setattr(fetch, "resolve", lambda name: names.append(name) or [PUBLIC])
    monkeypatch.setattr(fetch, "tls", lambda: ssl.create_default_context(cafile=str(cert)))
    yield seen, names
    web.stopped.set()
    web.shutdown()
    web.server_close()


def test_a_picture_of_a_named_host(host):
    connected, names = host
    fetcher = Fetcher(f"{HOST},other.test", 5, 10**6)
    url = f"https://{HOST}/red.png"
    assert fetcher.get({url: 1}) == {url: picture("red")}
    assert (connected, names) == ([PUBLIC], [HOST])  # once, at the address that was looked at
    hop = f"https://{HOST}/hop"
    assert fetcher.get({hop: 1})[hop] == picture("red")
    with pytest.raises(ApiError, match="could not be fetched"):  # its certificate is another's
        fetcher.get({"https://other.test/red.png": 1})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("away", "not fetched from that host"),
        ("down", "nor https"),
        ("file", "nor https"),
        ("loop", "more than 3 times"),
        ("none", "status 404"),
        ("short", "could not be fetched"),
        ("endless", "larger than"),
        ("slow", "too long"),
    ],
)
def test_what_a_named_host_cannot_do(host, path, says):
    with pytest.raises(ApiError, match=says):
        Fetcher(HOST, 0.7, 10**6).get({f"https://{HOST}/{path}": 1})


def test_a_server_that_may_fetch(server, host, monkeypatch):
    """Through the API: the same answer as to the bytes, and a refusal by default."""
    url, get = f"https://{HOST}/red.png", Fetcher(HOST, 5, 10**6)
    assert server.post(body(url)).status_code == 400
    monkeypatch.setattr(Fetcher, "check", lambda _, *a: get_check(get, *a))
    fetched = server.post(body(url)).json()
    sent = shown(picture("red"))["image_url"]["url"]
    want = server.post(body(sent)).json()
    assert fetched["choices"] == want["choices"]
    assert host[0] == [PUBLIC]
    for path, says in (("none", "image 2: its host"), ("empty", "image 2: there are no bytes")):
        refused = server.post(body(sent, f"https://{HOST}/{path}"))
        assert refused.json()["error"]["message"].startswith(says)


get_check = Fetcher.check  # as it is, before a test replaces it


def test_a_host_that_is_none_is_refused():
    for bad in ("https://a.test", "a.test/x", "*.test", "a test", "-a", "[::1]"):
        with pytest.raises(ConfigError, match="allow_urls"):
            Fetcher(bad, 1, 1)
