"""Fetching from a server in this process: hashes, archives, and what is said when it fails."""

import errno
import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.eval.fetch import fetch, sets
from llava_jax.eval.task import TASKS


@pytest.fixture
def site(monkeypatch):
    """A server of `pages` (path -> (status, bytes)); tasks fetch from it once told to."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pages, seen = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            status, body = pages.get(self.path, (404, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + (status == 206)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"

    def use(*paths, images=(), **hashes):
        for kind, files in (("files", paths), ("images", images)):
            monkeypatch.setitem(sets()["pope"], kind, [url + path for path in files])
        for name, digest in hashes.items():
            monkeypatch.setitem(sets()["sha256"], f"{name}.json", digest)

    yield type("Site", (), {"pages": pages, "seen": seen, "use": staticmethod(use)})
    server.shutdown()
    server.server_close()


def test_files_are_kept_and_remembered(site, tmp_path):
    body = b"labels"
    site.pages["/a.json"] = (200, body)
    site.use("/a.json", images=["/big.zip"], a=hashlib.sha256(body).hexdigest())
    assert list(fetch("pope", tmp_path)) == [tmp_path / "a.json"]
    assert list(fetch("pope", tmp_path)) == [tmp_path / "a.json"]
    assert site.seen == ["/a.json"]
    record = json.loads((tmp_path / "fetched.json").read_text())
    assert record["a.json"]["bytes"] == 6


def test_changed_files_are_refused(site, tmp_path):
    site.pages["/a.json"] = (200, b"one")
    site.use("/a.json")
    list(fetch("pope", tmp_path))
    (tmp_path / "a.json").write_bytes(b"two")
    with pytest.raises(LlavaError, match=r"a\.json: has hash"):
        list(fetch("pope", tmp_path))
    (tmp_path / "a.json").unlink()
    site.pages["/a.json"] = (200, b"three")
    with pytest.raises(
        LlavaError, match="a.json: the file has another hash .*the owner changed it"
    ):
        list(fetch("pope", tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["fetched.json"]  # and no part of a file


def archive(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in files.items():
            z.writestr(name.replace("__", "/"), text)
    return out.getvalue()


def test_archives_are_unpacked(site, tmp_path):
    site.pages["/{org}/a.zip".format(org="me")] = (200, archive(sub__b="text"))
    site.use("/{org}/a.zip")
    list(fetch("pope", tmp_path, org="me"))
    unpacked = tmp_path / "sub" / "b"
    assert unpacked.read_text() == "text"
    unpacked.write_text("te")  # as an earlier version left what a kill cut off
    list(fetch("pope", tmp_path, org="me"))
    assert unpacked.read_text() == "text"
    site.pages["/evil.zip"] = (200, archive(**{"..__evil": "x"}))
    site.use("/evil.zip")
    with pytest.raises(LlavaError, match="outside itself"):
        list(fetch("pope", tmp_path / "in"))
    site.pages["/bad.zip"] = (200, b"no zip")
    site.use("/bad.zip")
    with pytest.raises(LlavaError, match="is not a zip archive"):
        list(fetch("pope", tmp_path))


def test_a_disk_that_is_full_leaves_no_part_of_a_member(site, tmp_path, monkeypatch):
    site.pages["/a.zip"] = (200, archive(sub__b="text"))
    site.use("/a.zip")

    def full(source, file):
        file.write(source.read(2))
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as broken:
        broken.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="no space"):
            list(fetch("pope", tmp_path))
    assert list((tmp_path / "sub").iterdir()) == []
    list(fetch("pope", tmp_path))
    assert (tmp_path / "sub" / "b").read_text() == "text"


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ((403, b""), "is gated"),
        ((404, b""), "HTTP 404 .*try --org"),
        ((206, b"half"), "ended early"),
    ],
)
def test_failures_are_worded(site, tmp_path, page, words):
    site.pages["/a.json"] = page
    site.use("/a.json")
    with pytest.raises(LlavaError, match=words):
        list(fetch("pope", tmp_path))
    assert list(tmp_path.iterdir()) == []
    site.pages["/a.json"] = (200, b"whole")
    assert [p.read_bytes() for p in fetch("pope", tmp_path)] == [b"whole"]


def test_broken_record(site, tmp_path):
    (tmp_path / "fetched.json").write_text("{")
    site.use("/a.json")
    with pytest.raises(LlavaError, match=r"fetched\.json: not JSON"):
        list(fetch("pope", tmp_path))


def test_offline(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(sets()["pope"], "files", ["http://127.0.0.1:9/a.json"])
    assert main(["eval", "fetch", "pope", "--out", str(tmp_path / "pope")]) == 2
    assert not (tmp_path / "pope").exists()
    error = capsys.readouterr().err
    assert "127.0.0.1:9 cannot be reached ([Errno 111] Connection refused)" in error
    assert "download http://127.0.0.1:9/a.json elsewhere" in error


def test_every_task_can_be_got_or_says_how():
    places = {name: rows for name, rows in sets().items() if name != "sha256"}
    assert set(places) == set(TASKS)
    assert all({"files", "hub", "by_hand"} & rows.keys() for rows in places.values())
    for task, words in {"mme": "on request", "ai2d": "--local-dir DATA/ai2d"}.items():
        with pytest.raises(LlavaError, match=words):
            list(fetch(task, None))
    urls = [url for rows in places.values() for k in ("files", "images") for url in rows.get(k, ())]
    assert all(url.startswith("http") for url in urls)
    assert set(sets()["sha256"]) < {url.rsplit("/", 1)[-1] for url in urls}
    assert all(len(digest) == 64 for digest in sets()["sha256"].values())
