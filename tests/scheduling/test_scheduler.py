"""The line: who begins when, what is waited for, and that nobody is left in it."""

import gc
import threading
import time
from contextlib import ExitStack

import pytest
import torch

from ragkv import ArgumentError, ArgumentTypeError, DeadlineError, Fair, OverloadedError, RagKVError, Scheduler
from ragkv.scheduling import memory
from ragkv.scheduling import scheduler as module
from ragkv.scheduling.policies import FirstComeFirstServed
from ragkv.scheduling.ticket import Ticket


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0.005)
    monkeypatch.setattr(module, "_COMPUTED", 1)


class Asking(threading.Thread):
    """Somebody who asks: computes until told that it is done, answers until told that it is over."""

    def __init__(self, line, ticket):
        super().__init__(daemon=True)
        self.line, self.ticket, self.error = line, ticket, None
        self.began, self.computed, self.over = threading.Event(), threading.Event(), threading.Event()
        before = line.stats().waiting + line.stats().running
        self.start()
        while self.error is None and self.is_alive() and line.stats().waiting + line.stats().running == before:
            time.sleep(0.001)

    def run(self):
        try:
            with ExitStack() as stack:
                with self.line.turn(self.ticket, stack):
                    self.began.set()
                    self.computed.wait(30)
                self.over.wait(30)
        except Exception as error:
            self.error = error

    def end(self):
        self.computed.set()
        self.over.set()
        self.join(30)
        assert not self.is_alive()


def test_one_prompt_is_computed_at_a_time_while_others_are_answered():
    line = Scheduler()
    first, second, third = (Asking(line, Ticket("", 10)) for _ in range(3))
    assert first.began.wait(10) and not second.began.wait(0.05)
    first.computed.set()
    assert second.began.wait(10) and not third.began.is_set()  # and the first one is still answered
    assert line.stats().running == 2
    for one in (second, third, first):
        one.end()
    assert line.stats().running == line.stats().waiting == 0
    assert line.stats().namespaces[""].done == 3


def test_the_next_one_is_placed_meanwhile(monkeypatch):
    monkeypatch.setattr(module, "_COMPUTED", 2)
    line = Scheduler()
    first, second, third = (Asking(line, Ticket("", 10)) for _ in range(3))
    assert first.began.wait(10) and second.began.wait(10) and not third.began.wait(0.05)
    second.computed.set()  # the first one's disk hangs
    assert third.began.wait(10)
    for one in (second, third, first):
        one.end()


def test_a_higher_priority_goes_first():
    line = Scheduler()
    asked = [Asking(line, Ticket("", 10, priority=priority)) for priority in (0, 0, 5, 1)]
    for number in (0, 2, 3, 1):
        assert asked[number].began.wait(10)
        assert sum(one.began.is_set() and one.is_alive() for one in asked) == 1
        asked[number].end()


def test_at_once():
    line = Scheduler(at_once=2)
    asked = [Asking(line, Ticket("", 10)) for _ in range(3)]
    for one in asked[:2]:
        assert one.began.wait(10)
        one.computed.set()
    assert not asked[2].began.wait(0.05)
    asked[1].end()
    assert asked[2].began.wait(10)
    asked[0].end()
    asked[2].end()


def test_memory_is_never_promised_twice():
    line = Scheduler(memory_bytes=100)
    asked = [Asking(line, Ticket("", 10, needs_bytes=needs)) for needs in (60, 50, 10)]
    assert asked[0].began.wait(10)
    asked[0].computed.set()
    assert not asked[1].began.wait(0.05) and not asked[2].began.is_set()  # it would fit, but its turn has not come
    assert line.stats().bytes == 60
    asked[0].end()
    assert asked[1].began.wait(10)
    for one in asked[1:]:
        one.end()
    with pytest.raises(OverloadedError, match="more than memory_bytes=100"), ExitStack() as stack:
        line.turn(Ticket("", 10, needs_bytes=101), stack).__enter__()
    assert line.stats().bytes == 0 and line.stats().namespaces[""].refused == 1


def test_free_memory_is_looked_at_and_looked_at_again(monkeypatch):
    free = [100]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free[0])
    line = Scheduler()
    first = Asking(line, Ticket("", 10, needs_bytes=99, answer_bytes=30))  # nobody would give anything back
    assert first.began.wait(10)
    first.computed.set()
    second = Asking(line, Ticket("", 10, needs_bytes=60, answer_bytes=10))
    assert not second.began.wait(0.05)  # 30 are promised to the first one's answer, a fifth is kept
    free[0] = 113
    assert second.began.wait(10)
    second.computed.set()
    fits = 113 + 99 + 60  # when the others have given back what they take
    third = Asking(line, Ticket("", 10, needs_bytes=fits))
    for ticket in (Ticket("", 10, needs_bytes=fits + 1), Ticket("", 10, needs_bytes=fits + 9, held_bytes=8)):
        with pytest.raises(OverloadedError, match=f"{fits + 1:,} bytes, more than the {fits:,} there are"):
            line.turn(ticket, ExitStack()).__enter__()
    assert line.stats().namespaces[""].refused == 2 and not third.began.is_set()
    first.end()
    second.end()
    assert third.began.wait(10)
    third.end()


def test_what_runs_on_another_device_leaves_this_one_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    line, there = Scheduler(), torch.device("meta")
    first = Asking(line, Ticket("", 10, needs_bytes=90, answer_bytes=60, device=there))
    assert first.began.wait(10)
    first.computed.set()
    second = Asking(line, Ticket("", 10, needs_bytes=90))  # nobody would give anything back of its own
    assert second.began.wait(10)
    second.computed.set()
    third = Asking(line, Ticket("", 10, needs_bytes=80, device=there))
    assert not third.began.wait(0.05)  # 60 are promised there
    for one in (first, second, third):
        one.end()


def test_a_prompt_looks_once_at_free_memory(monkeypatch):
    """Not once for whether it would ever fit, and once for whether it does now, and again for whoever joins with it."""
    looked, now = [], [0.0]
    monkeypatch.setattr(memory, "free_bytes", lambda device: looked.append(device) or 1000)
    monkeypatch.setattr(memory, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module, "_COMPUTED", 9)
    line = Scheduler()
    asked = [Asking(line, Ticket("", 10, needs_bytes=10)) for _ in range(4)]
    assert all(one.began.wait(10) for one in asked) and len(looked) == 1
    asked[0].end()  # gives some back
    last = Asking(line, Ticket("", 10, needs_bytes=10))
    assert last.began.wait(10) and len(looked) == 2
    for one in (*asked[1:], last):
        one.end()


def test_an_interrupted_turn_is_nobodys():
    line = Scheduler()

    class Within(set):
        def add(self, thread):
            super().add(thread)
            raise KeyboardInterrupt

    line._within = Within()
    with pytest.raises(KeyboardInterrupt), ExitStack() as stack, line.turn(Ticket("", 10), stack):
        pass
    assert not line.mine and line.idle()


def test_nothing_is_begun_ahead_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    line = Scheduler()
    assert line.idle(Ticket("", 10, needs_bytes=100)) and not line.idle(Ticket("", 10, needs_bytes=101))


def test_deadline_stop_and_time_limit_end_waiting():
    line = Scheduler(wait_s=60)
    first = Asking(line, Ticket("a", 10))
    assert first.began.wait(10)
    stopped = threading.Event()
    late = Asking(line, Ticket("b", 10, deadline_s=time.perf_counter() + 0.03))
    unwanted = Asking(line, Ticket("b", 10, stop=stopped))
    patient = Asking(line, Ticket("b", 10))
    stopped.set()
    for one in (late, unwanted):
        one.join(10)
    line.wait_s = 0.1
    patient.join(10)
    assert isinstance(late.error, DeadlineError) and isinstance(late.error, TimeoutError)
    assert type(unwanted.error) is RagKVError and "stopped" in str(unwanted.error)
    assert isinstance(patient.error, OverloadedError) and "after 0.1 s" in str(patient.error)
    first.end()
    assert line.stats().waiting == 0 and line.stats().namespaces["b"].refused == 3


def test_an_answer_past_its_deadline_is_ended():
    line, ticket = Scheduler(), Ticket("", 10, deadline_s=time.perf_counter() + 0.02)
    with pytest.raises(DeadlineError, match="not done at its deadline"), ExitStack() as stack:
        with line.turn(ticket, stack):
            pass
        line.spoken(ticket, 1)
        time.sleep(0.03)
        line.spoken(ticket, 1)
    assert line.stats().running == 0 and line.stats().namespaces[""].output_tokens == 2


def test_a_thread_that_waits_for_its_own_streams_is_told_in_the_end():
    line = Scheduler(at_once=1, wait_s=0.05)
    with ExitStack() as stack:
        with line.turn(Ticket("", 10), stack):
            pass
        with pytest.raises(OverloadedError, match="1 wait, 1 are answered"):
            line.turn(Ticket("", 10), stack).__enter__()
    assert line.stats().running == line.stats().waiting == 0


def through(line, ticket):
    with ExitStack() as stack, line.turn(ticket, stack):
        pass


def test_an_unread_answer_keeps_no_place():
    """Only what waits does: whoever has a stream open for an hour is owed nothing for it."""
    fair = Fair(slack=0)
    line = Scheduler(fair)
    with ExitStack() as unread:
        with line.turn(Ticket("late", 10), unread):
            pass
        for _ in range(5):
            through(line, Ticket("early", 100))
        through(line, Ticket("late", 10))
        assert fair.served["late"] >= 500


def test_whoever_asks_within_a_turn_does_not_wait():
    policy = Fair()
    line = Scheduler(policy, wait_s=0)
    assert not line.mine
    with ExitStack() as stack, line.turn(Ticket("", 10), stack):
        assert line.mine
        before, other = policy.served[""], Ticket("", 1000)
        line.computed(other, 100)
        line.spoken(other, 5)
        assert policy.served[""] == before  # it has not begun, and is owed nothing
    assert not line.mine and line.stats().namespaces[""].computed_tokens == 100


class Broken(FirstComeFirstServed):
    def __init__(self, what):
        self.what = what

    def next(self, waiting):
        return self.fail("next", waiting) or super().next(waiting)

    def began(self, ticket, waiting):
        self.fail("began", waiting)

    def fail(self, name, waiting):
        if name == self.what and waiting:
            raise ZeroDivisionError("a bug")
        return Ticket("", 1) if self.what == "other" and name == "next" and len(waiting) > 1 else None


@pytest.mark.parametrize("what", ["next", "other", "began"])
def test_a_policy_that_fails_is_named_to_those_who_wait(what):
    """Not to whoever gives something back just then; and nobody waits for its recovery."""
    policy = Broken("")
    line = Scheduler(policy)
    first = Asking(line, Ticket("", 10))
    assert first.began.wait(10)
    waiting = [Asking(line, Ticket("", 10)) for _ in range(3)]
    policy.what = what
    first.end()
    for one in waiting:
        one.join(10)
        assert type(one.error) is RagKVError and "the scheduler's policy failed" in str(one.error)
    assert first.error is None and (line.stats().running, line.stats().waiting) == (0, 0)
    policy.what = ""
    through(line, Ticket("", 10))
    assert line.stats().namespaces[""].refused == 3


@pytest.mark.parametrize("what", ["joined", "spent"])
def test_a_policy_that_fails_otherwise_is_named_to_whoever_asks(what):
    policy = FirstComeFirstServed()
    setattr(policy, what, lambda *given, **more: [][0])
    line = Scheduler(policy)
    for counted in (line.computed, line.spoken):
        failed = pytest.raises(RagKVError, match="the scheduler's policy failed: IndexError")
        with failed, ExitStack() as stack, line.turn(Ticket("", 10), stack):
            counted(*line._running, 3)
        assert (line.stats().running, line.stats().waiting) == (0, 0)


@pytest.mark.parametrize("why", ["deadline", "stopped"])
def test_what_nobody_wants_any_more_is_not_begun(why):
    """Not even where it need not wait."""
    stop = threading.Event()
    stop.set()
    ticket = Ticket("", 10, stop=stop) if why == "stopped" else Ticket("", 10, deadline_s=time.perf_counter())
    line = Scheduler()
    with pytest.raises(RagKVError, match=why), ExitStack() as stack, line.turn(ticket, stack):
        pytest.fail("it has begun")
    assert line.stats().running == 0


def test_what_fails_gives_all_back_at_once():
    line = Scheduler(at_once=1)
    with ExitStack() as stack:
        with pytest.raises(ZeroDivisionError), line.turn(Ticket("", 10), stack):
            raise ZeroDivisionError
        with line.turn(Ticket("", 10), stack):
            pass
    assert line.stats().namespaces[""].done == 2


def test_an_answer_that_becomes_garbage_within_the_line_leaves_it():
    """Wherever garbage is collected: here while the line is looked at."""

    class Collects(FirstComeFirstServed):
        def next(self, waiting):
            gc.collect()
            return super().next(waiting)

    def answer(line):
        with ExitStack() as stack:
            with line.turn(Ticket("", 10), stack):
                pass
            yield

    line, circle = Scheduler(Collects()), []
    gc.disable()
    try:
        circle += [answer(line), circle]
        next(circle[0])
        assert line.stats().running == 1
        del circle
        with ExitStack() as stack, line.turn(Ticket("", 10), stack):
            pass
    finally:
        gc.enable()
    assert line.stats().running == 0 and line.stats().namespaces[""].done == 2


def test_a_fork_begins_with_an_empty_line(forked):
    line = Scheduler(at_once=1)
    with ExitStack() as stack, line.turn(Ticket("", 10), stack):

        def child():
            assert line.stats().running == 0
            with ExitStack() as own, line.turn(Ticket("", 10), own):
                return line.stats().running

        assert forked(child) == "1"
    assert line.stats().running == 0


def test_figures_of_many_namespaces_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST_NAMESPACES", 5)
    line = Scheduler()
    with ExitStack() as held, line.turn(Ticket("first", 10), held):
        pass
    for number in range(20):
        with ExitStack() as stack, line.turn(Ticket(str(number), 10), stack):
            pass
    assert len(line.stats().namespaces) <= 5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": "lifo"}, ArgumentError),
        ({"policy": 5}, ArgumentTypeError),
        ({"at_once": 0}, ArgumentError),
        ({"memory_bytes": 1.5}, ArgumentTypeError),
        ({"wait_s": -1}, ArgumentError),
        ({"wait_s": "long"}, ArgumentError),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Scheduler(**options)
