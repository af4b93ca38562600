"""The index of vectors beyond memory: how many of the nearest it finds, how fast, and what it holds in memory.

    python benchmarks/index.py [--vectors N] [--segment N] [--dimension D] [--out FILE]

Beside it faiss's HNSW, looking at so many candidates. Vectors come in pieces and are not kept, so that memory is the index's own.
Random vectors have no clusters: the worst case.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ragkv.machine import processor
from ragkv.retrieval.segments import SEGMENT, SegmentedIndex

PIECE, K, QUERIES = 10_000, 10, 100
CANDIDATES = (64, 256)


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
    lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Hnsw:
    """faiss's graph of small worlds, 32 links a vector, whole vectors, all in memory."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexHNSWFlat(dimension, 32, faiss.METRIC_INNER_PRODUCT)

    def add(self, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        assert ids[0] == self._index.ntotal
        self._index.add(vectors)

    def search(self, query: NDArray[np.float32], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        scores, ids = self._index.search(query[None], k)
        return ids[0], scores[0]

    def look_at(self, candidates: int) -> None:
        self._index.hnsw.efSearch = candidates

    def save(self, folder: Path) -> None:
        faiss.write_index(self._index, str(folder / "hnsw.faiss"))


def asked(kind: str, dimension: int) -> NDArray[np.float32]:
    """Queries near to vectors that are there."""
    random = np.random.default_rng(1)
    near = next(pieces(kind, PIECE, dimension))[random.integers(0, PIECE, QUERIES)]
    return unit(near + random.standard_normal((QUERIES, dimension)) * 0.5 / dimension**0.5)


def nearest(kind: str, count: int, queries: NDArray[np.float32]) -> NDArray[np.int64]:
    """The ids that are to be found, by comparing all."""
    best = np.full((QUERIES, K), -1), np.full((QUERIES, K), -2.0, np.float32)
    for number, vectors in enumerate(pieces(kind, count, queries.shape[1])):
        scores = np.concatenate([best[1], queries @ vectors.T], axis=1)
        ids = np.broadcast_to(np.arange(PIECE) + number * PIECE, (QUERIES, PIECE))
        order = np.argsort(-scores, axis=1)[:, :K]
        best = np.take_along_axis(np.concatenate([best[0], ids], 1), order, 1), np.take_along_axis(scores, order, 1)
    return best[0]


def searched(index: Any, queries: NDArray[np.float32], wanted: NDArray[np.int64]) -> dict[str, float]:
    """Recall and milliseconds; the first round reads from the disk and checks."""
    times, found = [], []
    for query in [*queries, *queries]:
        start = time.perf_counter()
        found.append(index.search(query, K)[0])
        times.append((time.perf_counter() - start) * 1e3)
    recall = np.mean([len({*a} & {*b}) / K for a, b in zip(found[QUERIES:], wanted, strict=True)])
    return {
        "recall_at_10": round(float(recall), 3),
        "first_ms": round(float(np.median(times[:QUERIES])), 2),
        "warm_ms": round(float(np.median(times[QUERIES:])), 2),
    }


def measured(kind: str, count: int, dimension: int, segment: int) -> Iterator[dict[str, object]]:
    """A row for each index and way to search it."""
    queries = asked(kind, dimension)
    wanted = nearest(kind, count, queries)
    for name in ("clusters", "hnsw"):
        with tempfile.TemporaryDirectory() as path:
            folder, before, filled_s = Path(path), anonymous_bytes(), 0.0
            index = SegmentedIndex(dimension, folder, segment) if name == "clusters" else Hnsw(dimension)
            for number, vectors in enumerate(pieces(kind, count, dimension)):
                begin = time.perf_counter()
                index.add(np.arange(PIECE) + number * PIECE, vectors)
                filled_s += time.perf_counter() - begin
            held = anonymous_bytes() - before
            if isinstance(index, Hnsw):
                index.save(folder)
            files = sum(file.stat().st_size for file in folder.iterdir())
            for candidates in CANDIDATES if isinstance(index, Hnsw) else (0,):
                if isinstance(index, Hnsw):
                    index.look_at(candidates)
                yield {
                    "vectors": kind,
                    "index": f"{name} {candidates or ''}".strip(),
                    "count": count,
                    "dimension": dimension,
                    **searched(index, queries, wanted),
                    "filled_s": round(filled_s, 1),
                    "memory_mb": round(held / 1e6),
                    "vectors_mb": round(count * dimension * 4 / 1e6),
                    "files_mb": round(files / 1e6),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=2 * SEGMENT + PIECE, help="how many, in tens of thousands")
    parser.add_argument(
        "--segment", type=int, default=SEGMENT, help="vectors that are held exactly before they go to a file"
    )
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    rows = []
    for row in (
        row for kind in ("clustered", "random") for row in measured(kind, args.vectors, args.dimension, args.segment)
    ):
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out is not None:
        conditions = {"cpus": os.cpu_count(), "processor": processor(), "threads": faiss.omp_get_max_threads()}
        args.out.write_text(json.dumps({**conditions, "faiss": faiss.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
