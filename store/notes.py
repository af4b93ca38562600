# ruff: noqa: D102 - methods without a docstring keep the contract of Notes
"""What still has to be done in a shared pool for the chunks of a store: some are to be sent, others deleted there.

In a folder the notes lie beside the entries, and are written with them: what a killed process did not do, the next one does.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol

from ragkv.folder import Environment, Transaction
from ragkv.store.keys import PATH

#: What a note says of its chunk. Behind DELETE stands which object is meant; nothing: whichever is there.
SEND, DELETE = b"+", b"-"
_NOTE = b"pool"  # what their names in the database begin with
_MOST = 100_000


def shared(key: bytes) -> bool:
    """Whether a chunk of such a key is for others: what was computed of a prompt is not."""
    return not key.startswith(PATH)


class Notes(Protocol):
    """A note a chunk, by its key. Safe for several threads.

    What this process noted anew since it was taken is not struck out: what was done may have been done before.
    """

    _anew: set[bytes]

    def add(self, notes: Mapping[bytes, bytes]) -> None:
        """Writes notes down, in place of those of the same chunks."""

    def strike(self, done: Mapping[bytes, bytes]) -> None:
        """Strikes out notes, where they still say what was done."""

    def each(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and what is noted of them, from a key on. Take few at a time."""

    def take(self, keys: Iterable[bytes]) -> None:
        """What is noted of these will be done now."""
        self._anew.difference_update(keys)

    def deleting(self, keys: Collection[bytes]) -> set[bytes]:
        """Those of the chunks that are to be deleted."""

    def after_fork(self) -> None:
        """In a child: what the parent noted anew, it does."""
        self._anew = set()

    def __len__(self) -> int:
        """How many there are."""


class MemoryNotes(Notes):
    """Notes that go with the process: only the last so many, for a pool may be away for long."""

    def __init__(self) -> None:
        self._anew = set()
        self._notes: dict[bytes, bytes] = {}
        self._lock = threading.Lock()

    def add(self, notes: Mapping[bytes, bytes]) -> None:
        with self._lock:
            self._anew.update(notes)
            for key, what in notes.items():
                self._notes.pop(key, None)
                self._notes[key] = what
            while len(self._notes) > _MOST:
                first = next(iter(self._notes))
                del self._notes[first]
                self._anew.discard(first)

    def strike(self, done: Mapping[bytes, bytes]) -> None:
        with self._lock:
            for key, what in done.items():
                if self._notes.get(key) == what and key not in self._anew:
                    del self._notes[key]

    def each(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """See :class:`Notes`; in the order in which they were written, from the first on."""
        with self._lock:
            return iter(list(self._notes.items()))

    def deleting(self, keys: Collection[bytes]) -> set[bytes]:
        return {key for key in keys if self._notes.get(key, SEND).startswith(DELETE)}

    def after_fork(self) -> None:
        """In a child: they are the parent's."""
        super().after_fork()
        self._notes, self._lock = {}, threading.Lock()

    def __len__(self) -> int:
        return len(self._notes)


class FolderNotes(Notes):
    """Notes in a folder, for all processes that have it open; there are no more than the folder has entries, besides deletions."""

    def __init__(self, environment: Environment) -> None:
        self._anew = set()
        self._environment = environment

    def add(self, notes: Mapping[bytes, bytes]) -> None:
        """See :class:`Notes`; durable when it returns."""
        if notes:
            with self._environment.transaction(write=True) as txn:
                self._anew.update(notes)
                for key, what in notes.items():
                    txn.put("state", _NOTE + key, what)

    def send(self, txn: Transaction, key: bytes) -> None:
        """Notes that a chunk is to be sent, where it is for others, in somebody's transaction."""
        if shared(key):
            self._anew.add(key)
            txn.put("state", _NOTE + key, SEND)

    def deletes(self, txn: Transaction, key: bytes) -> bool:
        """Whether a chunk is to be deleted, in somebody's transaction."""
        return (txn.get("state", _NOTE + key) or SEND).startswith(DELETE)

    def unsend(self, txn: Transaction, key: bytes) -> None:
        """Strikes out that a chunk is to be sent, in somebody's transaction."""
        if txn.get("state", _NOTE + key) == SEND:
            self._anew.discard(key)
            txn.delete("state", _NOTE + key)

    def strike(self, done: Mapping[bytes, bytes]) -> None:
        if done:
            with self._environment.transaction(write=True) as txn:
                for key, what in done.items():
                    if key not in self._anew and txn.get("state", _NOTE + key) == what:
                        txn.delete("state", _NOTE + key)

    def each(self, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        with self._environment.transaction() as txn:
            for name, what in txn.items("state", _NOTE, start):
                yield name[len(_NOTE) :], what

    def deleting(self, keys: Collection[bytes]) -> set[bytes]:
        with self._environment.transaction() as txn:
            return {key for key in keys if self.deletes(txn, key)}

    def __len__(self) -> int:
        return sum(1 for _ in self.each())
