"""The line in front of a model: one prompt after the other is computed, the next one being placed meanwhile and answers decoded.

There is no thread of its own: whoever asks waits, and whoever is done lets the next one begin.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from threading import Event, RLock, get_ident
from time import perf_counter, sleep

from ragkv.errors import (
    CLOSED,
    ArgumentError,
    DeadlineError,
    OverloadedError,
    RagKVError,
    instance,
    whole_number,
)
from ragkv.forks import anew_in_forks
from ragkv.scheduling.figures import SchedulerStats, Service
from ragkv.scheduling.memory import Free
from ragkv.scheduling.policies import POLICIES, Policy
from ragkv.scheduling.ticket import Ticket

# Prompts at a time: one is computed while the next one's chunks are placed, and a disk that hangs holds up one of them.
_COMPUTED = 2
# How often one that waits looks whether it is still wanted, and whether memory has become free.
_LOOK_S = 0.1
# Of the memory that is free, what prompts may take: a forward needs some, and so does whatever else runs.
_SHARE = 0.8
# Namespaces whose figures are kept, the last ones asked for.
_MOST_NAMESPACES = 1000


class Scheduler:
    """Says when which request begins. One may serve several engines; all of them have one.

    Calls of :meth:`~ragkv.Engine.generate`, :meth:`~ragkv.Engine.stream` and :meth:`~ragkv.Engine.fuse` stand in one line, whatever
    threads make them, and so does what is built on them. Two prompts are placed and computed at a time, so that first tokens come
    one after the other and not all at the end; answers are decoded together all the while. Calls with a higher ``priority=`` go
    first. A call with ``deadline_s=`` that has no whole answer by then ends with a DeadlineError.

    Args:
        policy: which of equal priority goes first: ``"fcfs"``, in the order of asking; ``"cached-first"``, whoever has the most
            stored (:class:`~ragkv.CachedFirst`); ``"fair"`` between namespaces (:class:`~ragkv.Fair`); or a
            :class:`~ragkv.scheduling.policies.Policy`.
        at_once: how many are answered at a time; by default as many as there is memory for.
        memory_bytes: what all prompts and answers may take together; by default four fifths of what is free, looked at when it is
            needed. A request waits for what the others give back; what would not fit alone either is refused.
        wait_s: how long a request waits before it is refused with an OverloadedError. It would wait for ever for what streams hold
            that its own thread has begun and does not read.

    Raises:
        ArgumentError, ArgumentTypeError: a value is out of range, or of another type.
    """

    def __init__(
        self,
        policy: Policy | str = "fcfs",
        *,
        at_once: int | None = None,
        memory_bytes: int | None = None,
        wait_s: float = 3600.0,
    ):
        if isinstance(policy, str):
            if policy not in POLICIES:
                raise ArgumentError(f"policy must be one of {', '.join(POLICIES)}, or a Policy; got {policy!r}")
            policy = POLICIES[policy]()
        instance("policy", policy, Policy, "a name or a policy, as ragkv.Fair()")
        for name, value in (("at_once", at_once), ("memory_bytes", memory_bytes)):
            if value is not None:
                whole_number(name, value, 1)
        if not isinstance(wait_s, int | float) or isinstance(wait_s, bool) or not wait_s >= 0:
            raise ArgumentError(f"wait_s must be seconds, 0 or more, got {wait_s!r}")
        self.policy: Policy = policy
        self.at_once: int | None = at_once
        self.memory_bytes: int | None = memory_bytes
        self.wait_s: float = wait_s
        self._figures = OrderedDict[str, Service]()
        self._number = 0
        self.anew()
        anew_in_forks(self)

    def __reduce__(self) -> tuple[partial[Scheduler], tuple[Policy]]:
        """What is copied, or goes to another process, is how it was made: nobody stands in line there."""
        made = partial(type(self), at_once=self.at_once, memory_bytes=self.memory_bytes, wait_s=self.wait_s)
        return made, (deepcopy(self.policy),)

    def anew(self) -> None:
        """In a fork: nobody waits yet."""
        self._lock, self._busy = RLock(), False
        self._waiting, self._running, self._gone = list[Ticket](), set[Ticket](), deque[Ticket]()
        self._computing, self._first = set[Ticket](), None
        self._within, self._free = set[int](), Free()
        for service in self._figures.values():
            service.waiting = service.running = 0

    _first: Ticket | None  # whose turn it is as soon as there is room

    @contextmanager
    def turn(self, ticket: Ticket, stack: ExitStack) -> Iterator[None]:
        """A block in which a prompt is computed, when its turn has come.

        Args:
            ticket: of the prompt.
            stack: closed when its answer is over; what the prompt takes is given back then, and at once where the block fails.

        Raises:
            OverloadedError: there is no room for it, or was none for too long.
            DeadlineError: nobody wants it any more.
            RagKVError: it was stopped, the policy failed, or nobody is answered any more.
        """
        stack.callback(self._leave, ticket)
        try:
            self._wait(ticket)
            with self.within():
                yield
        except BaseException:
            self._leave(ticket)
            raise
        with self._line():
            self._computing.discard(ticket)

    @contextmanager
    def within(self) -> Iterator[None]:
        """A block of a turn, in one of the threads that it takes."""
        me = get_ident()
        try:
            self._within.add(me)
            yield
        finally:
            self._within.discard(me)

    @property
    def mine(self) -> bool:
        """Whether this thread is in a turn: whoever asks there would wait for itself."""
        return get_ident() in self._within

    def wait(self, closing: Event) -> None:
        """Wait until nothing is computed any more that was asked for with this event, which is set; this thread's own apart."""
        while not self.mine and self._computes(closing):
            sleep(_LOOK_S)

    def _computes(self, closing: Event) -> bool:
        with self._line():
            return any(ticket.closing is closing for ticket in self._computing)

    def idle(self, ticket: Ticket | None = None) -> bool:
        """Whether nobody waits or is answered, and there would be room for a prompt."""
        with self._line():
            nobody = not self._waiting and not self._running
            return nobody and (ticket is None or (self._room_for(ticket) and not self._never(ticket)))

    def computed(self, ticket: Ticket, tokens: int) -> None:
        """Count what was computed for a prompt."""
        with self._line(lets_in=False):
            service = self._of(ticket)
            service.computed_tokens += tokens
            service.reused_tokens += max(0, ticket.tokens - tokens)
            if ticket in self._running:
                with _named():
                    self.policy.spent(ticket, computed=tokens - ticket.computed)

    def spoken(self, ticket: Ticket, tokens: int) -> None:
        """Count more tokens of an answer.

        Raises:
            DeadlineError: nobody wants the answer any more.
        """
        with self._line(lets_in=False):
            self._of(ticket).output_tokens += tokens
            if ticket in self._running:
                with _named():
                    self.policy.spent(ticket, output=tokens)
        if perf_counter() > ticket.deadline_s:
            raise DeadlineError("the answer was not done at its deadline: ask for a shorter one, or later")

    def stats(self) -> SchedulerStats:
        """The figures now."""
        with self._line():
            services = {name: replace(service) for name, service in self._figures.items()}
            used = sum(ticket.needs_bytes for ticket in self._running)
            return SchedulerStats(len(self._waiting), len(self._running), used, services)

    @contextmanager
    def _line(self, lets_in: bool = True) -> Iterator[None]:
        """A block in which nobody else changes the line. Behind it whoever is gone leaves it, and those begin whose turn it is.

        An answer that is dropped as garbage leaves wherever this thread is just then, within such a block too.
        """
        with self._lock:
            if self._busy:
                yield
                return
            try:
                self._busy = True
                yield
                if lets_in:
                    self._let_in()
            finally:
                self._busy = False

    def _leave(self, ticket: Ticket) -> None:
        """Give back what a request holds; twice is fine."""
        self._gone.append(ticket)  # first of all: it counts, whatever interrupts the rest
        with self._line():
            pass

    def _wait(self, ticket: Ticket) -> None:
        ticket.asked_s = perf_counter()
        if self.policy.looks:
            ticket.reused = ticket.stored()
        with self._line():
            self._number += 1
            ticket.number = self._number
            with _named():
                self.policy.joined(ticket, list(self._waiting))
            self._waiting.append(ticket)
            self._of(ticket).waiting += 1
            never = self._never(ticket)
            if never:
                raise OverloadedError(f"prompt and answer take {never}: give fewer chunks, or ask for less")
        if ticket.gate.locked():
            ticket.prefetch()
        while not self._came(ticket):
            if ticket is self._first:
                with self._line():  # for memory that has become free meanwhile
                    pass

    def _came(self, ticket: Ticket) -> bool:
        """Wait a moment; whether its turn has come, and somebody wants it."""
        left = ticket.deadline_s - perf_counter()
        came = ticket.gate.acquire(timeout=max(0.0, min(_LOOK_S, left)))
        waited = perf_counter() - ticket.asked_s
        if ticket.failed is not None:
            with _named():
                raise ticket.failed
        if ticket.closing is not None and ticket.closing.is_set():
            raise RagKVError(CLOSED)
        if ticket.stop is not None and ticket.stop.is_set():
            raise RagKVError("stopped before it began")
        if perf_counter() > ticket.deadline_s:
            raise DeadlineError(f"the prompt's turn had not come at its deadline, after {waited:.1f} s")
        if not came and waited > self.wait_s:
            held = f"{len(self._waiting)} wait, {len(self._running)} are answered"
            raise OverloadedError(f"the prompt's turn had not come after {self.wait_s:g} s ({held}): ask again later")
        return came

    def _let_in(self) -> None:
        """Let those go that are gone, and those begin whose turn it is."""
        while self._gone:
            self._over(self._gone[0])
            self._gone.popleft()
        self._first = None
        while self._waiting and len(self._computing) < _COMPUTED:
            try:
                if not self._next():
                    return
            except Exception as error:  # of a policy: whoever waits is told so, not whoever happens to be here
                for ticket in list(self._waiting):
                    ticket.failed = error
                    self._over(ticket)
                    ticket.gate.release()

    def _next(self) -> bool:
        """Let the next one begin; whether there was room for it."""
        top = max(ticket.priority for ticket in self._waiting)
        able = [ticket for ticket in self._waiting if ticket.priority == top]
        first = self.policy.next(able)
        if first not in able:
            raise ArgumentError(f"next() must return one of those that wait, got {first!r:.80}")
        self._first = first
        if not self._room_for(first):
            return False
        able.remove(first)
        self.policy.began(first, able)
        self._admit(first)
        return True

    def _admit(self, ticket: Ticket) -> None:
        self._waiting.remove(ticket)
        self._running.add(ticket)
        self._computing.add(ticket)
        ticket.begun_s = perf_counter()
        service = self._of(ticket)
        service.waiting -= 1
        service.running += 1
        service.waited_s += ticket.begun_s - ticket.asked_s
        ticket.gate.release()

    def _over(self, ticket: Ticket) -> None:
        service = self._of(ticket)
        self._free.forget()
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            service.waiting -= 1
            service.refused += 1
        elif ticket in self._running:
            self._computing.discard(ticket)
            self._running.discard(ticket)
            service.running -= 1
            service.done += 1
            service.served_s += perf_counter() - ticket.begun_s

    def _room_for(self, ticket: Ticket) -> bool:
        if self.at_once is not None and len(self._running) >= self.at_once:
            return False
        if self.memory_bytes is not None:
            return ticket.needs_bytes + sum(other.needs_bytes for other in self._running) <= self.memory_bytes
        here = self._beside(ticket)
        if not here:
            return True  # nobody would give anything back
        free = self._free.bytes(ticket.device)
        promised = sum(other.answer_bytes for other in here)
        return free is None or ticket.new_bytes + promised <= _SHARE * free

    def _never(self, ticket: Ticket) -> str:
        """How much a request takes, and that it is more than there would be, were it alone; empty where it is not."""
        if self.memory_bytes is not None:
            more = ticket.needs_bytes > self.memory_bytes
            return f"{ticket.needs_bytes:,} bytes, more than memory_bytes={self.memory_bytes:,}" if more else ""
        free = self._free.bytes(ticket.device)
        if free is None:
            return ""
        free += sum(other.needs_bytes for other in self._beside(ticket))
        return f"{ticket.new_bytes:,} bytes, more than the {free:,} there are" if ticket.new_bytes > free else ""

    def _beside(self, ticket: Ticket) -> list[Ticket]:
        """Those that take memory of the same device now."""
        return [other for other in self._running if other.device == ticket.device]

    def _of(self, ticket: Ticket) -> Service:
        name = ticket.namespace
        service = self._figures.setdefault(name, Service())
        self._figures.move_to_end(name)
        if len(self._figures) > _MOST_NAMESPACES:
            idle = next((n for n, s in self._figures.items() if not (s.waiting or s.running) and n != name), None)
            if idle is not None:
                del self._figures[idle]
        return service


@contextmanager
def _named() -> Iterator[None]:
    """A block whose errors are those of a policy."""
    try:
        yield
    except Exception as error:
        raise RagKVError(f"the scheduler's policy failed: {error!r}") from error
