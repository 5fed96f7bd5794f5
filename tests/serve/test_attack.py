"""Short forms of bench/attack.py; results of the long ones are in bench/results/serve_*.json."""

import pytest

from bench import attack_inputs as inputs
from bench import attack_parts as parts


@pytest.mark.parametrize(
    ("act", "count"), [(parts.fuzz, 120), (parts.words, 40)], ids=["fuzz", "words"]
)
def test_what_the_server_stands(server, act, count):
    found = act(server, count, seed=5)
    assert found["ok"], found


def test_bad_pictures_are_answered_or_refused_within_their_limits(server):
    if not inputs.corpus().is_dir():
        pytest.skip(f"{inputs.corpus()} is not here")
    found = inputs.pictures(server, 27, seed=2)
    assert found["ok"], found


def test_answers_by_random_schemas_are_valid(server):
    pytest.importorskip("llguidance")
    found = inputs.answers(server, 8, seed=100)
    assert found["ok"], found


def test_a_crowd_gets_the_answers_that_each_gets_alone(server):
    found = parts.isolation(server, 48, seed=3, clients=12)
    assert found["ok"], found


def test_slow_clients_and_a_flood_do_not_stop_others(server):
    found = parts.slow(server, 20, seed=0, size=2**26)
    assert found["MB taken of the flood"] < 64
    assert found["MB grown"] < 64
    assert server.at_rest()
