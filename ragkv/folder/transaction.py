"""The databases of a folder by name, inside one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from ragkv.errors import StoreError


class Transaction:
    """One state of a folder, to read from or to write. What it returns are copies, which stay valid, but for :meth:`view`.

    Attributes:
        txn: LMDB's own transaction; None once it is over, and in a forked child.
        outside: gives a block in which nothing is looked at: whoever forks or closes the folder need not wait for it. The state
            stays what it is; behind the block a StoreError says where the folder was closed meanwhile.
    """

    def __init__(
        self, txn: Any, databases: Mapping[bytes, Any], outside: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.txn: Any = txn
        self.outside: Callable[[], AbstractContextManager[None]] = outside
        self._databases = databases

    def get(self, database: str, key: bytes) -> bytes | None:
        """The value under a key (the first one, where a key may have several)."""
        value = self.view(database, key)
        return None if value is None else bytes(value)

    def view(self, database: str, key: bytes) -> Any:
        """As :meth:`get`, as a buffer that is not copied: it is valid until the transaction ends."""
        return self._live.get(key, db=self._db(database)) if key else None  # LMDB has no empty keys

    def has(self, database: str, key: bytes) -> bool:
        """Whether there is something under a key."""
        return self.view(database, key) is not None

    def values(self, database: str, key: bytes) -> Iterator[bytes]:
        """All values under a key, in order, where a key may have several."""
        with self._live.cursor(self._db(database)) as cursor:
            if cursor.set_key(key):
                yield from map(bytes, cursor.iternext_dup())

    def items(self, database: str, prefix: bytes = b"", start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """The keys that begin with a prefix and their values, by key; with ``start`` from the prefix and that on."""
        with self._live.cursor(self._db(database)) as cursor:
            if cursor.set_range(prefix + start):
                for key, value in cursor.iternext():
                    if key[: len(prefix)] != prefix:
                        return
                    yield bytes(key), bytes(value)

    def keys(self, database: str, prefix: bytes = b"") -> Iterator[bytes]:
        """The keys that begin with a prefix, in order; one that has several values comes once for each."""
        with self._live.cursor(self._db(database)) as cursor:
            if cursor.set_range(prefix):
                for key in cursor.iternext(values=False):
                    if key[: len(prefix)] != prefix:
                        return
                    yield bytes(key)

    def count(self, database: str) -> int:
        """How many values there are."""
        return self._live.stat(self._db(database))["entries"]

    def put(self, database: str, key: bytes, value: Any) -> None:
        """Sets the value under a key, bytes or a buffer, or adds one where a key may have several."""
        self._live.put(key, value, db=self._db(database))

    def delete(self, database: str, key: bytes, value: bytes | None = None) -> bool:
        """Deletes a key, or one of its values where it may have several; whether it was there."""
        return self._live.delete(key, value or b"", db=self._db(database))

    def clear(self, database: str) -> None:
        """Deletes all keys."""
        self._live.drop(self._db(database), delete=False)

    def close(self) -> None:
        """Ends a transaction that only reads."""
        txn, self.txn = self.txn, None
        if txn is not None:
            txn.abort()

    @property
    def _live(self) -> Any:
        if self.txn is None:
            raise StoreError("the transaction is over, or belongs to the process that this one was forked from")
        return self.txn

    def _db(self, database: str) -> Any:
        return self._databases[database.encode()]
