"""Replicas over one stream of questions: what a shared pool and routing are worth, simulated.

    python benchmarks/scale.py [--replicas N] [--documents N] [--questions N] [--zipf X] [--load X] [--answer-s X] [--tokens N]
        [--token-bytes N] [--prefill TOKENS_A_SECOND] [--local GIB] [--disk-rate BYTES_A_SECOND] [--pool-gbit X] [--pool-ms X]
        [--bound X] [--seed N] [--json FILE]

Documents have 20 chunks. Questions come as a Poisson stream: three chunks of one document, and one each of two more, documents by
Zipf's law. They go to the replica with least to do, or where :func:`ragkv.route` says. A replica loads chunks that it holds from
its own disk, takes others from the pool or computes them, whichever is quicker, and computes the question: one question at a time,
in order. Answers are decoded beside that. What it took it keeps; the least recently used goes. The first token comes when the
question is computed; waiting in line counts. ``--load`` is how busy replicas would be if every chunk were computed. The defaults
are a model of 8B, KV in int8, on a GPU such as an H200: see docs/scale.md.

Nothing of it is measured but what is given: it compares designs.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from ragkv import route

QUESTION_TOKENS, OF_ONE, CHUNKS = 64, 20, 5
ORIGINS = ("local", "pool", "computed")
DESIGNS = {"local": (False, False), "local, routed": (False, True), "pool": (True, False), "pool, routed": (True, True)}


class Replica:
    """A server with a disk of its own."""

    def __init__(self, chunks: int):
        self.held: OrderedDict[int, None] = OrderedDict()
        self.free_s: float = 0.0
        self.ends: list[float] = []
        self._room = chunks

    def waiting(self, now: float) -> int:
        """Questions that it has to do."""
        self.ends = [end for end in self.ends if end > now]
        return len(self.ends)

    def keep(self, chunk: int) -> None:
        """Hold a chunk, as the one used last."""
        self.held[chunk] = None
        self.held.move_to_end(chunk)
        if len(self.held) > self._room:
            self.held.popitem(last=False)


def simulated(args: argparse.Namespace, pooled: bool, routed: bool) -> dict[str, Any]:
    """One design over the stream."""
    draw = random.Random(args.seed)
    size = args.tokens * args.token_bytes
    local_s, compute_s = size / args.disk_rate, args.tokens / args.prefill
    pool_s = size / (args.pool_gbit * 1e9 / 8)
    question_s = QUESTION_TOKENS / args.prefill
    whole_s = CHUNKS * compute_s + question_s
    replicas = {f"replica-{number}": Replica(int(args.local * (1 << 30) / size)) for number in range(args.replicas)}
    weights = list(accumulate(rank**-args.zipf for rank in range(1, args.documents + 1)))
    pool, origins, firsts, now = set[int](), Counter[str](), list[float](), 0.0
    for number in range(3 * args.questions):  # the first two thirds fill the stores
        now += draw.expovariate(args.load * args.replicas / whole_s)
        most, *others = draw.choices(range(args.documents), cum_weights=weights, k=3)
        documents = [most, most, most, *others]
        places = [*draw.sample(range(OF_ONE), 3), *draw.choices(range(OF_ONE), k=2)]
        chunks = [document * OF_ONE + one for document, one in zip(documents, places, strict=True)]
        loads = {name: one.waiting(now) for name, one in replicas.items()}
        idle = [name for name, load in loads.items() if load == min(loads.values())]
        name = route(map(str, documents), loads, bound=args.bound) if routed else draw.choice(idle)
        replica, counted = replicas[name], number >= 2 * args.questions
        spent, remote = 0.0, 0
        for chunk in dict.fromkeys(chunks):
            if chunk in replica.held:
                origin, seconds = "local", local_s
            elif chunk in pool and pool_s < compute_s:
                origin, seconds, remote = "pool", pool_s, remote + 1
            else:
                origin, seconds = "computed", compute_s
                if pooled:
                    pool.add(chunk)
            spent += seconds
            origins[origin] += counted
            replica.keep(chunk)
        begin = max(now, replica.free_s)
        first = begin + spent + (args.pool_ms / 1e3 if remote else 0) + question_s
        replica.free_s = first
        replica.ends.append(first + args.answer_s)
        if counted:
            firsts.append(first - now)
    firsts.sort()
    total = sum(origins.values())
    quantiles = {f"p{share}": 1e3 * firsts[int(share / 100 * (len(firsts) - 1))] for share in (50, 95, 99)}
    return {
        **{origin: origins[origin] / total for origin in ORIGINS},
        "gib_a_1000": origins["pool"] * size / len(firsts) * 1000 / (1 << 30),
        **quantiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--documents", type=int, default=2_000)
    parser.add_argument("--questions", type=int, default=20_000)
    parser.add_argument("--zipf", type=float, default=0.9)
    parser.add_argument("--load", type=float, default=0.6)
    parser.add_argument("--answer-s", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--token-bytes", type=int, default=66_560)
    parser.add_argument("--prefill", type=float, default=28_000)
    parser.add_argument("--local", type=float, default=16, help="GiB of each replica")
    parser.add_argument("--disk-rate", type=float, default=4e9)
    parser.add_argument("--pool-gbit", type=float, default=25)
    parser.add_argument("--pool-ms", type=float, default=5)
    parser.add_argument("--bound", type=float, default=1.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name, (pooled, routed) in DESIGNS.items():
        row = results[name] = simulated(args, pooled, routed)
        shares = ", ".join(f"{origin} {row[origin]:.2f}" for origin in ORIGINS)
        print(
            f"{name:14} {shares}; {row['gib_a_1000']:5.1f} GiB over the network in 1,000 questions; first token {row['p50']:.0f}, "
            f"{row['p95']:.0f}, {row['p99']:.0f} ms (50, 95, 99 %)",
            flush=True,
        )
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"settings": settings, "designs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
