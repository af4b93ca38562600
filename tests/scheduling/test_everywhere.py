"""Whatever happens at whatever line of the line's code: nobody is left in it, and it goes on."""

import gc
import sys
import threading
from contextlib import ExitStack

import pytest

from ragkv import Scheduler
from ragkv.scheduling import scheduler as module
from ragkv.scheduling.ticket import Ticket

LINES = 400  # more than are run


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "_LOOK_S", 0.005)


def at_line(number, happens, files, but=()):
    """A trace function: something happens when the so manieth line of these files is about to run, but for some functions."""
    left = [number]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.endswith(files) or frame.f_code.co_name in but:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                happens()
        return trace

    return trace, left


def asked(line):
    with ExitStack() as stack:
        ticket = Ticket("", 10)
        with line.turn(ticket, stack):
            line.computed(ticket, 10)
        line.spoken(ticket, 1)


def answer(line):
    """One that is let in, and goes on."""
    with ExitStack() as stack:
        with line.turn(Ticket("", 10), stack):
            pass
        yield


def test_an_answer_may_become_garbage_at_any_line_of_one_that_waits_for_it():
    files = ("scheduler.py", "ticket.py", "policies.py", "threading.py")
    gc.disable()
    gc.freeze()  # so that only what is made here is looked through
    try:
        for number in range(1, 120):
            line, circle = Scheduler(at_once=1), []
            circle += [answer(line), circle]
            next(circle[0])
            del circle
            trace, left = at_line(number, gc.collect, files)

            def run(line=line, trace=trace):
                sys.settrace(trace)
                asked(line)

            waiting = threading.Thread(target=run, daemon=True)
            waiting.start()
            waiting.join(10)
            assert not waiting.is_alive(), f"it waits for itself, at line {number}"
            assert (line.stats().running, line.stats().waiting, line.stats().namespaces[""].done) == (0, 0, 2)
            assert left[0] <= 0  # it did happen
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_an_interruption_at_any_line_leaves_nobody_in_the_line(policy):
    def interrupt():
        raise KeyboardInterrupt

    for number in range(1, LINES):
        line = Scheduler(policy, at_once=1, wait_s=1)
        trace, left = at_line(number, interrupt, ("scheduler.py", "policies.py"), but=("_line", "_leave", "within"))
        sys.settrace(trace)
        try:
            asked(line)
            break  # it was over before
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        asked(line)
        assert (line.stats().running, line.stats().waiting) == (0, 0) and not line.mine
    assert 30 < number < LINES - 1 and left[0] > 0
