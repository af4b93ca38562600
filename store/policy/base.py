"""What every eviction policy is: a number for an entry, given how it was used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(slots=True)
class Usage:
    """What a tier knows of one entry, and all that a policy may look at.

    Attributes:
        size_bytes: what the entry takes in the tier.
        cost_s: mean of the seconds that computing it took, over ``computed`` measurements.
        heat: its uses, where each counts the less the longer ago it was (:attr:`Policy.half_life`), as of the last one.
        computed: how often it was computed and put.
        frequency: how often it was put or read.
        tick: logical time of the last use: how many uses the tier had seen. A wall clock that jumps changes nothing.
    """

    size_bytes: int
    cost_s: float = 0.0
    heat: float = 0.0
    computed: int = 0
    frequency: int = 0
    tick: int = 0

    def add_cost(self, seconds: float) -> None:
        """Counts one more computation of the entry into the mean cost."""
        self.computed += 1
        self.cost_s += (seconds - self.cost_s) / self.computed


class Policy(ABC):
    """Gives each entry a priority; a tier evicts the entry with the least.

    A priority is computed when the entry is used and stands until its next use, so that a tier can keep its entries
    in order. What would make all priorities age is put into ``clock`` instead: a tier's clock is the largest priority
    that it ever evicted, or with a :attr:`half_life` counts how many of these have passed.
    """

    name: ClassVar[str]
    #: Whether it looks at what entries cost: measuring that takes time.
    uses_costs: ClassVar[bool] = True
    #: After how many uses per entry of a tier an earlier use counts half in :attr:`Usage.heat`; 0: uses count in full for ever.
    half_life: ClassVar[float] = 0.0

    @abstractmethod
    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """The priority of an entry that has just been used, given its tier's clock. Finite."""

    def window(self, returns: float) -> float:
        """How far above the least entry of its tier whatever was just used stands at least; 0: wherever its priority says.

        Args:
            returns: of what was asked for though it had been evicted, the share whose last use was less uses ago than the tier
                has entries: a mean that follows what is asked.
        """
        return 0.0
