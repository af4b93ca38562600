"""Loading from a pool or computing, over links of many speeds: what Auto picks, and what that takes against loading and computing.

    python -P benchmarks/links.py [--rounds N] [--json FILE]

First on a clock of its own, where a link hands over bytes as a trace says and computing takes what a profile says: thousands of
seconds in a moment, exactly. The choice and the order of work are the library's own. Then in real time with the bundled model, over
a pool that is such a link.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ragkv
from ragkv import bundled
from ragkv.chunk import Chunk
from ragkv.fusion.compute import plan
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout, lay_out
from ragkv.fusion.view import Selection, View
from ragkv.machine import machine
from ragkv.store import CostProfile, Loading, Rates, RemoteTier, TieredStore
from ragkv.store.remote.opening import open_pool
from ragkv.store.remote.pool import Pool
from ragkv.store.source import Progress

SPEEDS = {
    f"{name}bit/s": bits / 8
    for name, bits in (("10 M", 1e7), ("100 M", 1e8), ("1 G", 1e9), ("10 G", 1e10), ("100 G", 1e11))
}
RANGE_BYTES, REQUESTS = 4 << 20, 16

#: From which time on how many bytes come in a second.
Trace = Sequence[tuple[float, float]]


@dataclass(eq=False)
class Request:
    """Bytes that were asked for."""

    size: int
    begins_s: float
    left: float
    done: bool = False
    gone: bool = False


class Link:
    """A network: requests share what it carries, so many at once, those that were made first.

    Args:
        trace: what it carries.
        latency_s: until a request's first byte.
    """

    def __init__(self, trace: Trace, latency_s: float = 0.001) -> None:
        self.trace, self.latency_s, self.now = list(trace), latency_s, 0.0
        self.open: list[Request] = []

    def ask(self, size: int) -> Request:
        self.open.append(Request(size, self.now + self.latency_s, size))
        return self.open[-1]

    def advance(self, until: float) -> list[Request]:
        """Goes on to a moment, or to the first at which a request is done; those that are."""
        while self.now < until:
            self.open = [each for each in self.open if not each.gone]
            served = self.open[:REQUESTS]
            active = [each for each in served if each.begins_s <= self.now]
            rate = next(rate for start, rate in reversed(self.trace) if start <= self.now) / max(1, len(active))
            least = min((each.left for each in active), default=math.inf)
            events = [until, *(start for start, _ in self.trace if start > self.now)]
            events += [each.begins_s for each in served if each.begins_s > self.now]
            done_s = self.now + least / rate if rate and active else math.inf
            then = min(*events, done_s)
            for each in active:
                each.left -= rate * (then - self.now)
            self.now = then
            done = [each for each in active if then == done_s and each.left <= least * 1e-9 + 1e-6]
            for each in done:
                each.done = True
                self.open.remove(each)
            if done:
                return done
        return []


class Simulated:
    """A prompt's chunks on a link, by their numbers; what the library calls them by.

    Args:
        link: with the clock.
        layout: the prompt.
        rates: what computing and placing take.
        numbers: of the chunks to load.
        known: bytes per second that the pool was seen to do before.
    """

    def __init__(
        self, link: Link, layout: Layout, rates: Rates, numbers: Sequence[int], token_bytes: float, known: float | None
    ):
        self.link, self.layout, self.rates, self.known = link, layout, rates, known
        self.left, self.late, self.seen = list(numbers), list[int](), known
        self.asked: dict[int, list[Request]] = {}
        self.sizes = {number: round(len(layout.chunks[number].chunk) * token_bytes) for number in numbers}
        self.began, self.placed = link.now, set[int]()

    def away(self) -> list[int]:
        return list(self.left)

    def begin(self) -> None:
        for number in reversed(self.left):
            size = self.sizes[number]
            self.asked[number] = [self.link.ask(min(RANGE_BYTES, size - at)) for at in range(0, size, RANGE_BYTES)]

    def here(self, number: int, limit_s: float) -> bool:
        if limit_s == math.inf and not self.link.trace[-1][1]:
            raise TimeoutError("the link is dead")
        until = self.link.now + min(limit_s, 1e7)
        while not all(request.done for request in self.asked[number]) and self.link.now < until:
            self.link.advance(until)
        self._look()
        return all(request.done for request in self.asked[number])

    def progress(self, number: int) -> Progress:
        asked = [request for each in self.asked.values() for request in each if not request.gone]
        came = sum(request.size for request in asked if request.done)
        return Progress(self.link.now - self.began, came, sum(request.size for request in asked) - came, self.known)

    def give_up(self, number: int) -> list[int]:
        found = self.progress(number)
        bound = (found.came + found.left) / max(found.since_s, 1e-6)
        self.seen = bound if self.seen is None else min(self.seen, bound)
        self.left.remove(number)
        self.late.append(number)
        for request in self.asked[number]:
            request.gone = True
        return [number]

    def place_front(self, stop: int) -> None:
        for number in self.left:
            if self.layout.chunks[number].start < stop and number not in self.placed:
                assert all(request.done for request in self.asked[number])
                self.placed.add(number)
                self.spend(self.rates.tiers["cpu"].seconds(len(self.layout.chunks[number].chunk)))

    def spend(self, seconds: float) -> None:
        """The processor works; the network does too."""
        until = self.link.now + seconds
        while self.link.now < until:
            self.link.advance(until)
        self._look()

    def _look(self) -> None:
        asked = [request for each in self.asked.values() for request in each]
        if asked and self.seen is self.known and all(request.done for request in asked):
            self.seen = sum(request.size for request in asked) / max(self.link.now - self.began, 1e-6)


class Looks:
    """What a view is told."""

    def __init__(self, layout: Layout, rates: Rates, tier: str):
        self._layout, self._rates, self._tier = layout, rates, tier

    def rates(self) -> Rates:
        return self._rates

    def tiers(self) -> list[str | None]:
        return [self._tier] * len(self._layout.chunks)

    def sensitivity(self) -> list[Tensor]:
        draw = torch.Generator().manual_seed(0)
        return [torch.rand(len(placed.chunk), generator=draw) for placed in self._layout.chunks]


@dataclass
class Ran:
    """What a prompt took."""

    seconds: float
    method: str
    late: int
    seen: float | None
    reckoned: dict[str, float] = field(default_factory=dict)


def simulate(
    method: ragkv.Method,
    layout: Layout,
    rates: Rates,
    token_bytes: float,
    link: Link,
    known: float | None,
    give_up: bool = True,
) -> Ran:
    """One prompt with all chunks in the pool, from now on."""
    tiers = dict(rates.tiers) if known is None else {**rates.tiers, "remote": Loading(known, token_bytes, 0.0, True)}
    began = link.now
    view = View(layout, 1, Looks(layout, replace(rates, tiers=tiers), "remote"))
    selection = Selection.of(method.select(view), method)
    work = plan(selection, layout, 1)
    loaded = [] if work.first_stored else [number for number in range(len(layout.chunks)) if number not in work.whole]
    coming = Simulated(link, layout, rates, loaded, token_bytes, known)
    course: Iterator[Tensor] = iter([work.rows])
    if loaded:
        course = iter(Course(layout, work.rows, coming, selection.rates))
    try:
        for part in course:
            coming.spend(rates.compute_s(len(part), int(part[-1]) + 1 - len(part)))
    except TimeoutError:
        return Ran(math.inf, selection.name, 0, None)
    link.open.clear()
    return Ran(link.now - began, selection.name, len(coming.late), coming.seen, dict(selection.reckoned))


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


def simulated() -> list[dict[str, Any]]:
    """Every machine, length, speed and trace; the speed known from the prompt before, and not known."""
    rows = []
    for name, (tokens_per_s, token_bytes) in MACHINES.items():
        rates = figures(tokens_per_s, token_bytes)
        for chunks, tokens in ((4, 128), (8, 256), (16, 256)):
            layout = prompt(chunks, tokens)
            full_s = rates.compute_s(layout.tokens)
            for said, speed in SPEEDS.items():
                for kind, trace in traces(speed, full_s).items():
                    same = layout, rates, token_bytes
                    loaded = simulate(ragkv.SensitiveTokens(), *same, Link(trace), None)
                    before = simulate(ragkv.SensitiveTokens(), *same, Link([(0.0, speed)]), None)
                    for known in (None, before.seen):
                        own = simulate(ragkv.Auto(), *same, Link(trace), known)
                        rows.append(
                            {
                                "machine": name, "chunks": chunks, "tokens": tokens, "link": said, "trace": kind,
                                "known": known is not None, "auto_s": own.seconds, "loaded_s": loaded.seconds,
                                "computed_s": full_s, "late": own.late, "picked": own.method,
                            }
                        )  # fmt: skip
    return rows


class LinkPool(Pool):
    """Another pool, behind a link in real time: requests one after the other.

    Args:
        pool: what is asked.
        trace: from how many bytes on how many come in a second; 0 for none any more, before the pool is closed.
    """

    def __init__(self, pool: Pool, trace: Trace) -> None:
        super().__init__(f"a link to {pool.name}")
        self.quick, self.trace, self.carried = True, trace, 0.0
        self._pool, self._closed = pool, threading.Event()
        self._asked: queue.SimpleQueue[tuple[Future[Any], str, int, int]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def begin(self, name: str, start: int, stop: int) -> Future[Any]:
        future: Future[Any] = Future()
        self._asked.put((future, name, start, stop))
        return future

    def _serve(self) -> None:
        while not self._closed.is_set():
            try:
                future, name, start, stop = self._asked.get(timeout=0.1)
            except queue.Empty:
                continue
            if not future.set_running_or_notify_cancel():
                continue
            data = self._pool.read(name, start, stop)
            self._carry(0 if data is None else len(data))
            future.set_result(data)

    def _carry(self, size: float) -> None:
        last, step_s = time.monotonic(), 0.002
        while size > 0 and not self._closed.wait(min(step_s, size / max(self._rate, 1e-9))):
            now = time.monotonic()
            came, last = min(size, self._rate * (now - last)), now
            size, self.carried = size - came, self.carried + came

    @property
    def _rate(self) -> float:
        return next(rate for start, rate in reversed(self.trace) if start <= self.carried)

    def write(self, name: str, data: bytes | bytearray, lifetime_s: float) -> None:
        self._pool.write(name, data, lifetime_s)

    def delete(self, name: str) -> None:
        self._pool.delete(name)

    def which(self, names: Sequence[str]) -> set[str]:
        return self._pool.which(names)

    def names(self) -> Iterator[tuple[str, int]]:
        return self._pool.names()

    def after_fork(self) -> None:
        self._pool.after_fork()

    def close(self) -> None:
        self._closed.set()
        self._pool.close()


def real(rounds: int) -> list[dict[str, Any]]:
    """The bundled model, 8 chunks of 128 tokens of two documents in a pool, over links; medians of rounds, in turn.

    Auto comes right after a prompt that has loaded everything over the same link, and so has seen how fast that is.
    """
    model, tokenizer = bundled.load()
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, 1_400, (count,), generator=draw).tolist()

    question, url, rows = ids(32), "memory://links", []
    with ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1 << 30, remote=url)) as engine:
        chunks = [chunk for _ in range(2) for chunk in engine.add_document([ids(128) for _ in range(4)])]
        engine.store.flush()
        rates = engine.advise(limit_s=8).rates
        size = sum(spec.token_bytes for spec in engine.decoder.specs) * sum(map(len, chunks))
    links: dict[str, tuple[float, Trace]] = {
        f"{bits / 1e6:,.0f} Mbit/s": (bits / 8, [(0.0, bits / 8)]) for bits in (1e7, 5e7, 1e8, 2e8, 1e9)
    }
    for bits in (1e8, 1e9):
        links[f"{bits / 1e6:,.0f} Mbit/s, nothing after half"] = bits / 8, [(0.0, bits / 8), (size / 2, 0.0)]
    for name, (speed, trace) in links.items():
        pool = LinkPool(open_pool(url, 3.0, REQUESTS), [(0.0, speed)])
        taken: dict[str, list[float]] = {"loaded": [], "computed": [], "auto": []}
        with ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1, remote=RemoteTier(pool))) as engine:
            for number in range(rounds + 1):
                for way, found in taken.items():
                    pool.trace, pool.carried = (trace if way == "auto" else [(0.0, speed)]), 0.0
                    seen = replace(rates, tiers={**rates.tiers, **engine.store.loading()})
                    methods = {
                        "loaded": ragkv.SensitiveTokens(),
                        "computed": ragkv.FullPrefill(),
                        "auto": ragkv.Auto(rates=seen),
                    }
                    begin = time.perf_counter()
                    report = engine.fuse(chunks, question, method=methods[way]).report
                    if number:  # the first round warms up
                        found.append(time.perf_counter() - begin)
                    pool.trace = [(0.0, speed)]
        medians = {f"{way}_s": statistics.median(found) for way, found in taken.items()}
        if len(trace) > 1:
            medians["loaded_s"] = math.inf
        rows.append(
            {"link": name, **medians, "picked": report.method, "hits": report.hits, "reckoned": report.reckoned}
        )
        print(
            name, {way: round(seconds, 3) for way, seconds in medians.items()}, report.method, report.hits, flush=True
        )
    return rows


def worst(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many times as long as the better of both, and as computing, Auto has taken at the most."""
    return {
        "cases": len(rows),
        "to the better": max(row["auto_s"] / min(row["loaded_s"], row["computed_s"]) for row in rows),
        "to computing": max(row["auto_s"] / row["computed_s"] for row in rows),
        "over 1.15": sum(row["auto_s"] > 1.15 * min(row["loaded_s"], row["computed_s"]) for row in rows),
        "over 1.10": sum(row["auto_s"] > 1.1 * row["computed_s"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the prompts in real time; 0 for none")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = simulated()
    for row in rows:
        kind = {"steady": "steady", "ten times as fast": "ten times as fast"}.get(row["trace"], "drops")
        row["case"] = (row["chunks"] * row["tokens"], kind, "known" if row["known"] else "not known")
    table = {
        case: worst([row for row in rows if row["case"] == case]) for case in dict.fromkeys(row["case"] for row in rows)
    }
    for (tokens, kind, known), found in table.items():
        most = f"{found['to the better']:.2f} of the better of both, {found['to computing']:.2f} of computing"
        over = f"{found['over 1.15']} and {found['over 1.10']} of {found['cases']} over 1.15 and 1.10"
        print(f"{tokens:5,} tokens, {kind:17}, speed {known:9}: at most {most} ({over})")
    measured = real(args.rounds) if args.rounds else []
    for row in measured:
        row["loaded_s"] = row["loaded_s"] if row["loaded_s"] < math.inf else None
    if args.json:
        about = {"date": date.today().isoformat(), "machine": machine(torch.device("cpu")), "rounds": args.rounds}
        args.json.write_text(
            json.dumps(
                {"conditions": about, "simulated": [[*case, found] for case, found in table.items()], "real": measured},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
