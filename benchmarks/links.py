"""Loading from a pool or computing, over links of many speeds: what Auto picks, and what that takes against loading and computing.

    python -P benchmarks/links.py [--rounds N] [--model PATH --dtype DTYPE] [--json FILE]

First on a clock of its own, where a link hands over bytes as a trace says and computing takes what a profile says: thousands of
seconds in a moment, exactly. The choice and the order of work are the library's own. Then in real time with the bundled model, over
a pool that is such a link.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ragkv
from ragkv import bundled
from ragkv.chunk import Chunk
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout, lay_out
from ragkv.fusion.plan import plan
from ragkv.fusion.view import Selection, View
from ragkv.machine import machine
from ragkv.model.loading import BUNDLED, load_model
from ragkv.store import CostProfile, Loading, Rates, RemoteTier, TieredStore
from ragkv.store.remote.objects import ObjectPool
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
            rate = _at(self.trace, self.now) / max(1, len(active))
            least = min((each.left for each in active), default=math.inf)
            done_s = self.now + least / rate if rate and active else math.inf
            changes = [*(start for start, _ in self.trace), *(each.begins_s for each in served)]
            then = min(until, done_s, *(change for change in changes if change > self.now))
            for each in active:
                each.left -= rate * (then - self.now)
                each.done = then == done_s and each.left <= least * 1e-9 + 1e-6
                done |= each.done
            self.now, self.open = then, [each for each in self.open if not each.done]


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
        self.link, self.rates, self.known = link, rates, known
        self.tokens = {number: len(layout.chunks[number].chunk) for number in numbers}
        self.starts = {number: layout.chunks[number].start for number in numbers}
        self.token_bytes, self.began, self.late, self.seen = token_bytes, link.now, 0, known
        self.asked: dict[int, list[Request]] = {}
        self.placed = set[int]()

    def away(self) -> list[int]:
        return list(self.tokens)

    def begin(self) -> None:
        for number, tokens in reversed(self.tokens.items()):
            size = round(tokens * self.token_bytes)
            self.asked[number] = [self.link.ask(min(RANGE_BYTES, size - at)) for at in range(0, size, RANGE_BYTES)]

    def here(self, number: int, limit_s: float) -> bool:
        if limit_s == math.inf and not self.link.trace[-1][1]:
            raise TimeoutError("the link is dead")
        until = self.link.now + min(limit_s, 1e7)
        while not self._done(number) and self.link.now < until:
            self.link.advance(until)
        self._look()
        return self._done(number)

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
            if self.starts[number] < stop:
                assert self._done(number)
                self.placed.add(number)
                self.spend(self.rates.tiers["cpu"].seconds(self.tokens[number]))

    def spend(self, seconds: float) -> None:
        """The processor works; the network does too."""
        until = self.link.now + seconds
        while self.link.now < until:
            self.link.advance(until)
        self._look()

    def _done(self, number: int) -> bool:
        return all(request.done for request in self.asked[number])

    def _look(self) -> None:
        found = self.progress(0)
        if found.came and not found.left and not self.late and self.seen is self.known:
            self.seen = found.came / max(found.since_s, 1e-6)


class Linked(View):
    """A view of a prompt all of whose chunks lie in a pool.

    Attributes:
        start_s: until it was known what is there, this time; else as given.
    """

    def __init__(self, layout: Layout, rates: Rates, tier: str, link: Link, start_s: float):
        super().__init__(layout, 1)
        self.rates, self.tiers = rates, [tier] * len(layout.chunks)
        self._link, self.start_s = link, start_s
        self.opened, self.late = False, 0

    @property
    def elapsed_s(self) -> float:
        return self._link.now

    def open(self, without: frozenset[int], limit_s: float = math.inf, levels: Mapping[int, str] | None = None) -> None:
        """The headers come first, and are waited for, as :class:`ragkv.store.remote.heads.Heads` does."""
        link, begin, self.opened = self._link, self._link.now, True
        asked = {n: link.ask(HEAD_BYTES) for n in range(len(self.layout.chunks)) if n not in without}
        if limit_s == math.inf and not link.trace[-1][1]:
            raise TimeoutError("the link is dead")
        until = begin + min(1.1 * self.start_s + limit_s, 1e7)
        while link.now < until and not all(each.done for each in asked.values()):
            link.advance(until)
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
    tiers = (
        dict(rates.tiers) if known is None else {**rates.tiers, "remote": Loading(known, token_bytes, start_s, True)}
    )
    view = Linked(layout, replace(rates, tiers=tiers), "remote", link, start_s)
    selection = Selection.of(method.select(view), method)
    work = plan(selection, layout, 1)
    loaded = [] if work.first_stored else [number for number in range(len(layout.chunks)) if number not in work.whole]
    if loaded and not view.opened:
        try:
            view.open(work.whole, math.inf, {})
        except TimeoutError:
            return Ran(math.inf, selection.name, 0, None, 0.0)
    coming = Simulated(link, layout, rates, loaded, token_bytes, known)
    course = Course(layout, work.rows, coming, selection.rates) if loaded else [work.rows]
    try:
        for part in course:
            coming.spend(rates.compute_s(len(part), int(part[-1]) + 1 - len(part)))
    except TimeoutError:
        return Ran(math.inf, selection.name, 0, None, 0.0)
    return Ran(link.now, selection.name, view.late + coming.late, coming.seen, view.start_s, dict(selection.reckoned))


def prompt(chunks: int, tokens: int, question: int = 32) -> Layout:
    """Chunks of two documents that stand alone, and a question."""
    return lay_out(
        (0,), (), [Chunk((number,) * tokens) for number in range(chunks)], (0,) * question, torch.device("cpu")
    )


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


#: Tokens of the prompt, what the link does, whether its speed is known from the prompt before.
Case = tuple[int, str, str]


def simulated() -> dict[Case, list[tuple[float, float]]]:
    """Every machine, length, speed and trace: how many times as long as the better of both, and as computing, Auto takes."""
    ratios: dict[Case, list[tuple[float, float]]] = {}
    for tokens_per_s, token_bytes in MACHINES.values():
        rates = figures(tokens_per_s, token_bytes)
        for layout in (prompt(4, 128), prompt(8, 256), prompt(16, 256)):
            same, full_s = (layout, rates, token_bytes), rates.compute_s(layout.tokens)
            for speed in SPEEDS.values():
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
    for name, (tokens_per_s, token_bytes) in MACHINES.items():
        for layout in (prompt(4, 128), prompt(8, 256), prompt(16, 256)):
            same = layout, figures(tokens_per_s, token_bytes), token_bytes
            begin = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, speed)]), None)
            own = simulate(ragkv.Auto(), *same, Link([(0.0, speed)]), begin.seen, begin.start_s)
            here = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, 1e18)], 0.0), None)
            load_s = len(layout.reusable) * token_bytes / speed
            ratios[f"{name}, {len(layout.reusable):,} tokens"] = own.seconds / max(load_s, here.seconds)
    return ratios


def _at(trace: Trace, where: float) -> float:
    return next(rate for start, rate in reversed(trace) if start <= where)


class LinkPool(ObjectPool):
    """A pool behind a link in real time: requests one after the other.

    Attributes:
        trace: from how many bytes on how many come in a second; 0 for none any more, before the pool is closed.
        carried: bytes so far.
    """

    trace: Trace = ((0.0, math.inf),)
    carried: float = 0.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._line, self._over = ThreadPoolExecutor(1), threading.Event()

    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        return self._line.submit(self._carry, super().begin(name, start, stop))

    def _carry(self, asked: Future[Any]) -> Any:
        data = self.answer(asked)
        left, last, step_s = float(len(data or b"")), time.monotonic(), 0.002
        while left > 0 and not self._over.wait(min(step_s, left / max(_at(self.trace, self.carried), 1e-9))):
            now = time.monotonic()
            came, last = min(left, _at(self.trace, self.carried) * (now - last)), now
            left, self.carried = left - came, self.carried + came
        return data

    def close(self) -> None:
        self._over.set()
        self._line.shutdown(cancel_futures=True)
        super().close()


def at_ten(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """In real time at 10 Gbit/s: a question with all chunks in a pool, the same with them in memory, and loading them alone."""
    engine, chunks, question, url = filled(model, tokenizer)
    pool = LinkPool.open(url, 3.0, REQUESTS)
    pool.trace = [(0.0, SPEEDS["10 Gbit/s"])]
    taken: dict[str, list[float]] = {"remote": [], "memory": [], "load": []}
    with engine, ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1, remote=RemoteTier(pool))) as far:
        keys, rates = [engine.documents.key(chunk) for chunk in chunks], engine.advise(limit_s=8).rates
        for number in range(rounds + 1):
            for way, found in taken.items():
                seen = replace(rates, tiers={**rates.tiers, **far.store.loading()})
                asked = far if way == "remote" else engine
                begin = time.perf_counter()
                if way == "load":
                    with far.store.read(keys) as batch:
                        batch.begin()
                        for index in range(len(keys)):
                            batch.layer(index, 0)
                            batch.done(index)
                else:
                    report = asked.fuse(chunks, question, method=ragkv.Auto(rates=seen)).report
                if number:  # the first round warms up
                    found.append(time.perf_counter() - begin)
    longer = [max(pair) for pair in zip(taken["memory"], taken["load"], strict=True)]
    ratio = statistics.median(far / most for far, most in zip(taken["remote"], longer, strict=True))
    medians = {f"{way}_s": statistics.median(found) for way, found in taken.items()}
    return {**medians, "to the longer": ratio, "picked": report.method}


def filled(model: Any, tokenizer: Any) -> tuple[ragkv.Engine, list[Chunk], list[int], str]:
    """A machine that has 8 chunks of 128 tokens of two documents in memory and in a pool, a question, and the pool."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, 1_400, (count,), generator=draw).tolist()

    url = "memory://links"
    engine = ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1 << 30, remote=url))
    question = ids(32)
    chunks = [chunk for _ in range(2) for chunk in engine.add_document([ids(128) for _ in range(4)])]
    engine.store.flush()
    return engine, chunks, question, url


def real(rounds: int) -> list[dict[str, Any]]:
    """The bundled model, 8 chunks of 128 tokens of two documents in a pool, over links; medians of rounds, in turn.

    Auto comes right after a prompt that has loaded everything over the same link, and so has seen how fast that is.
    """
    (model, tokenizer), rows = bundled.load(), list[dict[str, Any]]()
    engine, chunks, question, url = filled(model, tokenizer)
    with engine:
        rates = engine.advise(limit_s=8).rates
        size = sum(spec.token_bytes for spec in engine.decoder.specs) * sum(map(len, chunks))
    links: list[tuple[str, float, Trace]] = [
        (f"{bits / 1e6:,.0f} Mbit/s", bits / 8, [(0.0, bits / 8)]) for bits in (1e7, 5e7, 1e8, 2e8, 1e9)
    ]
    links += [(f"{name}, nothing after half", speed, [(0.0, speed), (size / 2, 0.0)]) for name, speed, _ in links[2::2]]
    for name, speed, trace in links:
        pool = LinkPool.open(url, 3.0, REQUESTS)
        taken: dict[str, list[float]] = {"loaded": [], "computed": [], "auto": []}
        with ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1, remote=RemoteTier(pool))) as engine:
            for number in range(rounds + 1):
                for way, found in taken.items():
                    pool.trace, pool.carried = (trace if way == "auto" else [(0.0, speed)]), 0.0
                    seen = replace(rates, tiers={**rates.tiers, **engine.store.loading()})
                    methods = {
                        "loaded": ragkv.SensitiveTokens(), "computed": ragkv.FullPrefill(), "auto": ragkv.Auto(rates=seen)
                    }  # fmt: skip
                    begin = time.perf_counter()
                    report = engine.fuse(chunks, question, method=methods[way]).report
                    if number:  # the first round warms up
                        found.append(time.perf_counter() - begin)
                    pool.trace = [(0.0, speed)]
        medians: dict[str, float | None] = {f"{way}_s": statistics.median(found) for way, found in taken.items()}
        if len(trace) > 1:
            medians["loaded_s"] = None  # never
        row = {"link": name, **medians, "picked": report.method, "hits": report.hits, "reckoned": report.reckoned}
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the prompts in real time; 0 for none")
    parser.add_argument("--model", default=BUNDLED, help="in place of the bundled one, at 10 Gbit/s alone")
    parser.add_argument("--dtype")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for case, ratios in simulated().items():
        (better, computing), count = (max(column) for column in zip(*ratios, strict=True)), len(ratios)
        over = [sum(better > 1.15 for better, _ in ratios), sum(computing > 1.1 for _, computing in ratios)]
        print(
            f"{case[0]:5,} tokens, {case[1]:17}, speed {case[2]:9}: at most {better:.2f} of the better of both, {computing:.2f} of "
            f"computing ({over[0]} and {over[1]} of {count} over 1.15 and 1.10)"
        )
        found = {"cases": count, "to the better": better, "to computing": computing}
        table.append([*case, found | {"over 1.15": over[0], "over 1.10": over[1]}])
    ten = against_the_longer(SPEEDS["10 Gbit/s"])
    print(
        "at 10 Gbit/s against the longer of loading and computing:",
        {name: f"{ratio:.2f}" for name, ratio in ten.items()},
    )
    measured = []
    if args.rounds:
        model, tokenizer, *_ = load_model(args.model, None, {"dtype": args.dtype} if args.dtype else {})
        measured = [at_ten(model, tokenizer, args.rounds)]
        print(measured[0], flush=True)
        measured += [] if args.model != BUNDLED else real(args.rounds)
    if args.json:
        about = {"date": date.today().isoformat(), "machine": machine(torch.device("cpu")), "rounds": args.rounds}
        found = {"conditions": about, "simulated": table, "10 Gbit/s, to the longer": ten, "real": measured}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
