"""Turns at the model: the order in which they are given, and that none is lost."""

import threading
import time

import pytest

from anomalysd_pipeline.app.turns import Turns

PATIENCE = 20  # seconds, for threads that would otherwise hang the tests


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.001)


class Crowd:
    """Threads that each take a turn and note it; started one by one, so that their order is known."""

    def __init__(self, turns: Turns):
        self.turns, self.order, self.threads = turns, [], []

    def join_in(self, name: str) -> None:
        def take():
            with self.turns.turn():
                self.order.append(name)

        before = self.turns.waiting
        self.threads.append(threading.Thread(target=take, daemon=True))
        self.threads[-1].start()
        until(lambda: self.turns.waiting == before + 1)

    def finish(self) -> list[str]:
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        return self.order


@pytest.fixture
def turns():
    return Turns()


@pytest.fixture
def crowd(turns):
    return Crowd(turns)


class TestOrder:
    def test_first_come_first_served(self, turns, crowd):
        with turns.turn():
            for name in "abcde":
                crowd.join_in(name)
            assert turns.waiting == 5 and crowd.order == []
        assert crowd.finish() == list("abcde") and turns.waiting == 0

    def test_giving_way_lets_those_go_who_wait_and_comes_before_those_who_come(self, turns, crowd):
        with turns.turn():
            for name in "ab":
                crowd.join_in(name)
            turns.give_way()
            crowd.order.append("step")
            crowd.join_in("c")
            crowd.order.append("step")
            turns.give_way()
            crowd.order.append("step")
        assert crowd.finish() == ["a", "b", "step", "step", "c", "step"]

    def test_one_who_comes_while_others_are_let_go_waits_for_the_next_step(self, turns, crowd):
        inside, go_on = threading.Event(), threading.Event()

        def slow():
            with turns.turn():
                inside.set()
                go_on.wait(PATIENCE)
                crowd.order.append("slow")

        def teach():
            with turns.turn():
                started.set()
                until(lambda: turns.waiting == 1)
                turns.give_way()
                crowd.order.append("step")

        started = threading.Event()
        crowd.threads += [threading.Thread(target=f, daemon=True) for f in (teach, slow)]
        crowd.threads[0].start()
        assert started.wait(PATIENCE)
        crowd.threads[1].start()
        assert inside.wait(PATIENCE)
        until(lambda: turns.waiting == 1)  # the teaching
        crowd.join_in("late")
        go_on.set()
        assert crowd.finish() == ["slow", "step", "late"]

    def test_giving_way_to_nobody_returns_at_once(self, turns):
        with turns.turn():
            turns.give_way()
            assert turns.waiting == 0

    def test_two_teachings_take_turns_step_by_step(self, turns):
        steps = []
        together = threading.Barrier(2, timeout=PATIENCE)

        def teach(name):
            together.wait()
            with turns.turn():
                until(lambda: turns.waiting or steps)
                for _ in range(5):
                    steps.append(name)
                    turns.give_way()

        threads = [threading.Thread(target=teach, args=(name,), daemon=True) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(steps) == list("aaaaabbbbb") and "".join(steps) in ("ab" * 5, "ba" * 5)


class TestExclusion:
    def test_many_threads_never_meet(self, turns):
        inside, met, rounds = [], [], []

        def work(give_way):
            for _ in range(40):
                with turns.turn():
                    inside.append(1)
                    met.append(len(inside))
                    inside.pop()
                    if give_way:
                        turns.give_way()
                        inside.append(1)
                        met.append(len(inside))
                        inside.pop()
                rounds.append(1)

        threads = [threading.Thread(target=work, args=(index % 2,), daemon=True) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(rounds) == 8 * 40 and set(met) == {1} and turns.waiting == 0

    def test_an_error_gives_the_turn_back(self, turns, crowd):
        with pytest.raises(KeyError), turns.turn():
            crowd.join_in("a")
            raise KeyError
        assert crowd.finish() == ["a"]

    def test_a_turn_may_end_in_another_thread(self, turns, crowd):
        turn = turns.turn()
        turn.__enter__()
        ending = threading.Thread(target=turn.__exit__, args=(None, None, None))
        crowd.join_in("a")
        ending.start()
        assert crowd.finish() == ["a"]

    def test_one_who_is_interrupted_while_waiting_holds_nobody_up(self, turns, crowd, monkeypatch):
        turn = turns.turn()
        turn.__enter__()
        with monkeypatch.context() as patch:
            patch.setattr(turns._condition, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt), turns.turn():
                pass
        assert turns.waiting == 0
        crowd.join_in("a")
        turn.__exit__(None, None, None)
        assert crowd.finish() == ["a"]

    def test_giving_way_without_a_turn(self, turns):
        with pytest.raises(RuntimeError, match="within a turn"):
            turns.give_way()


def interrupted(*args):
    raise KeyboardInterrupt


class TestCompute:
    def test_one_thread_computes_for_all_one_after_another(self, turns):
        from concurrent.futures import ThreadPoolExecutor

        now = []

        def work(number: int) -> tuple[int, int]:
            now.append(number)
            assert len(now) == 1
            time.sleep(0.002)
            now.remove(number)
            return number, threading.get_ident()

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda number: turns.compute(work, number), range(24)))
        assert [number for number, _ in found] == list(range(24))
        assert len({thread for _, thread in found}) == 1

    def test_it_waits_for_its_turn(self, turns):
        done = threading.Event()
        with turns.turn():
            waiting = threading.Thread(target=turns.compute, args=(done.set,), daemon=True)
            waiting.start()
            until(lambda: turns.waiting == 1)
            assert not done.is_set()
        waiting.join(PATIENCE)
        assert done.is_set() and turns.waiting == 0

    def test_an_error_reaches_the_caller_and_ends_the_turn(self, turns):
        with pytest.raises(ZeroDivisionError):
            turns.compute(lambda: 1 / 0)
        assert turns.compute(lambda: "next") == "next"

    def test_the_caller_s_context_is_there(self, turns):
        import contextvars

        name = contextvars.ContextVar("name", default="nobody")
        name.set("ann")
        assert turns.compute(name.get) == "ann"
