"""JSON files of a work directory: whole or not at all, and named where they are damaged."""

import pytest

from llava_jax.errors import ConfigError
from llava_jax.train.files import read_json
from llava_jax.util import write_text


def test_what_was_there_stays_until_the_new_text_is_whole(tmp_path):
    path = tmp_path / "done.json"
    write_text(path, '{"steps": 1}')
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert read_json(path) == {"steps": 1}
    write_text(path, '{"steps": 2, "said": "\u00e9"}')
    assert read_json(path) == {"steps": 2, "said": "\u00e9"}


@pytest.mark.parametrize("content", [b"", b'{"steps": 1', b"[]", b"3", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "done.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"done\.json is damaged.*remove this file"):
        read_json(path)
