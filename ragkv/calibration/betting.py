"""Whether the mean of a bounded loss is under a bound, told by a test that may be looked at after every case.

Somebody bets, case by case, that the loss will be less than the bound. Were its mean at least the bound, no way of betting would
make money: the wealth is a nonnegative supermartingale that starts at 1, so that it ever reaches ``1 / alpha`` with probability
``alpha`` at most (Ville). Reached, it is proof; stopping whenever it is reached, or given up, costs nothing of that (Waudby-Smith
and Ramdas, 2023, "Estimating means of bounded random variables by betting"; constant stakes side by side are their "diversified
Kelly").
"""

from __future__ import annotations

import numpy as np

#: Shares of what a bettor may lose at most that the bettors stake, each always the same; their wealth is the mean of all.
_STAKES = np.array([0.2, 0.4, 0.6, 0.8, 1.0])
_STEPS = 40


def wealth(losses: np.ndarray, bound: float, worst: float) -> np.ndarray:
    """The bettors' mean wealth behind each loss.

    Args:
        losses: ``[..., n]``, each ``worst`` at most.
        bound: that their mean is said to be under.
        worst: the greatest loss that there may be.

    Returns:
        ``[..., n]``.
    """
    gains = (bound - losses) / (worst - bound)  # a stake of 1 may lose all
    with np.errstate(over="ignore", invalid="ignore"):  # whoever has become infinitely rich and loses all
        return np.cumprod(1 + np.multiply.outer(_STAKES, gains), axis=-1).mean(0)


class _Bettors:
    """The same, loss by loss."""

    def __init__(self, bound: float, worst: float):
        self.bound, self.worst, self.each, self.most = bound, worst, np.ones_like(_STAKES), 1.0

    def see(self, loss: float) -> None:
        self.each *= self.growth(loss)
        self.most = max(self.most, float(self.each.mean()))

    def growth(self, loss: float) -> np.ndarray:
        return 1 + _STAKES * (self.bound - loss) / (self.worst - self.bound)


class MeanTest:
    """The losses of one candidate, and what they prove of their mean.

    Args:
        bound: that the mean is to be under.
        least, worst: between which all losses lie.
        confidence: of each statement, over all moments at which it may be made.

    Attributes:
        losses: so far.
    """

    def __init__(self, bound: float, least: float, worst: float, confidence: float):
        self.bound: float = bound
        self.least: float = least
        self.worst: float = worst
        self.losses: list[float] = []
        self._proof = 1 / (1 - confidence)
        self._under, self._over = _Bettors(bound, worst), _Bettors(-bound, -least)

    def add(self, loss: float) -> None:
        """One more; what lies outside the range counts as its end."""
        self.losses.append(min(max(loss, self.least), self.worst))
        self._under.see(self.losses[-1])
        self._over.see(-self.losses[-1])

    @property
    def under(self) -> bool:
        """Whether the mean is proved to be under the bound."""
        return self._under.most >= self._proof

    @property
    def over(self) -> bool:
        """Whether the mean is proved to be over the bound."""
        return self._over.most >= self._proof

    def hopeless(self, left: int) -> bool:
        """Whether ``left`` more cases cannot prove that the mean is under the bound, however good they are."""
        with np.errstate(over="ignore", invalid="ignore"):
            best = np.nan_to_num(self._under.each * self._under.growth(self.least) ** left, posinf=np.inf)
        return max(self._under.most, float(best.mean())) < self._proof

    @property
    def mean(self) -> float:
        """Of the losses so far; 0 where there are none."""
        return float(np.mean(self.losses)) if self.losses else 0.0

    @property
    def upper(self) -> float:
        """The least bound that the mean is proved to be under."""
        low, high, losses = self.least, self.worst, np.array(self.losses)
        for _ in range(_STEPS if self.losses else 0):
            middle = (low + high) / 2
            if np.nanmax(wealth(losses, middle, self.worst)) >= self._proof:
                high = middle
            else:
                low = middle
        return high
