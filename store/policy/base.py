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
        last_cost_s: seconds that computing it took the last time.
        computed: how often it was computed and put.
        frequency: how often it was put or read.
        tick: logical time of the last use. Counts uses, so that a wall clock that jumps changes nothing.
    """

    size_bytes: int
    cost_s: float = 0.0
    last_cost_s: float = 0.0
    computed: int = 0
    frequency: int = 0
    tick: int = 0

    def add_cost(self, seconds: float) -> None:
        """Counts one more computation of the entry into the mean cost."""
        self.computed += 1
        self.cost_s += (seconds - self.cost_s) / self.computed
        self.last_cost_s = seconds


class Policy(ABC):
    """Gives each entry a priority; a tier evicts the entry with the least.

    A priority is computed when the entry is used and stands until its next use, so that a tier can keep its entries
    in order. What would make all priorities age is put into ``clock`` instead: a tier's clock is the largest priority
    that it ever evicted.
    """

    name: ClassVar[str]
    #: Whether it looks at what entries cost: measuring that takes time.
    uses_costs: ClassVar[bool] = True

    @abstractmethod
    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """The priority of an entry that has just been used, given its tier's clock. Finite."""
