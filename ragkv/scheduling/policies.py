"""Which of the requests that wait goes first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from ragkv.errors import ArgumentError, instance, whole_number
from ragkv.scheduling.ticket import Ticket

# Namespaces whose counters are kept although they ask for nothing; the one that was served least goes first: it would be lifted.
_MOST_IDLE = 1000


class Policy(ABC):
    """What a scheduler asks, one thread at a time. A policy of your own needs :meth:`next` only.

    Attributes:
        looks: it wants to know how many tokens of a request are stored.
    """

    looks: ClassVar[bool] = False

    @abstractmethod
    def next(self, waiting: Sequence[Ticket]) -> Ticket:
        """Which of those that wait begins next, as soon as there is room. Asked more often than it is followed.

        Args:
            waiting: of the highest priority, in the order in which they came; not empty.
        """

    def joined(self, ticket: Ticket, others: Sequence[Ticket]) -> None:  # noqa: B027
        """One more waits, besides the others that wait."""

    def began(self, ticket: Ticket, waiting: Sequence[Ticket]) -> None:  # noqa: B027
        """One begins; the others of its priority wait on."""

    def spent(self, ticket: Ticket, computed: float = 0.0, output: int = 0) -> None:  # noqa: B027
        """Tokens were computed for one beyond what ``ticket.computed`` said, or answered."""


class FirstComeFirstServed(Policy):
    """In the order of asking."""

    def next(self, waiting: Sequence[Ticket]) -> Ticket:
        """See :class:`Policy`."""
        return waiting[0]


class CachedFirst(Policy):
    """Whoever has the most stored for each token to compute goes first (RAGCache, arXiv:2404.12457, section 5.2).

    Args:
        window: by how many that came later a request is overtaken at most.
    """

    looks: ClassVar[bool] = True

    def __init__(self, window: int = 32):
        whole_number("window", window)
        self.window: int = window

    def next(self, waiting: Sequence[Ticket]) -> Ticket:
        """See :class:`Policy`."""
        late = next((ticket for ticket in waiting if ticket.overtaken >= self.window), None)
        return late or max(waiting, key=lambda ticket: ticket.reused / max(1, ticket.computed))

    def began(self, ticket: Ticket, waiting: Sequence[Ticket]) -> None:
        """See :class:`Policy`."""
        for other in waiting:
            other.overtaken += other.number < ticket.number


class Fair(CachedFirst):
    """Namespaces are served alike: whoever was served least goes first.

    What a namespace is served is counted in weighted tokens (the virtual token counter of VTC, arXiv:2401.00588). One that comes
    again begins where the least served one is, so that idleness earns nothing. Among those that are at most ``slack`` ahead of the
    least served one, whoever has the most stored goes first (locality-aware fairness, arXiv:2501.14312).

    Two namespaces that always have something waiting are never served more than ``2 * (slack + most)`` apart, over any time, where
    ``most`` is what one request costs, plus the output of those that are answered at once.

    Args:
        shares: what some namespaces are to be served more or less than 1.0, by name.
        reused, computed, output: weight of a token that was stored, computed, answered.
        slack: weighted tokens that a namespace may be ahead for the sake of what is stored.
        window: by how many of its own namespace that came later a request is overtaken at most.
    """

    def __init__(
        self,
        shares: Mapping[str, float] | None = None,
        *,
        reused: float = 0.1,
        computed: float = 1.0,
        output: float = 2.0,
        slack: float = 4096.0,
        window: int = 32,
    ):
        super().__init__(window)
        instance("shares", shares, Mapping | None, "a dict, of a number for each of some namespaces")
        self.shares: dict[str, float] = dict(shares or {})
        self.reused: float = reused
        self.computed: float = computed
        self.output: float = output
        self.slack: float = slack
        for name, value in (("reused", reused), ("computed", computed), ("output", output), ("slack", slack)):
            if not (isinstance(value, int | float) and value >= 0):
                raise ArgumentError(f"{name} must be at least 0, got {value!r}")
        for name, share in self.shares.items():
            if not (isinstance(share, int | float) and share > 0):
                raise ArgumentError(f"shares: that of {name!r} must be more than 0, got {share!r}")
        self.served: dict[str, float] = {}
        self._level = 0.0  # of the one that began last

    def next(self, waiting: Sequence[Ticket]) -> Ticket:
        """See :class:`Policy`."""
        most = min(self._of(ticket) for ticket in waiting) + self.slack
        return super().next([ticket for ticket in waiting if self._of(ticket) <= most])

    def joined(self, ticket: Ticket, others: Sequence[Ticket]) -> None:
        """See :class:`Policy`."""
        if any(other.namespace == ticket.namespace for other in others):
            return
        level = min(map(self._of, others), default=self._level)
        self.served[ticket.namespace] = max(self._of(ticket), level)
        idle = self.served.keys() - {ticket.namespace, *(other.namespace for other in others)}
        if len(idle) > _MOST_IDLE:
            del self.served[min(idle, key=self.served.__getitem__)]

    def began(self, ticket: Ticket, waiting: Sequence[Ticket]) -> None:
        """See :class:`Policy`."""
        super().began(ticket, [other for other in waiting if other.namespace == ticket.namespace])
        self._count(ticket, self.reused * ticket.reused + self.computed * ticket.computed)
        self._level = self._of(ticket)

    def spent(self, ticket: Ticket, computed: float = 0.0, output: int = 0) -> None:
        """See :class:`Policy`."""
        self._count(ticket, self.computed * computed + self.output * output)

    def _of(self, ticket: Ticket) -> float:
        return self.served.get(ticket.namespace, 0.0)

    def _count(self, ticket: Ticket, cost: float) -> None:
        self.served[ticket.namespace] = self._of(ticket) + cost / self.shares.get(ticket.namespace, 1.0)


#: Policies by name, with their own defaults.
POLICIES: dict[str, type[Policy]] = {"fcfs": FirstComeFirstServed, "cached-first": CachedFirst, "fair": Fair}
