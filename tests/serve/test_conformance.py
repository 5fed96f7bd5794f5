"""The scripted questions of bench/conformance.py, asked of our own server."""

from bench.conformance import Asked, run
from tests.serve.conftest import KEY, NAME


def test_our_server_holds_what_others_are_asked(server):
    found = list(run(Asked(server.url, KEY, NAME)))
    assert len(found) == 12
    assert not [row for row in found if not row[1]]
