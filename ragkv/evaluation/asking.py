"""Cases are asked one after the other, or several at a time in processes of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from ragkv.evaluation.arms import Arm
from ragkv.evaluation.bench import Bench
from ragkv.evaluation.cases import Case
from ragkv.evaluation.rows import Row
from ragkv.evaluation.scoring import Group

#: Makes a process's own bench; a function of a module, so that another process can be told of it.
MakeBench = Callable[[], Bench]

_own: Bench | None = None  # of a process that was started to ask


@dataclass(frozen=True)
class Prompt:
    """A case in one order of its chunks, and the arms to be asked.

    Attributes:
        order: its number.
        case: in this order.
        arms: whose rows are missing.
        charged: the budgets of arms whose rows are there, by name.
    """

    order: int
    case: Case
    arms: Sequence[Arm]
    charged: dict[str, float]


@dataclass(frozen=True)
class Task:
    """What is to be asked about one case, whose documents are read once for it."""

    case: Case
    prompts: Sequence[Prompt]
    seed: int


def ask(bench: Bench, task: Task) -> Iterator[Row]:
    """The rows of a task's prompts."""
    reading = bench.read(task.case, {arm.context for prompt in task.prompts for arm in prompt.arms})
    try:
        for prompt in task.prompts:
            group = Group(bench, prompt.case, prompt.order, reading, prompt.charged)
            yield from group.rows(prompt.arms, task.seed)
    finally:
        bench.release(reading)


def ask_all(tasks: Sequence[Task], bench: Bench, jobs: int, make_bench: MakeBench | None) -> Iterator[Iterator[Row]]:
    """The rows of each task, in order; with several ``jobs`` each process has a bench of its own and its share of the cores."""
    if jobs == 1 or make_bench is None or not tasks:
        yield from (ask(bench, task) for task in tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start, (make_bench, threads, tasks[0].case))
    try:
        yield from map(iter, pool.map(_ask, tasks))
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make_bench: MakeBench, threads: int, case: Case) -> None:
    global _own
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    torch.set_num_threads(threads)
    _own = make_bench()
    _own.warm_up(case)


def _ask(task: Task) -> list[Row]:
    assert _own is not None
    return list(ask(_own, task))
