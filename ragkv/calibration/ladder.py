"""Candidates from the dearest to the cheapest, tested in this order.

The order is fixed before anything is measured, and the first candidate that is not accepted ends it. So an error is made only where
the first bad candidate of the order is accepted: however many there are, the confidence is that of one test (fixed-sequence
testing, as in "Learn then Test", Angelopoulos et al., arXiv:2110.01052).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ragkv.calibration.goal import Goal
from ragkv.errors import ArgumentError, MethodError, instance
from ragkv.methods import Calibrated, FullPrefill, Method
from ragkv.methods.words import as_method, words_of


@dataclass(frozen=True)
class RungReport:
    """What is known of one candidate.

    Attributes:
        method: in words, as on the command line.
        verdict: ``"under"`` the bound, proved; ``"over"`` it, proved; ``"open"``: not proved with these cases; ``"behind"``: a
            dearer one was not accepted; ``"refused"``: the model cannot run it.
        cases: that it was tried on.
        mean: of its losses.
        upper: the bound that its mean is proved to be under.
        budget: the recompute that it was charged, mean.
        refused: why.
    """

    method: str
    verdict: str
    cases: int
    mean: float
    upper: float
    budget: float
    refused: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class _Rung:
    """One candidate while it is tested."""

    def __init__(self, method: Method, words: str, goal: Goal):
        self.method, self.words, self.test = method, words, goal.test()
        self.budgets: list[float] = []
        self.verdict, self.refused = "", ""

    def add(self, loss: float, budget: float) -> None:
        """One case."""
        self.test.add(loss)
        self.budgets.append(budget)
        if self.test.under:
            self.verdict = "under"
        elif self.test.over:
            self.verdict = "over"


class Ladder:
    """All candidates while they are tested.

    Args:
        methods: from the dearest to the cheapest.
        goal: what each is to reach.

    Raises:
        ArgumentError: none, one twice, or one that has no name in words: it could not be kept.
        ArgumentTypeError, MethodError: no methods.
    """

    def __init__(self, methods: Sequence[Method | str], goal: Goal):
        instance("ladder", methods, list | tuple, "a list of methods, from the dearest to the cheapest")
        self.rungs: list[_Rung] = [_Rung(method, _named(method), goal) for method in map(as_method, methods)]
        names = [rung.words for rung in self.rungs]
        if not names or len(set(names)) < len(names):
            raise ArgumentError(f"ladder must hold at least one method, and none twice; got {names}")

    def open(self, left: int) -> list[_Rung]:
        """Those that the next case is to be tried on, where ``left`` cases are left; none where all is decided."""
        found: list[_Rung] = []
        for rung in self._tried:
            if not rung.verdict and rung.test.hopeless(left):
                rung.verdict = "open"
            if rung.verdict in ("over", "open"):
                break
            if not rung.verdict:
                found.append(rung)
        return found

    @property
    def chosen(self) -> Method:
        """The cheapest one before which, and with which, all are accepted; full prefill where that is none."""
        best: Method = FullPrefill()
        for rung in self._tried:
            if rung.verdict != "under":
                break
            best = rung.method
        return best

    def reports(self) -> tuple[RungReport, ...]:
        """All of them, the dearest first."""
        made, behind = list[RungReport](), False
        for rung in self.rungs:
            verdict = "refused" if rung.refused else "behind" if behind else rung.verdict or "open"
            behind = behind or verdict in ("over", "open")
            budget = sum(rung.budgets) / max(1, len(rung.budgets))
            count, test = len(rung.test.losses), rung.test
            made.append(RungReport(rung.words, verdict, count, test.mean, test.upper, budget, rung.refused))
        return tuple(made)

    @property
    def _tried(self) -> list[_Rung]:
        """Whether a model can run a method says nothing of its losses, so leaving it out leaves the order as sound as it was."""
        return [rung for rung in self.rungs if not rung.refused]


def _named(method: Method) -> str:
    words = words_of(method)
    if words is None:
        raise ArgumentError(f"{method!r} has no name in words, so it cannot be kept: give methods of ragkv")
    if isinstance(method, Calibrated | FullPrefill):
        raise MethodError(
            f"{words} is not tried: a calibration looks for what may stand in the place of a full prefill"
        )
    return words
