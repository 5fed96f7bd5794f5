"""The benchmarks' questions and the bad images, if they are here."""

import pytest

from tests.conftest import shared


@pytest.fixture(scope="session")
def benchmarks():
    return shared("benchmarks")


@pytest.fixture(scope="session")
def bad_images():
    return shared("bad-images")
