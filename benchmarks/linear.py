"""Linear layers of a few rows on this CPU, in the order of transformers and in the other one (ragkv/model/linear.py).

    python -P benchmarks/linear.py [--hidden N] [--inner N] [--layers N] [--rounds N] [--json FILE]

Weights of as many layers as do not fit into the processor's cache, fp32; milliseconds for all of them, medians, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from ragkv.evaluation.conditions import processor, versions
from ragkv.model.linear import pays, turned

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def took_ms(way: Callable[[Tensor, Tensor], Tensor], weights: list[Tensor], given: dict[int, Tensor]) -> float:
    """One pass over all weights."""
    begin = time.perf_counter()
    for weight in weights:
        way(given[weight.shape[1]], weight)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--inner", type=int, default=4864)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shapes = [(args.inner, args.hidden), (args.inner, args.hidden), (args.hidden, args.inner)] * args.layers
    weights = [torch.randn(shape) for shape in shapes]
    found = {}
    for rows in ROWS:
        given = {size: torch.randn(rows, size) for size in (args.hidden, args.inner)}
        rounds = [[took_ms(way, weights, given) for way in (linear, turned)] for _ in range(args.rounds + 1)][1:]
        own, other = (statistics.median(column) for column in zip(*rounds, strict=True))
        found[rows] = {"own_ms": round(own, 1), "turned_ms": round(other, 1)}
        print(f"{rows:4} rows: {own:7.1f} ms, turned {other:7.1f} ms, {own / other:.2f} times as fast", flush=True)
    threads = torch.get_num_threads()
    print(f"turned pays here, by what a pass tries: {pays(threads)}")
    if args.json:
        about = {"threads": threads, "device": processor(), **versions(), "sizes": [args.hidden, args.inner]}
        args.json.write_text(json.dumps({**about, "pays": pays(threads), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
