"""Signals that stop a run: one request, however many of them tell it; a hangup is one, unless ignored."""

import signal
from types import SimpleNamespace

import pytest

from llava_jax.train import signals
from llava_jax.train.signals import stop_signals, stopping


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_at_once_are_one_request_and_a_later_one_another(clock, first):
    asked, again = [], []
    with stop_signals(lambda: asked.append(1), lambda: again.append(1)):
        for number in (first, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert (asked, again) == ([1], [])
        clock[0] += 3
        signal.raise_signal(signal.SIGINT)
    assert (asked, again) == ([1], [1])


def test_a_later_one_acts_as_it_did_before(clock):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            clock[0] += 3

    with stop_signals(lambda: None), pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert signal.SIGHUP not in stopping()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in stopping()
