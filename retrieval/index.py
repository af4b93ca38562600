"""Finding the nearest vectors: the protocol and an exact faiss index.

n vectors, d dimensions, k results.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from xxhash import xxh3_128

from ragkv.errors import MissingPackageError, OfOneProcess, RecordError, RetrievalError
from ragkv.retrieval.arrays import ArrayFile, write_arrays

_FORMAT = "ragkv.index/1"


@runtime_checkable
class VectorIndex(Protocol):
    """Vectors under int64 ids, searched by inner product. All of it is safe to call from several threads.

    An index is a copy of what the catalogue holds: whatever is lost can be added again.

    Attributes:
        dimension: d, the numbers in a vector.
    """

    dimension: int

    def __len__(self) -> int: ...

    def ids(self) -> NDArray[np.int64]:
        """The ids of all vectors, int64 ``[n]``, in no particular order."""
        ...

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Adds vectors, ``[n, d]``, under new ids, ``[n]``: all of them or, where it raises, none."""
        ...

    def remove(self, ids: ArrayLike) -> int:
        """Removes vectors and says how many there were; ids that it does not have are passed over."""
        ...

    def search(
        self, vector: ArrayLike, k: int, among: ArrayLike | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ids and inner products of the ``min(k, n)`` nearest vectors, best first; with ``among`` of those ids alone."""
        ...

    def clear(self) -> None:
        """Removes all vectors."""
        ...

    def save(self, path: str | os.PathLike[str], state: str) -> None:
        """Writes the index to a file that is there whole or not at all, under the name of the state it holds."""
        ...

    def load(self, path: str | os.PathLike[str]) -> str:
        """Replaces the index by a saved one and returns its state.

        Raises:
            RecordError: the file is missing, damaged or of another kind; the index is empty then.
        """
        ...


class FaissIndex(OfOneProcess, instead="a retriever fills another one from its catalogue"):
    """Exact search over all vectors (faiss ``IndexFlatIP``): right up to about a million passages.

    Args:
        dimension: d, the numbers in a vector.

    Raises:
        MissingPackageError: faiss is not installed.
        RetrievalError: ``dimension`` is not positive.
    """

    def __init__(self, dimension: int) -> None:
        faiss = faiss_here()
        if not isinstance(dimension, int) or dimension < 1:
            raise RetrievalError(f"dimension must be a positive whole number, got {dimension!r}")
        self.dimension = dimension
        self._faiss = faiss
        # faiss allows searches side by side, but no change beside them.
        self._lock = threading.RLock()
        self.clear()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Removes all vectors."""
        with self._lock:
            self._index: Any = self._faiss.IndexIDMap2(self._faiss.IndexFlatIP(self.dimension))
            # faiss itself takes an id twice without a word.
            self._known: set[int] = set()

    def ids(self) -> NDArray[np.int64]:
        """The ids of all vectors, int64 ``[n]``, in no particular order."""
        with self._lock:
            return np.fromiter(self._known, np.int64, len(self._known))

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Adds vectors under new ids: all of them or, where it raises, none.

        Args:
            ids: ``[n]`` whole numbers that the index does not have yet.
            vectors: ``[n, d]``, finite.

        Raises:
            RetrievalError: shapes do not fit, a number is not finite, an id is given twice or known already.
        """
        keys, rows = checked_ids(ids), self._checked_vectors(vectors, rank=2)
        if len(keys) != len(rows):
            raise RetrievalError(f"every vector needs one id: got {len(keys)} ids for {len(rows)} vectors")
        with self._lock:
            fresh = set(keys.tolist())
            if len(fresh) != len(keys):
                raise RetrievalError("the same id is given twice in one call")
            if known := fresh & self._known:
                raise RetrievalError(f"id {min(known)} is in the index already: remove it first")
            if len(keys):
                self._index.add_with_ids(rows, keys)
                self._known |= fresh

    def remove(self, ids: ArrayLike) -> int:
        """Removes vectors and says how many there were; ids that it does not have are passed over."""
        keys = checked_ids(ids)
        with self._lock:
            gone = self._known.intersection(keys.tolist())
            if gone:
                self._index.remove_ids(np.fromiter(gone, np.int64, len(gone)))
                self._known -= gone
            return len(gone)

    def search(
        self, vector: ArrayLike, k: int, among: ArrayLike | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The nearest vectors, best first; among equals the smaller id first.

        Args:
            vector: ``[d]``, finite.
            k: how many, at least 1.
            among: ids that may be found, ``[m]``; ``None`` for all. Those that it does not have are passed over.

        Returns:
            ids, int64 ``[min(k, n)]``, and inner products, float32 ``[min(k, n)]``, n being the number of those that may be found.

        Raises:
            RetrievalError: the vector has another dimension or is not finite, or ``k`` is below 1.
        """
        query = self._checked_vectors(vector, rank=1)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise RetrievalError(f"the number of results must be a whole number of at least 1, got {k!r}")
        faiss: Any = self._faiss
        params = None if among is None else faiss.SearchParameters(sel=faiss.IDSelectorBatch(checked_ids(among)))
        with self._lock:
            count = min(int(k), len(self))
            if not count:
                return np.empty(0, np.int64), np.empty(0, np.float32)
            (scores,), (ids,) = self._index.search(query[None], count, params=params)
        scores, ids = scores[ids >= 0], ids[ids >= 0]  # faiss pads missing results with id -1
        order = np.lexsort((ids, -scores))
        return ids[order], scores[order]

    def save(self, path: str | os.PathLike[str], state: str) -> None:
        """Writes the index to a file that is there whole or not at all.

        The file is a safetensors file with ``ids`` int64 ``[n]`` and ``vectors`` float32 ``[n, d]``.

        Args:
            path: the file, replaced if it is there.
            state: a name for what the index holds, handed back by :meth:`load`.

        Raises:
            RetrievalError: the file cannot be written; the one that was there is untouched.
        """
        with self._lock:
            ids, vectors = self.contents()
        write_whole(Path(path), {"ids": ids, "vectors": vectors}, state)

    def contents(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All ids, int64 ``[n]``, and their vectors, float32 ``[n, d]``."""
        with self._lock:
            ids = self._faiss.vector_to_array(self._index.id_map).astype(np.int64)
            flat = self._faiss.downcast_index(self._index.index)
            return ids, flat.reconstruct_n(0, len(ids)) if len(ids) else np.empty((0, self.dimension), np.float32)

    def load(self, path: str | os.PathLike[str]) -> str:
        """Replaces the index by a saved one.

        Returns:
            the state under which it was saved.

        Raises:
            RecordError: the file is missing, damaged, of another format or dimension; the index is empty then.
        """
        self.clear()
        arrays, state, parts = read_whole(Path(path), self.dimension)
        if parts:
            raise RecordError(f"{path}: a part of a larger index, with {parts}")
        self.add(arrays["ids"], arrays["vectors"])
        return state

    def _checked_vectors(self, vectors: ArrayLike, rank: int) -> NDArray[np.float32]:
        array = as_numbers("vectors", vectors)
        if array.ndim != rank or array.shape[-1] != self.dimension:
            wanted = [self.dimension] if rank == 1 else ["n", self.dimension]
            raise RetrievalError(
                f"expected {'a vector' if rank == 1 else 'vectors'} of shape {wanted}, got {array.shape}"
            )
        if not np.isfinite(array).all():
            raise RetrievalError("a vector has a number that is not finite")
        return array


def as_numbers(what: str, given: Any) -> NDArray[np.float32]:
    """An array of float32, one piece of memory.

    Raises:
        RetrievalError: something is no number, or rows are of different lengths.
    """
    try:
        return np.ascontiguousarray(given, np.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last of a tensor with a gradient
        raise RetrievalError(f"{what} must be numbers, as many in each row: {error!s:.80}") from error


@cache
def faiss_here() -> Any:
    """The faiss library, fit for a forked child.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError("faiss is not installed: pip install faiss-cpu") from error
    if hasattr(os, "register_at_fork"):
        # OpenMP's threads stay with the parent: a child would wait for them for ever.
        os.register_at_fork(after_in_child=lambda: faiss.omp_set_num_threads(1))
    return faiss


def checked_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Ids as int64 ``[n]``.

    Raises:
        RetrievalError: they are none.
    """
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise RetrievalError(f"ids must be whole numbers of shape [n]: {error!s:.80}") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise RetrievalError(f"ids must be whole numbers of shape [n], got {array.dtype} of shape {array.shape}")
    # faiss says "no result" with id -1.
    if array.size and (array.min() < 0 or array.max() >= 2**63):
        raise RetrievalError("ids must be at least 0 and fit int64")
    return array.astype(np.int64)


def write_whole(path: Path, arrays: dict[str, NDArray[Any]], state: str, parts: str = "") -> None:
    """Writes arrays to a file that is there whole or not at all, with a state and the names of files that belong to it.

    Raises:
        RetrievalError: the file cannot be written; the one that was there is untouched.
    """
    metadata = {"format": _FORMAT, "state": state, "checksum": _checksum(f"{state}{parts}", arrays)}
    try:
        write_arrays(path, arrays, {**metadata, "parts": parts} if parts else metadata)
    except OSError as error:
        raise RetrievalError(f"the index cannot be written to {path}: {error}") from error


def read_whole(path: Path, dimension: int) -> tuple[dict[str, NDArray[Any]], str, str]:
    """What :func:`write_whole` wrote: arrays, state, and names of files.

    Raises:
        RecordError: the file is missing, damaged, of another format or dimension.
    """
    file = ArrayFile(path)
    if file.metadata.get("format") != _FORMAT:
        raise RecordError(f"{path}: of format {file.metadata.get('format')!r}, expected {_FORMAT!r}")
    types: dict[str, type[np.generic]] = {"ids": np.int64, "vectors": np.float32, "dead": np.int64}
    arrays = {name: file.array(name, types[name]) for name in types if name in file.shapes or name != "dead"}
    state, parts = file.metadata.get("state", ""), file.metadata.get("parts", "")
    if _checksum(f"{state}{parts}", arrays) != file.metadata.get("checksum"):
        raise RecordError(f"{path}: damaged, its checksum does not fit")
    if arrays["vectors"].shape != (len(arrays["ids"]), dimension):
        raise RecordError(f"{path}: holds vectors of shape {arrays['vectors'].shape}, expected [n, {dimension}]")
    return arrays, state, parts


def _checksum(names: str, arrays: dict[str, NDArray[Any]]) -> str:
    hasher = xxh3_128(names.encode())
    for name in sorted(arrays):
        hasher.update(np.ascontiguousarray(arrays[name]).data)
    return hasher.hexdigest()
