"""What lies beside a catalogue and is made of it: indexes that follow it, and looking whether they are damaged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ragkv.errors import RecordError
from ragkv.retrieval.arrays import ArrayFile
from ragkv.retrieval.catalogue import Catalogue
from ragkv.retrieval.index import VectorIndex
from ragkv.retrieval.records import Change
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.snapshot import Snapshot
from ragkv.retrieval.words import WordIndex

_LOG = logging.getLogger("ragkv.retrieval")

INDEX_FILE, WORDS_FILE = "index.safetensors", "words.sqlite"


class Indexes:
    """The index of a catalogue's vectors and that of its words. Threads may share one object.

    The first is read from its file if that is whole and of the catalogue's state, and is else filled from the stored vectors.
    Before each search they take in what other processes have changed.

    Args:
        catalogue: that they are of.
        vectors: empty.
    """

    def __init__(self, catalogue: Catalogue, vectors: VectorIndex) -> None:
        self.vectors: VectorIndex = vectors
        self._catalogue, self._kept = catalogue, not (catalogue.temporary or catalogue.readonly)
        self.words: WordIndex = WordIndex(catalogue.path / WORDS_FILE if self._kept else None)
        # Taken in a snapshot and nowhere else: a fork, or whoever closes the folder, waits for those and lets no other begin.
        self._lock = threading.RLock()
        self._saved = self._state = self._restored()
        with catalogue.snapshot() as view, self._lock:
            self._follow(view)

    def search(
        self, view: Snapshot, query: str, vector: NDArray[np.float32], k: int, words: bool, among: list[int] | None
    ) -> tuple[dict[int, float], list[int]]:
        """The ids of the k nearest passages of a snapshot with their scores, and of the k best by words; best first.

        Args:
            view: all is of its state.
            query: a text.
            vector: the text's, float32 ``[d]``.
            k: at least 1.
            words: whether words are searched.
            among: ids of passages that may be found; ``None`` for all.
        """
        asked = (vector, k) if among is None else (vector, k, among)
        with self._lock:
            self._follow(view)
            try:
                ids, scores = self.vectors.search(*asked)
            except RecordError as error:
                self._state = self._lost(error)
                self._follow(view)
                ids, scores = self.vectors.search(*asked)
            near = dict(zip(ids.tolist(), scores.tolist(), strict=True))
            return near, self.words.search(view, query, k, among) if words else []

    def apply(self, change: Change) -> Change:
        """The change, made in the index too where nothing else has happened in between."""
        before, after = change.states
        with self._catalogue.snapshot() as view, self._lock:
            if before == self._state and after == view.state:
                self._state = ""
                self.vectors.remove(change.removed)
                if change.new:
                    self.vectors.add(change.new, view.vectors(change.new))
                self._state = after
        return change

    def save(self) -> None:
        """Write the index of vectors to its file, where that is of another state and the folder is kept."""
        with self._catalogue.snapshot() as view, self._lock:
            self._follow(view)
            if self._saved != self._state and self._kept:
                self.vectors.save(self._catalogue.path / INDEX_FILE, self._state)
                self._saved = self._state

    def _restored(self) -> str:
        """The state of the saved index, now in memory; empty where there is none that fits."""
        path = self._catalogue.path / INDEX_FILE
        self.vectors.clear()
        if not path.exists():
            return ""
        try:
            state = self.vectors.load(path)
        except RecordError as error:
            return self._lost(error)
        if state != self._catalogue.state:
            # Its ids may be of a history that is not the catalogue's, as after a backup was put back.
            self.vectors.clear()
            return ""
        return state

    def _lost(self, error: RecordError) -> str:
        _LOG.warning("the index is filled again from the stored vectors: %s", error)
        self.vectors.clear()
        return ""

    def _follow(self, view: Snapshot) -> None:
        """Brings the index to the state of a snapshot. An id's vector never changes, so ids say it all."""
        state = view.state
        if state == self._state:
            return
        self._state = ""  # until it is done: what fails half-way is of no state
        wanted, present = view.passage_ids(), self.vectors.ids()
        self.vectors.remove(np.setdiff1d(present, wanted))
        new = np.setdiff1d(wanted, present)
        for at in range(0, len(new), 4096):
            self.vectors.add(new[at : at + 4096], view.vectors(new[at : at + 4096]))
        self._state = state


def damaged_copies(folder: Path) -> Iterator[tuple[Path, str]]:
    """The copies in a catalogue's folder that are damaged, and why; each may be deleted, and is made again then."""
    for file, check in ((folder / INDEX_FILE, _index), (folder / WORDS_FILE, lambda path: WordIndex(path).check())):
        if file.exists() and (wrong := check(file)):
            yield file, wrong


def _index(path: Path) -> str:
    """What is wrong with an index and its files, if anything is."""
    number = path.stat().st_ino
    try:
        index = SegmentedIndex(ArrayFile(path).shapes.get("vectors", (0, 0))[-1] or 1)
        index.load(path)
        index.check()
    except RecordError as error:
        # Where another process has put its own in the place, files of the former may be gone.
        return str(error) if not path.exists() or path.stat().st_ino == number else _index(path)
    return ""
