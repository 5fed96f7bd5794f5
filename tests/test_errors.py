"""Words of messages."""

from llava_jax.errors import counted


def test_one_is_one_and_the_rest_are_many():
    assert [counted(n, "batch") for n in (1, 2)] == ["1 batch", "2 batches"]
    assert [counted(n, "image") for n in (0, 1, 2, 1000)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,000 images",
    ]
