"""What a calibration is to prove: which loss, and how small its mean has to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ragkv.calibration.betting import MeanTest
from ragkv.errors import ArgumentError, ArgumentTypeError

#: What is said of each metric, and the bound where none is given.
_SAID = {
    "kl": "KL of the first token, in nats, to a full prefill of the same prompt",
    "top1": "share of prompts whose first token is not that of a full prefill",
    "f1": "F1 that answers lose against those of a full prefill",
}
_DEFAULT_KL = 0.1
#: What a bet on one case wins at least, of what it may lose: less is lost in rounding.
_LEAST = 1e-12


@dataclass(frozen=True)
class Goal:
    """A bound on the mean of a loss.

    Attributes:
        metric: ``"kl"``, ``"top1"`` or ``"f1"``.
        bound: that the mean is to be under.
        confidence: with which that is said.
        cap: the most that one prompt's KL counts, in nats. A mean under ``bound`` then says, too, that at most ``bound / cap`` of
            the prompts are further off than the cap.
    """

    metric: str
    bound: float
    confidence: float = 0.95
    cap: float = 1.0

    @classmethod
    def of(cls, kl: float | None, top1: float | None, f1: float | None, confidence: float, cap: float) -> Goal:
        """The goal that was asked for; a KL of 0.1 where none was.

        Raises:
            ArgumentError: several bounds, or a number that is out of range.
            ArgumentTypeError: something is no number.
        """
        given = {name: value for name, value in (("kl", kl), ("top1", top1), ("f1", f1)) if value is not None}
        if len(given) > 1:
            raise ArgumentError(f"give one of kl=, top1= and f1=, got {', '.join(given)}")
        for name, value in {**given, "confidence": confidence, "cap": cap}.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name} must be a number, got {value!r}")
        metric, bound = next(iter(given.items()), ("kl", _DEFAULT_KL))
        if not 0 < confidence < 1:
            raise ArgumentError(f"confidence must be between 0 and 1, as 0.95; got {confidence}")
        if not cap > 0:
            raise ArgumentError(f"cap must be more than 0 nats, got {cap}")
        goal = cls(metric, float(bound), confidence, float(cap))
        if not 0 < bound < goal.worst:
            most = f"the cap of {cap:g} nats" if metric == "kl" else "1"
            raise ArgumentError(f"{metric} must be more than 0 and less than {most}, got {bound:g}")
        if goal.bound - goal.least < _LEAST * goal.worst:
            raise ArgumentError(
                f"no number of cases proves a mean under {bound:g} of what may be {goal.worst:g}: give a wider bound, or a smaller "
                "cap"
            )
        return goal

    @property
    def least(self) -> float:
        """The least loss of one prompt: an answer may also gain."""
        return -1.0 if self.metric == "f1" else 0.0

    @property
    def worst(self) -> float:
        """The greatest loss of one prompt."""
        return self.cap if self.metric == "kl" else 1.0

    @property
    def said(self) -> str:
        """In words."""
        each = f", each counted as {self.cap:g} at most" if self.metric == "kl" else ""
        return f"mean {_SAID[self.metric]}{each}: under {self.bound:g} with {100 * self.confidence:.6g}% confidence"

    def test(self) -> MeanTest:
        """A test of it."""
        return MeanTest(self.bound, self.least, self.worst, self.confidence)

    def measured(self, row: Mapping[str, float]) -> bool:
        """Whether a row has what is needed."""
        return "refused" in row or self.metric in row
