"""Loading from a pool or computing, over links of many speeds: what Auto picks, and what that takes against loading and computing.

    python benchmarks/links.py [--rounds N] [--model PATH --dtype DTYPE] [--json FILE]

First on a clock of its own (simulation.py), then in real time with the bundled model, over a pool that is such a link.
"""

from __future__ import annotations

import argparse
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from simulation import REQUESTS, SPEEDS, Trace, against_the_longer, over_links, rate_at

import ragkv
from ragkv import bundled
from ragkv.chunk import Chunk
from ragkv.machine import machine
from ragkv.model.loading import BUNDLED, load_model
from ragkv.report import FusionReport
from ragkv.store import Rates, RemoteTier, TieredStore
from ragkv.store.remote.objects import ObjectPool


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
        while left > 0 and not self._over.wait(min(step_s, left / max(rate_at(self.trace, self.carried), 1e-9))):
            now = time.monotonic()
            came, last = min(left, rate_at(self.trace, self.carried) * (now - last)), now
            left, self.carried = left - came, self.carried + came
        return data

    def close(self) -> None:
        self._over.set()
        self._line.shutdown(cancel_futures=True)
        super().close()


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


def auto(rates: Rates, store: TieredStore) -> ragkv.Method:
    """It knows how fast the pool was lately."""
    return ragkv.Auto(rates=replace(rates, tiers={**rates.tiers, **store.loading()}))


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every way, one after the other in each round, and what it gave at last; the first round warms up."""
    taken, given = {way: list[float]() for way in ways}, dict[str, Any]()
    for number in range(rounds + 1):
        for way, work in ways.items():
            begin = time.perf_counter()
            given[way] = work()
            taken[way] += [time.perf_counter() - begin] if number else []
    return taken, given


def at_ten(model: Any, tokenizer: Any, rounds: int) -> dict[str, Any]:
    """In real time at 10 Gbit/s: a question with all chunks in a pool, the same with them in memory, and loading them alone."""
    engine, chunks, question, url = filled(model, tokenizer)
    pool = LinkPool.open(url, 3.0, REQUESTS)
    pool.trace = [(0.0, SPEEDS["10 Gbit/s"])]
    with engine, ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1, remote=RemoteTier(pool))) as far:
        keys, rates = [engine.documents.key(chunk) for chunk in chunks], engine.advise(limit_s=8).rates

        def fuse(asked: ragkv.Engine) -> str:
            return asked.fuse(chunks, question, method=auto(rates, far.store)).report.method

        def load() -> None:
            with far.store.read(keys) as batch:
                batch.begin()
                for index in range(len(keys)):
                    batch.layer(index, 0)
                    batch.done(index)

        taken, given = in_turn({"remote": lambda: fuse(far), "memory": lambda: fuse(engine), "load": load}, rounds)
    longer = map(max, taken["memory"], taken["load"])
    ratio = median(remote / most for remote, most in zip(taken["remote"], longer, strict=True))
    medians = {f"{way}_s": median(found) for way, found in taken.items()}
    return {**medians, "to the longer": ratio, "picked": given["remote"]}


def real(rounds: int) -> list[dict[str, Any]]:
    """The bundled model, 8 chunks of 128 tokens of two documents in a pool, over links; medians of rounds, in turn.

    Auto comes right after a prompt that has loaded everything over the same link, and so has seen how fast that is.
    """
    model, tokenizer = bundled.load()
    engine, chunks, question, url = filled(model, tokenizer)
    with engine:
        rates = engine.advise(limit_s=8).rates
        size = sum(spec.token_bytes for spec in engine.decoder.specs) * sum(map(len, chunks))

    def over(link: str, speed: float, dropping: Trace = ()) -> dict[str, Any]:
        pool, steady = LinkPool.open(url, 3.0, REQUESTS), [(0.0, speed)]
        with ragkv.Engine(model, tokenizer, store=TieredStore(cpu_bytes=1, remote=RemoteTier(pool))) as far:

            def fuse(method: ragkv.Method, trace: Trace) -> FusionReport:
                pool.trace, pool.carried = trace, 0.0
                report = far.fuse(chunks, question, method=method).report
                pool.trace = steady  # what is on its way of a link that drops comes
                return report

            ways: dict[str, Callable[[], FusionReport]] = {
                "loaded": lambda: fuse(ragkv.SensitiveTokens(), steady),
                "computed": lambda: fuse(ragkv.FullPrefill(), steady),
                "auto": lambda: fuse(auto(rates, far.store), dropping or steady),
            }
            taken, given = in_turn(ways, rounds)
        medians = {f"{way}_s": None if dropping and way == "loaded" else median(found) for way, found in taken.items()}
        report = given["auto"]
        row = {"link": link, **medians, "picked": report.method, "hits": report.hits, "reckoned": report.reckoned}
        print(row, flush=True)
        return row

    links = {f"{bits / 1e6:,.0f} Mbit/s": bits / 8 for bits in (1e7, 5e7, 1e8, 2e8, 1e9)}
    rows = [over(link, speed) for link, speed in links.items()]
    for link in ("100 Mbit/s", "1,000 Mbit/s"):
        rows.append(over(f"{link}, nothing after half", links[link], [(0.0, links[link]), (size / 2, 0.0)]))
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
    for case, ratios in over_links().items():
        (better, computing), count = (max(column) for column in zip(*ratios, strict=True)), len(ratios)
        over = [sum(better > 1.15 for better, _ in ratios), sum(computing > 1.1 for _, computing in ratios)]
        print(
            f"{case[0]:5,} tokens, {case[1]:17}, speed {case[2]:9}: at most {better:.2f} of the better of both, {computing:.2f} of "
            f"computing ({over[0]} and {over[1]} of {count} over 1.15 and 1.10)"
        )
        found = {"cases": count, "to the better": better, "to computing": computing}
        table.append([*case, found | {"over 1.15": over[0], "over 1.10": over[1]}])
    ten = against_the_longer(SPEEDS["10 Gbit/s"])
    shown = {name: f"{ratio:.2f}" for name, ratio in ten.items()}
    print("at 10 Gbit/s against the longer of loading and computing:", shown)
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
