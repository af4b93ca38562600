"""A whole evaluation: gates, then every arm on every case, rows on disk, and what they add up to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from ragkv.chunk import digest
from ragkv.evaluation.arms import FULL, NEIGHBOURS, Arm
from ragkv.evaluation.asking import MakeBench, Prompt, Task, ask_all
from ragkv.evaluation.bench import Bench
from ragkv.evaluation.cases import Case, usable
from ragkv.evaluation.conditions import conditions, versions
from ragkv.evaluation.errors import EvaluationError, GateError
from ragkv.evaluation.gates import Gate, run_gates
from ragkv.evaluation.rows import Row, Rows, write_json
from ragkv.evaluation.summary import summarise
from ragkv.evaluation.timing import Clock
from ragkv.evaluation.tokens import look_at

_TIMES = "times.json"

#: Shows the progress of an iteration: takes the items and how they are called.
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


@dataclass(frozen=True)
class Plan:
    """What shall be evaluated.

    Attributes:
        model: the model's name, as it is shown.
        data: the data's name, as it is shown.
        cases: before anything is left out.
        arms: from :func:`~ragkv.evaluation.arms.parse_arms`.
        limit: at most so many cases.
        orders: orders of chunks for each case: as given, and shuffled.
        timed: cases for which cold and disk times and memory are measured too.
        seed: of shuffling and resampling.
        time_limit_s: seconds after which no further prompt is begun.
        command: the command line, for the report.
    """

    model: str
    data: str
    cases: Sequence[Case]
    arms: Sequence[Arm]
    limit: int | None = None
    orders: int = 3
    timed: int = 4
    seed: int = 0
    time_limit_s: float | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("orders", 1), ("timed", 0), ("time_limit_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} must be at least {least}, got {value}")
        for arm in self.arms:
            if arm.context == NEIGHBOURS and not all(case.behind or not case.documents for case in self.cases):
                raise EvaluationError(f"{arm.name} needs cases with neighbours: give with_neighbours(cases)")


@dataclass
class Result:
    """What an evaluation found.

    Attributes:
        summary: all figures, as plain values.
        tokens: one prompt's tokens, for the heat map; empty where the run was stopped.
        interrupted: by Ctrl-C (``KeyboardInterrupt``), not by its time limit.
    """

    summary: dict[str, Any]
    tokens: dict[str, Any]
    interrupted: bool = False


def evaluate(
    bench: Bench,
    plan: Plan,
    folder: Path,
    *,
    passed: Callable[[Gate], None] = lambda gate: None,
    progress: Progress = lambda items, what: items,
    jobs: int = 1,
    make_bench: MakeBench | None = None,
) -> Result:
    """Run what is not there yet and add everything up; where the run is stopped, what there is.

    Args:
        bench: the model.
        plan: what to run.
        folder: where rows are kept; a stopped run goes on from them.
        passed: told of every gate, also of one that fails.
        progress: shows how far it is.
        jobs: processes that ask cases side by side. Times in memory are then those of a machine that is shared so.
        make_bench: makes the bench of such a process, the same as ``bench``; a function of a module, needed with several jobs.

    Raises:
        EvaluationError: nothing can be scored, or the folder holds a run of other settings.
        GateError: the model is not driven exactly.
        KeyboardInterrupt: the run was interrupted before it had a row.
    """
    end = monotonic() + (inf if plan.time_limit_s is None else plan.time_limit_s)
    if jobs < 1 or (jobs > 1 and make_bench is None):
        raise EvaluationError(f"jobs must be at least 1, and several need make_bench; got {jobs}")
    cases, left_out = _cases(bench, plan)
    rows = Rows(folder, _settings(bench, plan, cases))
    tasks = _tasks(plan, cases, rows)
    gates = _gates(bench, cases[0], passed)
    bench.warm_up(cases[0])
    tokens: dict[str, Any] = {}
    interrupted = False
    try:
        if _asked(rows, zip(progress(tasks, "cases"), ask_all(tasks, bench, jobs, make_bench), strict=True), end):
            _time(bench, plan, cases, rows, folder, progress)
            tokens = _tokens(bench, plan, cases, rows)
    except KeyboardInterrupt:
        if not rows.all():
            raise
        interrupted = True
    names = [arm.name for arm in plan.arms]
    summary = {
        "model": plan.model,
        "data": plan.data,
        "seed": plan.seed,
        "orders": plan.orders,
        "max_new_tokens": bench.max_new_tokens,
        "cases": len(cases),
        "documents": len({case.about for case in cases}),
        "stopped": not tokens,
        "left_out": dict(left_out),
        "gates": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "conditions": {**conditions(bench.engine, plan.command), "jobs": jobs},
        **summarise(
            (row for row in rows.all() if row["order"] < plan.orders),
            _timed(folder, cases[: plan.timed]),
            names,
            [case.id for case in cases],
            plan.seed,
        ),
        "families": {arm.name: (arm.family, arm.context) for arm in plan.arms},
    }
    write_json(folder / "summary.json", summary)
    return Result(summary, tokens, interrupted)


def _cases(bench: Bench, plan: Plan) -> tuple[list[Case], Counter[str]]:
    kept, left_out = usable(plan.cases)
    fitting: list[Case] = []
    for case in kept:
        why = bench.unfit(case)
        if why:
            left_out[why] += 1
        else:
            fitting.append(case)
        if len(fitting) == plan.limit:
            break
    if not fitting:
        raise EvaluationError(
            f"no case can be asked of a model of {bench.engine.decoder.max_positions} positions; left out: {dict(left_out)}"
        )
    return fitting, left_out


def _settings(bench: Bench, plan: Plan, cases: Sequence[Case]) -> dict[str, Any]:
    """What all rows of a run have in common. Further arms, cases and orders may join a run, so these are not here."""
    return {
        "model": plan.model,
        "weights": bench.engine.documents.space[:16],
        "device": str(bench.engine.decoder.device),
        "data": plan.data,
        "first case": cases[0].fingerprint,
        "instruction": bench.instruction or None,
        "foreign": None if bench.foreign is None else digest(bench.foreign).hex()[:16],
        "seed": plan.seed,
        "max_new_tokens": bench.max_new_tokens,
        "versions": versions(),
    }


def _gates(bench: Bench, case: Case, passed: Callable[[Gate], None]) -> list[Gate]:
    gates = []
    for gate in run_gates(bench, case):
        passed(gate)
        gates.append(gate)
        if not gate.passed:
            raise GateError(
                f"gate '{gate.name}' failed: off by {gate.error:.1e}, at most {gate.limit:.1e} ({gate.note}). No score would mean "
                "anything."
            )
    return gates


def _tasks(plan: Plan, cases: Sequence[Case], rows: Rows) -> list[Task]:
    """What is not there yet. Rows of a case that was another one when it was asked are refused."""
    tasks = []
    for case in cases:
        prompts = []
        for order, arranged in case.arranged(plan.orders, plan.seed):
            held = rows.of(case.id, order)
            if any(held[arm.name].get("fingerprint") != arranged.fingerprint for arm in plan.arms if arm.name in held):
                raise EvaluationError(
                    f"case {case.id} is not the one that was asked before (its data or --chunk-words changed): give another folder "
                    "with --out"
                )
            arms = [arm for arm in plan.arms if arm.suits(case) and arm.name not in held]
            if arms:
                prompts.append(Prompt(order, arranged, arms, _charged(plan, case, order, rows)))
        if prompts:
            tasks.append(Task(case, prompts, plan.seed))
    return tasks


def _asked(rows: Rows, tasks: Iterable[tuple[Any, Iterator[Row]]], end: float) -> bool:
    """Keep what is asked until the time is up; whether all was asked."""
    for _, made in tasks:
        for row in made:
            rows.add(row)
            if monotonic() > end:
                return False
    return True


def _time(bench: Bench, plan: Plan, cases: Sequence[Case], rows: Rows, folder: Path, progress: Progress) -> None:
    """Times by arm for the first cases, kept in a file of their own."""
    held = _times(folder)
    todo = [
        case for case in cases[: plan.timed] if not _charged(plan, case, 0, rows).keys() <= held.get(case.id, {}).keys()
    ]
    if todo:
        with Clock(bench) as clock:
            for case in progress(todo, "timed cases"):
                held[case.id] = clock.times(case, plan.arms, _charged(plan, case, 0, rows))
                write_json(folder / _TIMES, held)


def _timed(folder: Path, cases: Sequence[Case]) -> list[dict[str, Row]]:
    held = _times(folder)
    return [held[case.id] for case in cases if case.id in held]


def _times(folder: Path) -> dict[str, dict[str, Row]]:
    path = folder / _TIMES
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _charged(plan: Plan, case: Case, order: int, rows: Rows) -> dict[str, float]:
    """The budgets that arms were charged for one prompt, by name; of those that ran."""
    held = rows.of(case.id, order)
    return {arm.name: held[arm.name]["budget"] for arm in plan.arms if "budget" in held.get(arm.name, ())}


def _tokens(bench: Bench, plan: Plan, cases: Sequence[Case], rows: Rows) -> dict[str, Any]:
    """Of a case that naive reuse answers wrong and full prefill right, if there is one: there the tokens have something to show."""

    def right(case: Case, arm: str) -> float:
        return rows.of(case.id, 0).get(arm, {}).get("em", 0.0)

    telling = (case for case in cases if right(case, FULL) and not right(case, "reuse@alone"))
    case = next(telling, cases[0])
    return look_at(bench, case, plan.arms, _charged(plan, case, 0, rows))
