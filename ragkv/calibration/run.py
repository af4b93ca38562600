"""A calibration: case by case, one full prefill and one prompt of every candidate that is still open."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ragkv.calibration import kept
from ragkv.calibration.cases import ASKED, Asks, Find, Trial, one_each, trials_of
from ragkv.calibration.goal import Goal
from ragkv.calibration.ladder import Ladder, RungReport
from ragkv.closeness import divergence, same_top
from ragkv.errors import (
    ArgumentTypeError,
    CalibrationError,
    MethodError,
    ModelChangedError,
    PromptError,
    PromptTooLongError,
    RetrievalError,
    UnsupportedModelError,
    in_one_line,
    whole_number,
)
from ragkv.methods import FullPrefill, Method
from ragkv.methods.calibrated import LADDER
from ragkv.methods.words import parse_method, words_of
from ragkv.streaming import side_by_side

#: Why cases are left out of which another one about the same document is asked.
_SAME = "about the document of another case"


@dataclass(frozen=True)
class Calibration:
    """What a calibration found, or has found so far.

    Attributes:
        chosen: the method in words, as on the command line; ``"full-prefill"`` where nothing cheaper was proved to be good enough.
        goal: what was to be proved, in words.
        metric, bound, confidence, cap: the same as values.
        rungs: the candidates, the dearest first.
        cases: how many were asked, of ``given`` ones.
        given: how many there were.
        left_out: cases that could not be asked, by reason.
        made_with: what it holds for: model, template and settings by name.
    """

    chosen: str
    goal: str
    metric: str
    bound: float
    confidence: float
    cap: float
    rungs: tuple[RungReport, ...]
    cases: int
    given: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def method(self) -> Method:
        """What was chosen."""
        return parse_method(self.chosen)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {**vars(self), "left_out": dict(self.left_out), "made_with": dict(self.made_with)}
        return {**plain, "rungs": [rung.as_dict() for rung in self.rungs]}


def calibrate(
    engine: Asks,
    cases: Iterable[Any],
    *,
    kl: float | None = None,
    top1: float | None = None,
    f1: float | None = None,
    ladder: Sequence[Method | str] = LADDER,
    confidence: float = 0.95,
    cap: float = 1.0,
    limit: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    progress: Callable[[Calibration], object] | None = None,
    find: Find | None = None,
) -> Calibration:
    """Find the cheapest method whose mean loss against a full prefill of the same prompts is under a bound.

    The cases stand for the questions to come: they should be drawn from the same. They are asked in random order, and no longer
    than is needed; of those that bring the same document along one is drawn. What was measured is kept with every case: a call
    that was stopped, or one with more cases, goes on from there.

    Args:
        engine: of the model.
        cases: ``(chunks, question)``, or ``(chunks, question, answers)`` where F1 is asked for; or cases of
            :func:`ragkv.evaluation.read_cases`, whose documents are read for them in memory.
        kl: the bound on the KL of the first token, in nats; 0.1 where no bound is given.
        top1: instead, the bound on the share of prompts whose first token is another.
        f1: instead, the bound on the F1 that greedy answers lose: 0.02 for two points.
        ladder: methods from the dearest to the cheapest; by default :class:`~ragkv.RelevantTokens` at falling ratios, and
            :class:`~ragkv.Reuse`. The first that is not proved to be good ends the search.
        confidence: of the statement, however many methods are tried.
        cap: the most that one prompt's KL counts, in nats; see :class:`~ragkv.calibration.goal.Goal`.
        limit: at most so many cases.
        seed: of the order of those that were not asked before.
        max_new_tokens: of answers, where F1 is asked for.
        progress: called behind every case with what was found so far.
        find: finds the passages for questions that come without; see :meth:`ragkv.RAG.calibrate`.

    Returns:
        What was found; kept beside the KV for ``method="calibrated"``.

    Raises:
        CalibrationError: there are no cases that can be asked, or too few to prove anything.
        ArgumentError, ArgumentTypeError, MethodError: an argument is out of range.
        ModelChangedError: the model changed meanwhile.
        StoreError: the result cannot be kept.
    """
    goal = Goal.of(kl, top1, f1, confidence, cap)
    rungs = Ladder(ladder, goal)
    whole_number("max_new_tokens", max_new_tokens, 1)
    if progress is not None and not callable(progress):  # it is called behind the first case, which may take long
        raise ArgumentTypeError(
            f"progress must be a function that takes a ragkv.calibration.Calibration, got {progress!r:.80}"
        )
    if limit is not None:
        whole_number("limit", limit, 1)
    ungated: Any = copy(engine)  # what is measured is the method, and not what a gate puts in its place
    ungated.gate = None
    trials = trials_of(ungated, cases, [rung.method for rung in rungs.rungs], find)
    random.Random(seed).shuffle(trials)
    run = _Run(ungated, goal, rungs, trials, limit, max_new_tokens, progress)
    result = run.result()
    kept.keep_result(
        engine.store, {**result.as_dict(), "setting": run.setting, "at_s": round(time.time()), "seed": seed}
    )
    return result


class _Run:
    def __init__(
        self,
        engine: Asks,
        goal: Goal,
        ladder: Ladder,
        trials: Sequence[Trial],
        limit: int | None,
        max_new_tokens: int,
        progress: Callable[[Calibration], object] | None,
    ):
        engine.documents.look()
        self.setting, self._made_with = kept.setting(engine.documents), kept.made_with(engine.documents)
        self._of = f"{self.setting} {max_new_tokens}"
        self._rows = kept.rows(engine.store, self._of)
        kept.keep_rows(engine.store, self._of, self._rows)  # fails now, where it would fail after hours
        # Those that were asked before come first, in their order: a test that is looked at once more, and not another one.
        before = {key[:ASKED]: number for number, key in enumerate(self._rows)}
        answered = [trial for trial in trials if goal.metric != "f1" or trial.answers]
        drawn = one_each(sorted(answered, key=lambda trial: before.get(trial.asked, len(before))))
        self._engine, self._goal, self._ladder, self._trials = engine, goal, ladder, drawn[:limit]
        self._max_new_tokens, self._progress = max_new_tokens, progress
        beforehand = {"no answer": len(trials) - len(answered), _SAME: len(answered) - len(drawn)}
        self._left_out, self._asked = +Counter(beforehand), 0
        self._given = len(self._trials) + self._left_out.total()

    def result(self) -> Calibration:
        """Asks as long as something is open."""
        if not self._ladder.open(len(self._trials)):
            besides = f"; left out were {dict(self._left_out)}" if self._left_out else ""
            raise CalibrationError(
                f"{len(self._trials)} cases cannot prove it, whatever they show ({self._goal.said}): give at least "
                f"{self._fewest()}, or a wider bound{besides}"
            )
        for number, trial in enumerate(self._trials):
            wanted = self._ladder.open(len(self._trials) - number)
            if not wanted:
                break
            row = self._row(trial, [rung.words for rung in wanted])
            if row is None:
                continue
            self._asked += 1
            for rung in wanted:
                found = row[rung.words]
                if "refused" in found:
                    rung.refused = found["refused"]
                else:
                    rung.add(found[self._goal.metric], found["budget"])
            if self._progress is not None:
                self._progress(self._now())
        self._ladder.open(0)
        if not self._asked:
            raise CalibrationError(f"none of the {len(self._trials)} cases could be asked: {dict(self._left_out)}")
        self._engine.documents.look()
        if kept.setting(self._engine.documents) != self.setting:
            raise ModelChangedError("the model has changed while it was calibrated: do it again")
        return self._now()

    def _now(self) -> Calibration:
        goal = self._goal
        return Calibration(
            *(words_of(self._ladder.chosen) or "", goal.said, goal.metric, goal.bound, goal.confidence, goal.cap),
            rungs=self._ladder.reports(),
            cases=self._asked,
            given=self._given,
            left_out=dict(self._left_out),
            made_with=self._made_with,
        )

    def _fewest(self) -> int:
        test, most = self._goal.test(), 1
        while test.hopeless(most):
            most *= 2
        return bisect_left(range(most), True, key=lambda cases: not test.hopeless(cases))

    def _row(self, trial: Trial, wanted: Sequence[str]) -> dict[str, Any] | None:
        """What was measured of a case, by candidate; ``None`` where it cannot be asked."""
        try:
            key = trial.key()
            row = self._rows.get(key, {})
            missing = [words for words in wanted if not self._goal.measured(row.get(words, {}))]
            if missing:
                with trial.chunks() as chunks:
                    made = self._measured(trial, chunks, missing)
                row = self._rows[key] = {**row, **{words: {**row.get(words, {}), **made[words]} for words in missing}}
                kept.keep_rows(self._engine.store, self._of, self._rows)
        except PromptError as error:
            long = isinstance(error, PromptTooLongError)
            self._left_out["longer than the model's positions" if long else in_one_line(error)] += 1
            return None
        except RetrievalError:
            self._left_out["no passage was found"] += 1
            return None
        return row

    def _measured(self, trial: Trial, chunks: Sequence[Any], wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
        measure = self._answered if self._goal.metric == "f1" else self._fused
        return dict(zip(wanted, measure(trial, chunks, [parse_method(words) for words in wanted]), strict=True))

    def _fused(self, trial: Trial, chunks: Sequence[Any], methods: Sequence[Method]) -> list[dict[str, Any]]:
        """Compares first tokens: nothing is decoded."""

        def fuse(method: Method) -> Any:
            return trial.engine.fuse(chunks, trial.question, method=method, room_tokens=1)

        full = fuse(FullPrefill()).logits

        def loss(method: Method) -> dict[str, Any]:
            prompt = fuse(method)
            off = {"kl": divergence(full, prompt.logits), "top1": 1 - same_top(full, prompt.logits)}
            return {**off, "budget": prompt.report.budget}

        return [_unless_refused(loss, method) for method in methods]

    def _answered(self, trial: Trial, chunks: Sequence[Any], methods: Sequence[Method]) -> list[dict[str, Any]]:
        """Compares greedy answers with the right ones; they are decoded side by side."""
        from ragkv.evaluation.metrics import f1

        def answer(method: Method, **stopping: Any) -> dict[str, Any]:
            options = {"max_new_tokens": self._max_new_tokens, "do_sample": False, "num_beams": 1, **stopping}
            made = trial.engine.generate(chunks, trial.question, method=method, **options)
            return {"f1": f1(made.text, trial.answers), "budget": made.report.fusion.budget}

        full, *rows = side_by_side(partial(_unless_refused, answer), [FullPrefill(), *methods])
        return [row if "refused" in row else {**row, "f1": full["f1"] - row["f1"]} for row in rows]


def _unless_refused(measure: Callable[..., dict[str, Any]], method: Method, **options: Any) -> dict[str, Any]:
    """A row, or that the model cannot run the method."""
    try:
        return measure(method, **options)
    except (MethodError, UnsupportedModelError) as error:
        if method == FullPrefill():
            raise
        return {"refused": in_one_line(error)}
