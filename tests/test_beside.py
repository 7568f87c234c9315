"""Work in threads beside the computing."""

import threading
import time

import pytest

from anomalysd_pipeline.common import beside
from anomalysd_pipeline.common.beside import Behind, ahead

PATIENCE = 20


def test_items_come_in_order_and_only_so_many_ahead():
    made, third = [], threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    found = ahead(items(), 2)
    assert next(found) == 0 and third.wait(PATIENCE)
    time.sleep(0.1)
    assert made == [0, 1, 2]  # one was taken, and two wait
    assert list(found) == list(range(1, 10))


def test_an_error_comes_after_what_was_made_before_it():
    def items():
        yield 1
        raise ValueError("broken")

    found = ahead(items(), 4)
    assert next(found) == 1
    with pytest.raises(ValueError, match="broken"):
        next(found)


def test_closing_ends_the_thread():
    before = threading.active_count()
    found = ahead(iter(range(100)), 1)
    next(found)
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before


def test_a_slow_source_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(beside, "_WAIT", 0.1)
    go = threading.Event()

    def items():
        yield 0
        go.wait(PATIENCE)

    found, began = ahead(items(), 2), time.monotonic()
    assert next(found) == 0
    found.close()
    assert time.monotonic() - began < PATIENCE / 2
    go.set()


def test_calls_are_made_in_order_before_the_block_ends():
    made = []
    with Behind(2) as later:
        for number in range(20):
            later(made.append, number)
    assert made == list(range(20))


def test_calls_that_wait_are_made_after_an_error_of_the_block():
    made, go = [], threading.Event()
    with pytest.raises(KeyboardInterrupt), Behind(4) as later:
        later(go.wait, PATIENCE)
        later(made.append, 1)
        go.set()
        raise KeyboardInterrupt
    assert made == [1]


def test_an_error_of_a_call_comes_with_the_next_or_at_the_end():
    def fail():
        raise OSError("disk full")

    made = []
    with pytest.raises(OSError, match="disk full"), Behind(1) as later:
        later(fail)
        for number in range(10_000):
            later(made.append, number)
    assert not made
    with pytest.raises(OSError, match="disk full"), Behind(1) as later:
        later(fail)
