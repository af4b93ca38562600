"""Prompts over links of many speeds, for links.py, on a clock of its own: thousands of seconds in a moment, exactly.

A link hands over bytes as a trace says, and computing takes what a profile says. The choice and the order of work are the library's
own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

import ragkv
from ragkv.chunk import Chunk
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout, lay_out
from ragkv.fusion.plan import plan
from ragkv.fusion.view import Selection, View
from ragkv.store import CostProfile, Loading, Rates
from ragkv.store.source import Progress

SPEEDS = {
    "10 Mbit/s": 1.25e6, "100 Mbit/s": 1.25e7, "1 Gbit/s": 1.25e8, "10 Gbit/s": 1.25e9, "100 Gbit/s": 1.25e10
}  # fmt: skip
RANGE_BYTES, REQUESTS, HEAD_BYTES = 4 << 20, 16, 4 << 10

#: From which time on how many bytes come in a second.
Trace = Sequence[tuple[float, float]]


@dataclass(eq=False)
class Request:
    """Bytes that were asked for."""

    size: int
    begins_s: float
    left: float
    done: bool = False


class Link:
    """A network on a clock of its own: requests share what it carries, so many at once, those that were made first.

    Args:
        trace: what it carries.
        latency_s: until a request's first byte.
    """

    def __init__(self, trace: Trace, latency_s: float = 0.001) -> None:
        self.trace, self.latency_s, self.now = trace, latency_s, 0.0
        self.open: list[Request] = []

    def ask(self, size: int) -> Request:
        self.open.append(Request(size, self.now + self.latency_s, size))
        return self.open[-1]

    def advance(self, until: float) -> None:
        """Goes on to a moment, or to the first at which a request is done."""
        done = False
        while self.now < until and not done:
            served = self.open[:REQUESTS]
            active = [each for each in served if each.begins_s <= self.now]
            rate = rate_at(self.trace, self.now) / max(1, len(active))
            least = min((each.left for each in active), default=math.inf)
            done_s = self.now + least / rate if rate and active else math.inf
            changes = [*(start for start, _ in self.trace), *(each.begins_s for each in served)]
            then = min(until, done_s, *(change for change in changes if change > self.now))
            for each in active:
                each.left -= rate * (then - self.now)
                each.done = then == done_s and each.left <= least * 1e-9 + 1e-6
                done |= each.done
            self.now, self.open = then, [each for each in self.open if not each.done]

    def wait(self, asked: Collection[Request], limit_s: float) -> bool:
        """Goes on until requests are done, so long at most; whether they are."""
        if limit_s == math.inf and not self.trace[-1][1]:
            raise TimeoutError("the link is dead")
        until = self.now + min(limit_s, 1e7)
        while not (done := all(each.done for each in asked)) and self.now < until:
            self.advance(until)
        return done


class Simulated:
    """A prompt's chunks on a link, by their numbers: a :class:`ragkv.fusion.course.Coming`.

    Args:
        link: with the clock.
        layout: the prompt.
        rates: what computing and placing take.
        numbers: of the chunks to load.
        token_bytes: of a token's KV.
        known: bytes per second that the pool was seen to do before.
    """

    def __init__(
        self, link: Link, layout: Layout, rates: Rates, numbers: Sequence[int], token_bytes: float, known: float | None
    ):
        self.link, self.rates, self.known, self.token_bytes = link, rates, known, token_bytes
        self.chunks = {number: layout.chunks[number] for number in numbers}
        self.began, self.late, self.seen = link.now, 0, known
        self.asked: dict[int, list[Request]] = {}
        self.placed = set[int]()

    def away(self) -> list[int]:
        return list(self.chunks)

    def begin(self) -> None:
        for number, placed in reversed(self.chunks.items()):
            size = round(len(placed.chunk) * self.token_bytes)
            self.asked[number] = [self.link.ask(min(RANGE_BYTES, size - at)) for at in range(0, size, RANGE_BYTES)]

    def here(self, number: int, limit_s: float) -> bool:
        done = self.link.wait(self.asked[number], limit_s)
        self._look()
        return done

    def progress(self, number: int) -> Progress:
        asked = [request for each in self.asked.values() for request in each]
        came = sum(request.size for request in asked if request.done)
        return Progress(self.link.now - self.began, came, sum(request.size for request in asked) - came, self.known)

    def give_up(self, number: int) -> list[int]:
        found = self.progress(number)
        most = (found.came + found.left) / max(found.since_s, 1e-6)
        self.seen = most if self.seen is None else min(self.seen, most)
        self.late += 1
        dropped = self.asked.pop(number)
        self.link.open = [request for request in self.link.open if request not in dropped]
        return [number]

    def place_front(self, stop: int) -> None:
        for number in self.asked.keys() - self.placed:
            if self.chunks[number].start < stop:
                assert all(request.done for request in self.asked[number])
                self.placed.add(number)
                self.spend(self.rates.tiers["cpu"].seconds(len(self.chunks[number].chunk)))

    def spend(self, seconds: float) -> None:
        """The processor works; the network does too."""
        until = self.link.now + seconds
        while self.link.now < until:
            self.link.advance(until)
        self._look()

    def _look(self) -> None:
        found = self.progress(0)
        if found.came and not found.left and not self.late and self.seen is self.known:
            self.seen = found.came / max(found.since_s, 1e-6)


class Linked(View):
    """A view of a prompt all of whose chunks lie in a pool.

    Attributes:
        start_s: until it was known what is there, this time; else as given.
    """

    def __init__(self, layout: Layout, rates: Rates, link: Link, start_s: float):
        super().__init__(layout, 1)
        self.rates, self.tiers = rates, ["remote"] * len(layout.chunks)
        self._link, self.start_s = link, start_s
        self.opened, self.late = False, 0

    @property
    def elapsed_s(self) -> float:
        return self._link.now

    def open(self, without: frozenset[int], limit_s: float = math.inf, levels: Mapping[int, str] | None = None) -> None:
        """The headers come first, and are waited for, as :class:`ragkv.store.remote.heads.Heads` does."""
        link, begin, self.opened = self._link, self._link.now, True
        asked = {n: link.ask(HEAD_BYTES) for n in range(len(self.layout.chunks)) if n not in without}
        link.wait(asked.values(), 1.1 * self.start_s + limit_s)
        late = {number for number, each in asked.items() if not each.done}
        self.late, self.start_s = len(late), self.start_s if late else link.now - begin
        self.spared = without | late

    @property
    def sensitivity(self) -> Tensor:
        return torch.rand(len(self.layout.reusable), generator=torch.Generator().manual_seed(0))


@dataclass
class Ran:
    """What a prompt took."""

    seconds: float
    method: str
    late: int
    seen: float | None
    start_s: float
    reckoned: dict[str, float] = field(default_factory=dict)


def simulate(
    method: ragkv.Method,
    layout: Layout,
    rates: Rates,
    token_bytes: float,
    link: Link,
    known: float | None,
    start_s: float = 0.0,
) -> Ran:
    """One prompt with all chunks in the pool."""
    remote = {} if known is None else {"remote": Loading(known, token_bytes, start_s, True)}
    view = Linked(layout, replace(rates, tiers={**rates.tiers, **remote}), link, start_s)
    selection = Selection.of(method.select(view), method)
    work = plan(selection, layout, 1)
    loaded = [] if work.first_stored else [number for number in range(len(layout.chunks)) if number not in work.whole]
    try:
        if loaded and not view.opened:
            view.open(work.whole)
        coming = Simulated(link, layout, rates, loaded, token_bytes, known)
        for part in Course(layout, work.rows, coming, selection.rates) if loaded else [work.rows]:
            coming.spend(rates.compute_s(len(part), int(part[-1]) + 1 - len(part)))
    except TimeoutError:
        return Ran(math.inf, selection.name, 0, None, 0.0)
    return Ran(link.now, selection.name, view.late + coming.late, coming.seen, view.start_s, dict(selection.reckoned))


def prompt(chunks: int, tokens: int) -> Layout:
    """Chunks that stand alone, and a question."""
    alone = [Chunk((number,) * tokens) for number in range(chunks)]
    return lay_out((0,), (), alone, (0,) * 32, torch.device("cpu"))


#: Tokens a second that are prefilled, and bytes of a token: a 6-layer model on one core; and one of 8B on a large accelerator, to
#: show that the arithmetic holds where speeds are a thousand times higher. There layers would be placed one by one.
MACHINES = {"small": (1_900.0, 4_736.0), "large": (28_300.0, 131_072.0)}


def figures(tokens_per_s: float, token_bytes: float) -> Rates:
    """Of a machine: a prefill gets slower by half behind 4,096 tokens, memory is placed at twenty times its speed."""
    token_s, forward_s = 1 / tokens_per_s, 8 / tokens_per_s  # a forward takes as long as eight tokens besides
    costs = CostProfile(
        (0, 4096),
        (0, 1, 4096),
        tuple((0.0, forward_s + more * token_s, forward_s + more * 4096 * token_s) for more in (1.0, 1.5)),
    )
    return Rates(costs, {"cpu": Loading(20 * tokens_per_s * token_bytes, token_bytes)})


def traces(speed: float, full_s: float) -> dict[str, Trace]:
    """What a link of a speed may do while a prompt is computed: a prompt before it has seen the speed."""
    return {
        "steady": [(0.0, speed)],
        "to a tenth at once": [(0.0, speed / 10)],
        "to nothing at once": [(0.0, 0.0)],
        "to nothing soon": [(0.0, speed), (0.05 * full_s, 0.0)],
        "to a tenth soon": [(0.0, speed), (0.05 * full_s, speed / 10)],
        "to nothing halfway": [(0.0, speed), (0.4 * full_s, 0.0)],
        "away for a moment": [(0.0, speed), (0.02 * full_s, 0.0), (0.2 * full_s, speed)],
        "ten times as fast": [(0.0, 10 * speed)],
    }


def prompts() -> Iterator[tuple[str, Layout, Rates, float]]:
    """Every machine and length: what it is called, its layout, what computing takes, and bytes of a token."""
    for name, (tokens_per_s, token_bytes) in MACHINES.items():
        for layout in (prompt(4, 128), prompt(8, 256), prompt(16, 256)):
            yield f"{name}, {len(layout.reusable):,} tokens", layout, figures(tokens_per_s, token_bytes), token_bytes


#: Tokens of the prompt, what the link does, whether its speed is known from the prompt before.
Case = tuple[int, str, str]


def over_links() -> dict[Case, list[tuple[float, float]]]:
    """Every prompt, speed and trace: how many times as long as the better of both, and as computing, Auto takes."""
    ratios: dict[Case, list[tuple[float, float]]] = {}
    for (_, layout, rates, token_bytes), speed in product(prompts(), SPEEDS.values()):
        same, full_s = (layout, rates, token_bytes), rates.compute_s(layout.tokens)
        before = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, speed)]), None)
        for kind, trace in traces(speed, full_s).items():
            loaded = simulate(ragkv.SensitiveTokens(), *same, Link(trace), None)
            for said, *known in (("not known", None), ("known", before.seen, before.start_s)):
                own = simulate(ragkv.Auto(), *same, Link(trace), *known)
                does = kind if kind in ("steady", "ten times as fast") else "drops"
                found = ratios.setdefault((len(layout.reusable), does, said), [])
                found.append((own.seconds / min(loaded.seconds, full_s), own.seconds / full_s))
    return ratios


def against_the_longer(speed: float) -> dict[str, float]:
    """How many times as long Auto takes as loading alone or computing alone, whichever is longer, by machine and tokens."""
    ratios = {}
    for name, layout, rates, token_bytes in prompts():
        same = layout, rates, token_bytes
        begin = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, speed)]), None)
        own = simulate(ragkv.Auto(), *same, Link([(0.0, speed)]), begin.seen, begin.start_s)
        here = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, 1e18)], 0.0), None)
        ratios[name] = own.seconds / max(len(layout.reusable) * token_bytes / speed, here.seconds)
    return ratios


def rate_at(trace: Trace, where: float) -> float:
    return next(rate for start, rate in reversed(trace) if start <= where)
