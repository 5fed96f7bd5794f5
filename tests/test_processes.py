"""Work in several processes: results, errors, killed and hanging processes."""

import os
import signal
import time

import pytest

from llava_jax.processes import Lost, in_processes

JOB = "tests.test_processes:job"


def job(factor):
    """Multiplies; dies at -1, hangs at -2, fails at -3, ends at -4."""

    def work(number):
        if number == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == -2:
            time.sleep(60)
        if number == -3:
            raise ValueError("no such number")
        if number == -4:
            os._exit(7)
        print("a library says something")  # which is no result
        return factor * number

    return work


def test_every_chunk_has_its_result():
    assert sorted(in_processes(JOB, (3,), range(40), 2, 30)) == [(n, 3 * n) for n in range(40)]
    assert list(in_processes(JOB, (3,), [], 2, 30)) == []


def test_a_process_that_dies_or_hangs_is_named_and_replaced():
    started = time.monotonic()
    found = dict(in_processes(JOB, (2,), [1, -1, 2, -2, 3, -4, 4], 1, 3))
    assert time.monotonic() - started < 30
    assert found[-1] == Lost("its process was killed by SIGKILL")
    assert found[-2] == Lost("it took more than 3 s")
    assert found[-4] == Lost("its process ended with exit code 7")
    assert [found[n] for n in (1, 2, 3, 4)] == [2, 4, 6, 8]


def test_errors_of_the_job_and_of_the_chunks_are_raised():
    with pytest.raises(ValueError, match="no such number"):
        list(in_processes(JOB, (2,), [1, -3], 1, 30))

    def chunks():
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(in_processes(JOB, (2,), chunks(), 2, 30))


def test_leaving_early_ends_the_processes():
    for number, _ in in_processes(JOB, (2,), range(10_000), 2, 30):
        if number > 5:
            break
    started = time.monotonic()
    for number, _ in in_processes(JOB, (2,), [1, -2, -2], 2, 300):
        assert number == 1
        break  # while both others hang
    assert time.monotonic() - started < 30
    children = os.popen(f"ps --ppid {os.getpid()} -o args=").read()
    assert "llava_jax.processes" not in children
