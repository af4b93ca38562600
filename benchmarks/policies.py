"""Eviction policies, and Belady's optimum, on streams of real passages with a real model's prefill times.

    python benchmarks/policies.py --dataset FILE [--model NAME] [--seeds N] [--json FILE] [--plot FILE]

FILE is JSON with ``ctxs`` of ``title`` and ``text``, or LongBench's JSONL. One stream is stationary, in the other favourites
change nine times.
"""

from __future__ import annotations

import argparse
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from transformers.utils import logging

from ragkv.chunk import digest
from ragkv.cli import show
from ragkv.errors import DocumentError, StoreFullError
from ragkv.library.costs import measure
from ragkv.library.reading import Reader
from ragkv.model.decoder import Decoder
from ragkv.model.loading import load_model
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import POLICIES, Policy, Usage
from ragkv.store.profile import CostProfile
from ragkv.store.terms import Terms
from ragkv.tokenizer import PrivateTokenizer

SHARES = (0.05, 0.1, 0.2, 0.4)
STREAMS = {"stationary": 1, "drifting": 10}
KINDS = {"token_hit_rate": "hit rate by tokens", "saved_s": "prefill seconds saved"}
MARKS = {"pgdsf": "o", "lru": "s", "lfu": "^", "gdsf": "x", "belady": "d"}  # where lines meet, both are seen
LIMIT_S = 10.0  # of measuring prefill times


@dataclass(frozen=True)
class Request:
    """One chunk that is asked for: its key, its bytes, its tokens, and the seconds that computing it takes."""

    key: bytes
    nbytes: int
    tokens: int
    cost_s: float


@dataclass(frozen=True)
class Outcome:
    """What a policy reached: shares of requests and tokens found; prefill seconds saved, and their share of all."""

    hit_rate: float
    token_hit_rate: float
    saved_s: float
    saved_share: float


#: By stream and policy, for each capacity an outcome of every seed.
Results = dict[str, dict[str, list[list[Outcome]]]]


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


class Tier:
    """A tier of the store as its planner sees it: the books, without the tensors."""

    def __init__(self, budget_bytes: int, policy: Policy, selective: bool) -> None:
        self.planner, self.selective = Planner(MemoryBooks(), policy, budget_bytes), selective

    def serve(self, request: Request) -> bool:
        """Whether it is there. What is missing is computed and put, unless it is larger than the tier."""
        row = self.planner.books.row(request.key)
        if row is not None and row.usage.size_bytes:
            self.planner.use(request.key, row)
            return True
        try:
            self.planner.admit(request.key, request.nbytes, Terms(cost_s=request.cost_s), selective=self.selective)
        except StoreFullError:
            pass
        return False


def replay(requests: Sequence[Request], policy: Policy, budget_bytes: int, *, selective: bool = False) -> Outcome:
    """Serves requests from a tier that is empty at first; ``selective`` admits only what is worth more than what it evicts."""
    tier, found = Tier(budget_bytes, policy, selective), []
    for position, request in enumerate(requests):
        if isinstance(policy, Belady):
            policy.position = position
        if tier.serve(request):
            found.append(request)
    saved, total = (sum(request.cost_s for request in some) for some in (found, requests))
    tokens, all_tokens = (sum(request.tokens for request in some) for some in (found, requests))
    return Outcome(len(found) / len(requests), tokens / all_tokens, saved, saved / total if total else 0.0)


def compare(requests: Sequence[Request], shares: Sequence[float]) -> dict[str, list[Outcome]]:
    """Every policy, Belady's among them, at capacities that are shares of the bytes of all that is asked for."""
    total = sum({request.key: request.nbytes for request in requests}.values())
    future = [request.key for request in requests]
    makers: dict[str, Callable[[], Policy]] = {**POLICIES, Belady.name: lambda: Belady(future)}
    return {name: [replay(requests, make(), int(share * total)) for share in shares] for name, make in makers.items()}


def zipf_stream(
    catalogue: Sequence[Request], length: int, exponent: float = 0.9, *, seed: int = 0, phases: int = 1
) -> list[Request]:
    """Requests whose popularity follows a Zipf law.

    Args:
        catalogue: what can be asked for.
        length: how many requests.
        exponent: of the law; the passage of rank r is asked for ``r ** -exponent`` times as often as the first.
        seed: of ranks and requests.
        phases: parts of equal length; with each, a tenth of the ranks on, so that what was popular no longer is. 1 for a
            stream whose popularity never changes.
    """
    chance = random.Random(seed)
    ranked = chance.sample(list(catalogue), len(catalogue))
    weights = [rank**-exponent for rank in range(1, len(ranked) + 1)]
    stream: list[Request] = []
    for phase in range(phases):
        shift = phase * len(ranked) // 10 % len(ranked)
        count = (phase + 1) * length // phases - len(stream)
        stream += chance.choices(ranked[shift:] + ranked[:shift], weights, k=count)
    return stream


def read_passages(file: Path) -> list[str]:
    """The passages of a dataset of one of the two forms above.

    Raises:
        DocumentError: the file is neither, or has none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            found = [f"{ctx['title']} {ctx['text']}" for row in json.loads(text) for ctx in row["ctxs"]]
        else:
            contexts = [json.loads(line)["context"] for line in text.split("\n") if line.strip()]
            found = [part.strip() for context in contexts for part in parts(context) if part.strip()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"{file} must be a JSON list of objects with 'ctxs', or JSONL of objects with 'context': {error!r}"
        ) from error
    if not found:
        raise DocumentError(f"{file}: no passages in it")
    return list(dict.fromkeys(found))


def parts(context: str) -> list[str]:
    """LongBench numbers the passages of several documents; one document is cut into paragraphs."""
    numbered = context.split("\nPassage ")
    return numbered if len(numbered) > 1 else context.split("\n\n")


def priced(passages: Sequence[str], model_name: str) -> tuple[list[Request], CostProfile]:
    """Passages with their tokens, their bytes of KV, and the seconds that the model prefills them in."""
    logging.disable_progress_bar()  # of loading weights
    model, tokenizer, *_ = load_model(model_name, None, {})
    decoder = Decoder(model)
    per_token = sum(s.heads * (s.key_dim + s.value_dim) * s.dtype.itemsize for s in decoder.specs)
    profile = measure(Reader(decoder, (), 512), decoder.max_positions or 1 << 30, LIMIT_S)
    counts = [max(len(ids), 1) for ids in PrivateTokenizer(tokenizer).plain(passages)]
    return [
        Request(digest(text), count * per_token, count, profile(0, count))
        for text, count in zip(passages, counts, strict=True)
    ], profile


def means(outcomes: Sequence[Sequence[Outcome]], what: str) -> list[float]:
    """The mean over the seeds, for each capacity."""
    return [mean(getattr(one, what) for one in runs) for runs in outcomes]


def as_dict(results: Results) -> dict[str, Any]:
    names = {"token_hit_rate": "token_hit_rate", "saved_seconds": "saved_s", "saved_share": "saved_share"}
    return {
        stream: {
            policy: {name: means(outcomes, what) for name, what in names.items()}
            for policy, outcomes in policies.items()
        }
        for stream, policies in results.items()
    }


def print_tables(results: Results) -> None:
    for stream, policies in results.items():
        for what, label in KINDS.items():
            print(f"\n{stream}: {label}, by the capacity in per cent of all passages' KV")
            rows: list[Sequence[str]] = [("", *(f"{share:.0%}" for share in SHARES))]
            for policy, outcomes in policies.items():
                values = means(outcomes, what)
                rows.append((policy, *(f"{value:.3f}" if value < 1 else f"{value:,.1f}" for value in values)))
            show.table(rows)


def plot(results: Results, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 8))
    panels = figure.subplots(2, len(results), squeeze=False)
    for column, (stream, policies) in enumerate(results.items()):
        for row, (what, label) in enumerate(KINDS.items()):
            panel = panels[row][column]
            for policy, outcomes in policies.items():
                line = "--" if policy == Belady.name else "-"
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
    parser.add_argument("--dataset", type=Path, required=True, metavar="FILE")
    parser.add_argument("--model", default="bundled", help="whose tokens and prefill times (default: bundled)")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--exponent", type=float, default=0.9, help="of the Zipf law")
    parser.add_argument("--seeds", type=int, default=3, help="streams to take means of")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="draw it, as PNG, PDF or SVG (needs matplotlib)")
    args = parser.parse_args()
    catalogue, profile = priced(read_passages(args.dataset), args.model)
    results: Results = {}
    for name, phases in STREAMS.items():
        seeds = show.progress(range(args.seeds), desc=name, unit=" streams")
        streams = (zipf_stream(catalogue, args.requests, args.exponent, seed=seed, phases=phases) for seed in seeds)
        runs = [compare(stream, SHARES) for stream in streams]
        results[name] = {policy: list(zip(*(one[policy] for one in runs), strict=True)) for policy in runs[0]}
    about = {
        "dataset": args.dataset.name,
        "model": args.model,
        "passages": len(catalogue),
        "mean_tokens": mean(request.tokens for request in catalogue),
        "requests": args.requests,
        "exponent": args.exponent,
        "seeds": args.seeds,
        "prefill_seconds": {str(count): profile(0, count) for count in profile.new},
        "capacities": list(SHARES),
    }
    print(", ".join(f"{name} {about[name]}" for name in ("passages", "mean_tokens", "requests", "exponent", "seeds")))
    print_tables(results)
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "streams": as_dict(results)}, indent=1))
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
