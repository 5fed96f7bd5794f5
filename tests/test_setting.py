"""Values of settings: what is not a plain number or word. The tables have tests in test_settings.py."""

import pytest

from llava_jax.errors import ConfigError
from llava_jax.setting import check, parse
from llava_jax.settings import TRAINING


def test_words_are_checked_before_a_model_is_read():
    row = TRAINING["trainable"]
    check(row, parse(row, r"projector,re:language\.norm\..*"))
    found = parse(row, r"(projector, re:language\.layers\.attn\.[qv])")
    assert found == ("projector", r"re:language\.layers\.attn\.[qv]")
    with pytest.raises(ConfigError, match="no regular expression: unterminated character set"):
        check(row, ("re:[",))
    with pytest.raises(ConfigError, match="or re: and a regular expression over names"):
        check(row, ("langauge",))
