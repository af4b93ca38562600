"""The index of vectors beyond memory: how many of the nearest it finds, how fast, and what it holds in memory.

    python benchmarks/index.py [--vectors N] [--dimension D] [--out FILE]

Vectors come in pieces and are not kept, so that memory is the index's own. Random vectors have no clusters: the worst case.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragkv.retrieval.segments import SEGMENT, SegmentedIndex

PIECE, K, QUERIES = 10_000, 10, 100


def unit(rows: NDArray) -> NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def pieces(kind: str, count: int, dimension: int) -> Iterator[NDArray[np.float32]]:
    """Random directions; or around 5,000 centres, with a cosine of about 0.7 to the centre."""
    random = np.random.default_rng(0)
    centres = unit(random.standard_normal((5000, dimension)))
    for _ in range(0, count, PIECE):
        noise = random.standard_normal((PIECE, dimension), np.float32)
        yield unit(noise if kind == "random" else centres[random.integers(0, 5000, PIECE)] + noise / dimension**0.5)


def anonymous_bytes() -> int:
    """Memory that is not a file's: what is mapped can be given back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measured(kind: str, count: int, dimension: int, folder: Path) -> dict[str, object]:
    random = np.random.default_rng(1)
    first = next(pieces(kind, PIECE, dimension))
    queries = unit(
        first[random.integers(0, PIECE, QUERIES)] + random.standard_normal((QUERIES, dimension)) * 0.5 / dimension**0.5
    )
    nearest = np.full((QUERIES, K), -1), np.full((QUERIES, K), -2.0, np.float32)
    before, begin, compared_s = anonymous_bytes(), time.perf_counter(), 0.0
    index = SegmentedIndex(dimension, folder)
    for number, vectors in enumerate(pieces(kind, count, dimension)):
        ids = np.arange(PIECE) + number * PIECE
        index.add(ids, vectors)
        start = time.perf_counter()
        scores = np.concatenate([nearest[1], queries @ vectors.T], axis=1)
        known = np.concatenate([nearest[0], np.broadcast_to(ids, (QUERIES, PIECE))], axis=1)
        best = np.argsort(-scores, axis=1)[:, :K]
        nearest = np.take_along_axis(known, best, 1), np.take_along_axis(scores, best, 1)
        compared_s += time.perf_counter() - start
    filled_s = time.perf_counter() - begin - compared_s
    times, found = [], []
    for round_ in range(2):  # the first reads from the disk and checks
        for query in queries:
            start = time.perf_counter()
            ids = index.search(query, K)[0]
            times.append((time.perf_counter() - start) * 1e3)
            if round_:
                found.append(ids)
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, nearest[0], strict=True)])
    return {
        "vectors": kind,
        "count": count,
        "dimension": dimension,
        "recall_at_10": round(float(recall), 3),
        "first_ms": round(float(np.median(times[:QUERIES])), 1),
        "warm_ms": round(float(np.median(times[QUERIES:])), 1),
        "filled_s": round(filled_s, 1),
        "memory_mb": round((anonymous_bytes() - before) / 1e6),
        "vectors_mb": round(count * dimension * 4 / 1e6),
        "files_mb": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=2 * SEGMENT + PIECE, help="how many, in tens of thousands")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    rows = []
    for kind in ("clustered", "random"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(kind, args.vectors, args.dimension, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
