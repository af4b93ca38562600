"""Eviction policies beside Belady, and what is worth keeping, on streams of questions.

    python benchmarks/policies.py --dataset FILE          # each question is asked about one of a file's passages
    python benchmarks/policies.py --from-questions FILE   # questions of a data set, with what ragkv's retrieval finds for each
    python benchmarks/policies.py --trace FILE            # a log: a line a question, {"chunks": [[key, tokens], ...]}

A dataset is JSON with ``ctxs`` of ``title`` and ``text``, or LongBench's JSONL; questions are those of ``ragkv eval``. What is made
of them is asked for by a Zipf law: stationary; drifting, where favourites change; and in sessions, each on one topic.
A log may be what ``ragkv ask --batch QUESTIONS --out FILE`` wrote, see streams.py. Prefill times are recorded ones, or those of
``--model``, measured now. ``--json FILE`` keeps the figures, ``--plot FILE`` draws them.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from streams import Question, Request, from_questions, made, pricing, read_passages, read_trace
from units import UNITS, saved_share

from ragkv.cli import show
from ragkv.errors import StoreFullError
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import POLICIES, Policy, Usage
from ragkv.store.terms import Terms

RECORDED = Path(__file__).parent / "results" / "store-policies.json"
SHARES = (0.05, 0.1, 0.2, 0.4)
KINDS = {"token_hit_rate": "hit rate by tokens", "saved_s": "prefill seconds saved"}
MARKS = {"pgdsf": "o", "lrfu": "v", "lru": "s", "lfu": "^", "gdsf": "x", "belady": "d", "popularity": "+"}
WITH = ("pgdsf", "lrfu")  # policies that units are kept by
#: Student's t for 95 % of both sides, by the degrees of freedom.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Outcome:
    """What a policy reached: shares of requests and tokens found; prefill seconds saved, and their share of all."""

    hit_rate: float
    token_hit_rate: float
    saved_s: float
    saved_share: float


#: By stream and policy, for each capacity an outcome of every seed.
Results = dict[str, dict[str, list[list[Outcome]]]]
#: By stream, policy and unit, for each capacity the share of tokens that every seed saves.
Kept = dict[str, dict[str, dict[str, list[list[float]]]]]


class Belady(Policy):
    """The entry whose next use is furthest away goes first (IBM Systems Journal 5(2), 1966). It must be told the future.

    Optimal in hits for entries of one size; for mixed sizes a strong reference, not a bound.

    Args:
        stream: the keys of all requests to come, in order.

    Attributes:
        position: index into ``stream`` of the request that is being served; whoever serves sets it.
    """

    name = "belady"
    uses_costs = False

    def __init__(self, stream: Sequence[bytes]) -> None:
        self.position = 0
        self._end = len(stream)
        self._uses: dict[bytes, list[int]] = {}
        for index, key in enumerate(stream):
            self._uses.setdefault(key, []).append(index)

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class: the end of the stream less the next use."""
        uses = self._uses.get(key, [])
        at = bisect_right(uses, self.position)
        return float(self._end - uses[at]) if at < len(uses) else 0.0


class Popularity(Policy):
    """What saves the most in the whole stream by its bytes stays: all that can be known of a stationary stream but the future.

    Args:
        stream: the keys of all requests to come.
    """

    name = "popularity"

    def __init__(self, stream: Sequence[bytes]) -> None:
        self._uses = Counter(stream)

    def priority(self, key: bytes, usage: Usage, clock: float) -> float:
        """See the class."""
        return self._uses[key] * (usage.cost_s or 1.0) / usage.size_bytes


def replay(requests: Sequence[Request], policy: Policy, budget_bytes: int, *, selective: bool = False) -> Outcome:
    """Serves requests from a tier, its books without the tensors, that is empty at first.

    What is missing is computed and put, unless it is larger than the tier; ``selective``: only what is worth more than it evicts.
    """
    planner, found = Planner(MemoryBooks(), policy, budget_bytes), []
    for position, request in enumerate(requests):
        if isinstance(policy, Belady):
            policy.position = position
        row = planner.books.row(request.key)
        if row is not None and row.usage.size_bytes:
            planner.use(request.key, row)
            found.append(request)
            continue
        with suppress(StoreFullError):
            planner.admit(request.key, request.tokens, Terms(cost_s=request.cost_s), selective=selective)
    saved, total = (sum(request.cost_s for request in some) for some in (found, requests))
    tokens, all_tokens = (sum(request.tokens for request in some) for some in (found, requests))
    return Outcome(len(found) / len(requests), tokens / all_tokens, saved, saved / total if total else 0.0)


def compare(requests: Sequence[Request], shares: Sequence[float]) -> dict[str, list[Outcome]]:
    """Every policy, and two that know what is to come, at capacities that are shares of the bytes of all that is asked for."""
    total = sum({request.key: request.tokens for request in requests}.values())
    future = [request.key for request in requests]
    makers: dict[str, Callable[[], Policy]] = {
        **POLICIES,
        Belady.name: lambda: Belady(future),
        Popularity.name: lambda: Popularity(future),
    }
    return {name: [replay(requests, make(), int(share * total)) for share in shares] for name, make in makers.items()}


def means(outcomes: Sequence[Sequence[Outcome]], what: str) -> list[float]:
    """The mean over the seeds, for each capacity."""
    return [mean(getattr(one, what) for one in runs) for runs in outcomes]


def beyond(outcomes: Sequence[Sequence[Outcome]], others: Sequence[Sequence[Outcome]]) -> list[tuple[float, float]]:
    """For each capacity, by how much the share of seconds saved is larger than another policy's, seed by seed: mean, and half of
    its 95 % interval (infinite for one seed).
    """
    found = []
    for ours, theirs in zip(outcomes, others, strict=True):
        gains = [one.saved_share - other.saved_share for one, other in zip(ours, theirs, strict=True)]
        free = len(gains) - 1
        width = T95[min(free, len(T95)) - 1] * stdev(gains) / len(gains) ** 0.5 if free else float("inf")
        found.append((mean(gains), width))
    return found


def as_dict(results: Results) -> dict[str, Any]:
    names = {"token_hit_rate": "token_hit_rate", "saved_seconds": "saved_s", "saved_share": "saved_share"}
    return {
        stream: {
            policy: {
                **{name: means(outcomes, what) for name, what in names.items()},
                "saved_share_less_pgdsf": [
                    {"mean": gain, "half_of_95_percent": width if width < float("inf") else None}
                    for gain, width in beyond(outcomes, policies["pgdsf"])
                ],
            }
            for policy, outcomes in policies.items()
        }
        for stream, policies in results.items()
    }


def print_tables(results: Results) -> None:
    capacities = ("", *(f"{share:.0%}" for share in SHARES))
    for stream, policies in results.items():
        for what, label in KINDS.items():
            print(f"\n{stream}: {label}, by the capacity in per cent of all passages' KV")
            rows: list[Sequence[str]] = [capacities]
            for policy, outcomes in policies.items():
                values = means(outcomes, what)
                rows.append((policy, *(f"{value:.3f}" if value < 1 else f"{value:,.1f}" for value in values)))
            show.table(rows)
        print(
            f"\n{stream}: seconds saved, in per cent of Belady's (more than PGDSF, of all seconds, with 95 % of the seeds' mean)"
        )
        best, rows = means(policies[Belady.name], "saved_share"), [capacities]
        for policy, outcomes in policies.items():
            shares = (
                share / most if most else 1.0 for share, most in zip(means(outcomes, "saved_share"), best, strict=True)
            )
            gains = beyond(outcomes, policies["pgdsf"])
            cells = zip(shares, gains, strict=True)
            rows.append((policy, *(f"{share:.1%} ({gain:+.1%} ± {width:.1%})" for share, (gain, width) in cells)))
        show.table(rows)


def keep(streams: Sequence[Sequence[Question]], repair: float) -> dict[str, dict[str, list[list[float]]]]:
    """By policy and unit, for each capacity the share of tokens that is saved in each stream."""
    totals = [sum({one.key: one.tokens for question in stream for one in question}.values()) for stream in streams]
    return {
        policy: {
            unit: [
                [
                    saved_share(unit, stream, POLICIES[policy](), int(share * total), repair)
                    for stream, total in zip(streams, totals, strict=True)
                ]
                for share in SHARES
            ]
            for unit in UNITS
        }
        for policy in WITH
    }


def print_units(kept: Kept, repair: float) -> None:
    for stream, policies in kept.items():
        print(
            f"\n{stream}: share of tokens that are not computed, {repair:.0%} of a moved chunk's are, by what is kept"
        )
        rows: list[Sequence[str]] = [("", *(f"{share:.0%}" for share in SHARES))]
        for policy, units in policies.items():
            rows += [(f"{unit}, {policy}", *(f"{mean(shares):.3f}" for shares in runs)) for unit, runs in units.items()]
        show.table(rows)


def plot(results: Results, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 8))
    panels = figure.subplots(2, len(results), squeeze=False)
    for column, (stream, policies) in enumerate(results.items()):
        for row, (what, label) in enumerate(KINDS.items()):
            panel = panels[row][column]
            for policy, outcomes in policies.items():
                line = "--" if policy in (Belady.name, Popularity.name) else "-"
                panel.plot(SHARES, means(outcomes, what), marker=MARKS[policy], linestyle=line, label=policy, alpha=0.8)
            panel.set(title=stream, xlabel="capacity, share of all passages' KV", ylabel=label, xscale="log")
            panel.set_xticks(SHARES, [f"{share:.0%}" for share in SHARES])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    for name in ("--dataset", "--from-questions", "--trace"):
        source.add_argument(name, type=Path, metavar="FILE")
    parser.add_argument(
        "--model", help="whose tokens and prefill times (default: the bundled one's, as they were recorded)"
    )
    parser.add_argument("--top-k", type=int, default=5, help="passages for a question")
    parser.add_argument("--questions", type=int, default=20_000, help="of a made stream")
    parser.add_argument("--exponent", type=float, default=0.9, help="of the Zipf law")
    parser.add_argument("--phases", type=int, default=10, help="of the drifting stream: favourites change at each")
    parser.add_argument("--seeds", type=int, default=3, help="streams to take means of")
    parser.add_argument("--repair", type=float, default=0.1, help="share of a moved chunk's tokens that are computed")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="draw it, as PNG, PDF or SVG (needs matplotlib)")
    args = parser.parse_args()
    priced, profile = pricing(args.model, RECORDED)
    if args.trace is not None:
        logged = read_trace(args.trace, lambda tokens: profile(0, tokens))
        streams, catalogue = {"as it was logged": [logged]}, logged
    else:
        if args.dataset is not None:
            catalogue = [[one] for one in priced(read_passages(args.dataset))]
        else:
            catalogue = from_questions(args.from_questions, args.top_k, priced)
        seeds = [made(catalogue, args.questions, args.exponent, args.phases, seed) for seed in range(args.seeds)]
        streams = {name: [one[name] for one in seeds] for name in seeds[0]}
    passages = {one.key: one.tokens for question in catalogue for one in question}
    results: Results = {}
    kept: Kept = {}
    for name, same in streams.items():
        runs = [
            compare(list(chain.from_iterable(stream)), SHARES)
            for stream in show.progress(same, desc=name, unit=" streams")
        ]
        results[name] = {
            policy: [list(each) for each in zip(*(one[policy] for one in runs), strict=True)] for policy in runs[0]
        }
        if any(len(question) > 1 for question in catalogue):
            kept[name] = keep(same, args.repair)
    about = {
        "data": (args.trace or args.dataset or args.from_questions).name,
        "model": args.model or "bundled, as recorded",
        "passages": len(passages),
        "mean_tokens": mean(passages.values()),
        "questions": len(next(iter(streams.values()))[0]),
        "exponent": None if args.trace else args.exponent,
        "phases": None if args.trace else args.phases,
        "seeds": 1 if args.trace else args.seeds,
        "prefill_seconds": {str(count): profile(0, count) for count in profile.new},
        "capacities": list(SHARES),
    }
    print(", ".join(f"{name} {about[name]}" for name in ("passages", "mean_tokens", "questions", "exponent", "seeds")))
    print_tables(results)
    print_units(kept, args.repair)
    if args.json is not None:
        units = {"repair": args.repair, "saved_token_share": kept} if kept else {}
        args.json.write_text(json.dumps({**about, "streams": as_dict(results), "units": units}, indent=1))
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
