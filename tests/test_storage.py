"""Files below addresses: told from paths, joined, read, and errors that are a disk's."""

from pathlib import Path

import fsspec
import pytest

from llava_jax import storage
from llava_jax.errors import ConfigError, ImageError
from llava_jax.images.decode import open_image


@pytest.mark.parametrize("path", ["gs://a/b", "s3://a", "memory://x", "simplecache::s3://a/b"])
def test_addresses(path):
    assert storage.is_address(path)
    assert storage.join(f"{path}/", "c/d.png") == f"{path}/c/d.png"


@pytest.mark.parametrize("path", ["a/b", "/a", "C://a", "c:\\a", "a:b", "", Path("gs://a"), "a//b"])
def test_paths(path):
    assert not storage.is_address(path)


def test_an_address_reads_as_a_file_does(tmp_path):
    store = fsspec.filesystem("memory")
    for folder in (f"{tmp_path}", "memory://reads"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        for name in ("a.txt", "sub/b.txt"):
            (tmp_path / name).write_bytes(b"12345")
            store.pipe(f"/reads/{name}", b"12345")
        assert storage.files_in(folder) == {"a.txt"}
        file = storage.join(folder, "sub/b.txt")
        assert (storage.read(file), storage.read(file, 3)) == (b"12345", b"123")
        assert storage.is_file(file)
        assert storage.is_folder(storage.join(folder, "sub"))
        missing = storage.join(folder, "none")
        assert not storage.is_file(missing)
        assert not storage.is_folder(missing)
        for ask in (storage.read, storage.files_in):
            with pytest.raises(FileNotFoundError):
                ask(missing)


def test_what_a_store_says_is_an_os_error_in_one_line(monkeypatch):
    store = fsspec.filesystem("memory")

    def fail(*_, **__):
        raise RuntimeError("503:\n slow down")

    monkeypatch.setattr(store, "cat_file", fail)
    with pytest.raises(OSError, match="503: slow down"):
        storage.read("memory://x/y")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(storage.source("memory://x/y"), name="y")
    with pytest.raises(ConfigError, match="Protocol not known"):
        storage.read("nosuchstore://x")


def test_a_store_without_its_library_says_which(monkeypatch):
    def fail(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(ConfigError, match="its library is not installed") as error:
        storage.read("s3://bucket/x")
    assert error.value.fix == "install s3fs to access S3"


def test_what_somebody_sends_is_never_fetched():
    with pytest.raises(ImageError, match="addresses are not fetched"):
        open_image("memory://reads/a.txt")
