"""An index that is larger than memory: part of it exact in memory, the rest in files of clustered vectors.

n vectors, d dimensions, c clusters, k results.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from xxhash import xxh3_64_intdigest

from ragkv.errors import OfOneProcess, RecordError, RetrievalError
from ragkv.retrieval.arrays import ArrayFile, write_arrays
from ragkv.retrieval.index import FaissIndex, checked_ids, faiss_here, read_whole, write_whole

_LOG = logging.getLogger("ragkv.retrieval")

#: Vectors that are held in memory and searched exactly, and that a file takes then.
SEGMENT = 200_000
# Of a file's vectors, the share that is compared with a question.
_SHARE = 1 / 16
_FORMAT = "ragkv.segment/1"
# All of a file but its vectors: read when it is opened, and what it is named by.
_SMALL: dict[str, type[np.generic]] = {"ids": np.int64, "starts": np.int64, "centroids": np.float32, "sums": np.uint64}
_UNUSED_AFTER_S = 3600


class SegmentedIndex(OfOneProcess, instead="a retriever fills another one from its catalogue"):
    """Exact up to ``segment`` vectors; whenever there are more, they go to a file, of which a search reads the nearest clusters.

    Clusters are k-means cells (an inverted file, IVF, with whole vectors); 1/16 of a file's vectors are compared, so that some of
    the nearest may be missed: docs/retrieval.md says how many. Scores are exact. A file in which most vectors were removed is
    dissolved. The same calls as :class:`~ragkv.retrieval.FaissIndex`.

    Args:
        dimension: d, the numbers in a vector.
        folder: where the files are; ``None`` keeps all in memory, exact.
        segment: vectors a file.
    """

    def __init__(self, dimension: int, folder: Path | None = None, segment: int = SEGMENT) -> None:
        self._tail, self._segments = FaissIndex(dimension), list[Segment]()
        self.dimension: int = dimension
        self._folder, self._size = folder, segment
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._tail) + sum(map(len, self._segments))

    def clear(self) -> None:
        """Removes all vectors."""
        with self._lock:
            self._tail.clear()
            self._segments = []

    def ids(self) -> NDArray[np.int64]:
        """The ids of all vectors, int64 ``[n]``, in no particular order."""
        with self._lock:
            return np.concatenate([self._tail.ids(), *(part.ids[part.alive] for part in self._segments)])

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Adds vectors under new ids: all of them or, where it raises, none; see :meth:`FaissIndex.add`."""
        keys = checked_ids(ids)
        with self._lock:
            for part in self._segments:
                if (known := part.rows(keys)).size:
                    raise RetrievalError(f"id {part.ids[known].min()} is in the index already: remove it first")
            self._tail.add(keys, vectors)
            if self._folder is not None and len(self._tail) > self._size:
                self._spill(self._folder)

    def remove(self, ids: ArrayLike) -> int:
        """Removes vectors and says how many there were; ids that it does not have are passed over."""
        with self._lock:
            count = self._tail.remove(ids)
            for part in list(self._segments):
                rows = part.rows(ids)
                part.alive[rows] = False
                count += len(rows)
                if len(part) < len(part.ids) // 2:
                    with suppress(RecordError):  # a search will find it damaged
                        left = part.ids[part.alive], part.vectors(np.flatnonzero(part.alive))
                        self._segments.remove(part)
                        self.add(*left)
            return count

    def search(
        self, vector: ArrayLike, k: int, among: ArrayLike | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest vectors, best first; see :meth:`FaissIndex.search`.

        Raises:
            RecordError: a file is damaged: the index has to be filled again.
        """
        with self._lock:
            found = [self._tail.search(vector, k, among)]  # checks the arguments
            query, only = np.asarray(vector, np.float32), None if among is None else np.asarray(among, np.int64)
            found += [part.search(query, k, only) for part in self._segments]
        ids, scores = (np.concatenate(each) for each in zip(*found, strict=True))
        order = np.lexsort((ids, -scores))[:k]
        return ids[order], scores[order]

    def save(self, path: str | os.PathLike[str], state: str) -> None:
        """Writes what is in memory, and which files belong to it; see :meth:`FaissIndex.save`."""
        with self._lock:
            if any(not part.path.exists() for part in self._segments):
                _LOG.warning("%s is not written: another process has put other files in the place of its own", path)
                return
            ids, vectors = self._tail.contents()
            alive = np.concatenate([np.empty(0, bool), *(part.alive for part in self._segments)])
            arrays: dict[str, NDArray[Any]] = {
                "ids": ids,
                "vectors": vectors,
                "dead": np.flatnonzero(~alive),
            }  # rows: an id may be in several files
            write_whole(Path(path), arrays, state, " ".join(part.path.name for part in self._segments))
            kept = {part.path for part in self._segments}
        for file in Path(path).parent.glob("segment-*"):
            # Others may be about to name what they have just written, or have named or deleted it since.
            with suppress(FileNotFoundError):
                if file not in kept and time.time() - file.stat().st_mtime > _UNUSED_AFTER_S:
                    file.unlink()

    def load(self, path: str | os.PathLike[str]) -> str:
        """Replaces the index by a saved one and returns its state; see :meth:`FaissIndex.load`."""
        self.clear()
        arrays, state, names = read_whole(Path(path), self.dimension)
        with self._lock:
            self._segments = [Segment(Path(path).with_name(name), self.dimension) for name in names.split()]
            begin, dead = 0, arrays.get("dead", np.empty(0, np.int64))
            for part in self._segments:
                end = begin + len(part.ids)
                part.alive[dead[(dead >= begin) & (dead < end)] - begin] = False
                begin = end
            self._tail.add(arrays["ids"], arrays["vectors"])
        return state

    def check(self) -> None:
        """Reads all vectors of the files.

        Raises:
            RecordError: a file is damaged.
        """
        with self._lock:
            for part in self._segments:
                part.check()

    def _spill(self, folder: Path) -> None:
        """What is in memory goes to a file."""
        try:
            written = Segment(write_segment(folder, *self._tail.contents()), self.dimension)
        except (OSError, RecordError) as error:
            _LOG.warning("vectors stay in memory: they cannot be written to %s: %s", folder, error)
            return
        self._segments.append(written)
        self._tail.clear()


class Segment:
    """A file of vectors, clustered, of which a search reads a part. Not safe for several threads.

    Attributes:
        ids: int64 ``[n]``, cluster by cluster.
        alive: bool ``[n]``: which of them have not been removed.

    Raises:
        RecordError: the file is missing, damaged, or of another format or dimension.
    """

    def __init__(self, path: Path, dimension: int) -> None:
        self.path: Path = path
        self._file = ArrayFile(path)
        small = {name: self._file.array(name, dtype) for name, dtype in _SMALL.items()}
        self.ids: np.ndarray = small["ids"]
        self._starts, self._centroids, self._sums = small["starts"], small["centroids"], small["sums"]
        if (
            self._file.metadata.get("format") != _FORMAT
            or self._file.shapes.get("vectors") != (len(self.ids), dimension)
            or path.name != _name(_checksum(*small.values()))
        ):
            raise RecordError(f"{path}: damaged, of another format, or not the file that was written under this name")
        self.alive: np.ndarray = np.ones(len(self.ids), bool)
        self._cluster = np.repeat(np.arange(len(self._sums)), np.diff(self._starts))
        self._sorted = np.argsort(self.ids)
        self._checked = np.zeros(len(self._sums), bool)

    def __len__(self) -> int:
        return int(self.alive.sum())

    def rows(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Where those of some ids stand that it has."""
        wanted = np.asarray(ids, np.int64)
        at = np.searchsorted(self.ids, wanted, sorter=self._sorted)
        rows = self._sorted[np.minimum(at, len(self.ids) - 1)]
        return rows[(self.ids[rows] == wanted) & self.alive[rows]]

    def check(self) -> None:
        """Reads all vectors."""
        for cluster, (begin, end) in enumerate(pairwise(self._starts)):
            self._read(cluster, np.arange(begin, end))

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of ascending rows, float32 ``[n, d]``."""
        parts = [
            self._read(cluster, rows[self._cluster[rows] == cluster]) for cluster in np.unique(self._cluster[rows])
        ]
        return np.concatenate(parts) if parts else np.empty((0, self._centroids.shape[1]), np.float32)

    def search(
        self, query: NDArray[np.float32], k: int, among: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and scores of the nearest: of the nearest clusters, until enough that may be found have been looked at."""
        rows = np.flatnonzero(self.alive) if among is None else np.unique(self.rows(among))
        counts = np.bincount(self._cluster[rows], minlength=len(self._sums))
        near = np.argsort(-(self._centroids @ query), kind="stable")
        near = near[counts[near] > 0]
        enough = max(int(len(self.ids) * _SHARE), k)
        near = near[: np.searchsorted(np.cumsum(counts[near]), enough) + 1]
        first = np.searchsorted(rows, self._starts)
        taken = [rows[first[cluster] : first[cluster + 1]] for cluster in near]
        scores = [self._read(cluster, part) @ query for cluster, part in zip(near, taken, strict=True)]
        if not taken:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        return self.ids[np.concatenate(taken)], np.concatenate(scores)

    def _read(self, cluster: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors of a cluster's rows; the whole cluster is held against its checksum the first time."""
        begin, end = int(self._starts[cluster]), int(self._starts[cluster + 1])
        if self._checked[cluster] and len(rows) * 8 < end - begin:
            return np.concatenate([self._file.rows("vectors", int(row), int(row) + 1) for row in rows])
        vectors = self._file.rows("vectors", begin, end)
        if not self._checked[cluster]:
            if _checksum(vectors) != str(self._sums[cluster]):
                raise RecordError(f"{self.path}: damaged, a checksum does not fit")
            self._checked[cluster] = True
        return vectors if len(rows) == end - begin else vectors[rows - begin]


def write_segment(folder: Path, ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> Path:
    """Clusters vectors, ``[n, d]``, and writes them to a file that is named by what is in it; returns its path.

    A safetensors file: ``vectors`` float32 ``[n, d]`` and ``ids`` int64 ``[n]``, cluster by cluster; where each begins, ``starts``
    int64 ``[c + 1]``; ``centroids`` float32 ``[c, d]``; ``sums`` uint64 ``[c]``, a checksum each.

    Raises:
        OSError: it cannot be written.
    """
    kmeans = faiss_here().Kmeans(
        vectors.shape[1],
        max(1, int(2 * len(ids) ** 0.5)),
        niter=10,
        spherical=True,
        max_points_per_centroid=64,
        min_points_per_centroid=1,
    )
    kmeans.train(vectors)
    cluster = kmeans.index.search(vectors, 1)[1][:, 0]
    order = np.lexsort((ids, cluster))
    starts = np.searchsorted(cluster[order], np.arange(kmeans.k + 1)).astype(np.int64)
    ids, vectors = ids[order], vectors[order]
    sums = np.asarray([int(_checksum(vectors[begin:end])) for begin, end in pairwise(starts)], np.uint64)
    small: dict[str, NDArray[Any]] = dict(
        zip(_SMALL, (ids, starts, np.asarray(kmeans.centroids, np.float32), sums), strict=True)
    )
    path = folder / _name(_checksum(*small.values()))
    write_arrays(path, {**small, "vectors": vectors}, {"format": _FORMAT})
    return path


def _name(checksum: str) -> str:
    return f"segment-{checksum}.safetensors"


def _checksum(*arrays: NDArray[Any]) -> str:
    sums = [xxh3_64_intdigest(np.ascontiguousarray(array).data) for array in arrays]
    return str(sums[0] if len(sums) == 1 else xxh3_64_intdigest(str(sums).encode()))
