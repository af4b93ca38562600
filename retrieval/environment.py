"""One LMDB environment: opened once, read in snapshots, written in transactions, its errors in our words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ragkv.errors import RecordError, RetrievalError, StoreFullError


class Environment:
    """An LMDB environment with its databases.

    Several processes may have it open; writers queue. Values are copied out of every transaction, so that none
    depends on memory that LMDB may use again.

    Args:
        folder: made if it is not there.
        databases: name and LMDB flags of each database.
        map_bytes: the most it can ever hold. Address space, not disk; it does not grow later, since growing it under
            other processes is where LMDB is fragile.

        durable: a committed change is on the disk, not only with the operating system.

    Raises:
        RetrievalError: the folder cannot be used, or this process has it open already.
        RecordError: the folder holds something else, or is damaged.
    """

    def __init__(self, folder: Path, databases: dict[str, dict[str, Any]], map_bytes: int, durable: bool) -> None:
        import lmdb

        self._lmdb = lmdb
        self._pid = os.getpid()
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RetrievalError(f"{folder} cannot be made: {error}") from error
        with self._our_errors():
            self._env: Any = lmdb.open(
                str(folder), map_size=map_bytes, max_dbs=len(databases), max_readers=1024, sync=durable
            )
            # A reader that was killed would keep its snapshot, and with it the room of all that is deleted later.
            self._env.reader_check()
            self._databases = {name: self._env.open_db(name.encode(), **flags) for name, flags in databases.items()}

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[Transaction]:
        """A snapshot to read from, or the one transaction that may write now: all of it is kept, or nothing.

        Raises:
            StoreFullError: disk or map are full; nothing of the transaction is kept.
            RetrievalError: the environment is closed, or the process was forked.
            RecordError: a page of the file is damaged.
        """
        if not self.ours:
            raise RetrievalError(
                f"{self.folder} was opened before this process was forked: close it before forking, or start the "
                "process with the 'spawn' method and open the folder there"
            )
        with self._our_errors(), self._env.begin(write=write) as txn:
            yield Transaction(txn, self._databases)

    @property
    def ours(self) -> bool:
        """Whether this process opened it, rather than one that this was forked from."""
        return os.getpid() == self._pid

    def close(self) -> None:
        """Closes it, in the process that opened it; closing twice is no error."""
        if self.ours:
            self._env.close()

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        lmdb = self._lmdb
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreFullError(f"{self.folder} is full; nothing was written, what was there is untouched") from error
        except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
            raise RecordError(f"{self.folder}: no LMDB environment, or a damaged one: {error}") from error
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> Exception:
        text = str(error)
        if "No space left" in text or "quota" in text or "File too large" in text:
            return StoreFullError(f"the disk is full under {self.folder}; what was there is untouched: {text}")
        if "already open" in text:
            return RetrievalError(f"this process has {self.folder} open already: share that object, or close it first")
        if "closed" in text:
            return RetrievalError(f"{self.folder} is closed: open it again")
        return RetrievalError(f"{self.folder} cannot be used: {text}")


class Transaction:
    """The databases of an environment by name, in one snapshot. Valid inside its ``with`` block only."""

    def __init__(self, txn: Any, databases: dict[str, Any]) -> None:
        self._txn = txn
        self._databases = databases

    def get(self, database: str, key: bytes) -> bytes | None:
        """The value under a key (the first one, where a key may have several)."""
        return self._txn.get(key, db=self._databases[database])

    def put(self, database: str, key: bytes, value: bytes) -> None:
        """Sets the value under a key, or adds one where a key may have several."""
        self._txn.put(key, value, db=self._databases[database])

    def delete(self, database: str, key: bytes, value: bytes = b"") -> None:
        """Deletes a key, or one of its values; what is not there is passed over."""
        self._txn.delete(key, value, db=self._databases[database])

    def clear(self, database: str) -> None:
        """Deletes all keys."""
        self._txn.drop(self._databases[database], delete=False)

    def items(self, database: str, prefix: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """All keys that begin so, and their values, by key."""
        with self._txn.cursor(self._databases[database]) as cursor:
            if cursor.set_range(prefix):
                for key, value in cursor.iternext(keys=True, values=True):
                    if not key.startswith(prefix):
                        return
                    yield key, value

    def keys(self, database: str) -> Iterator[bytes]:
        """All keys, in order."""
        with self._txn.cursor(self._databases[database]) as cursor:
            yield from cursor.iternext(keys=True, values=False)

    def count(self, database: str) -> int:
        """How many values there are."""
        return self._txn.stat(self._databases[database])["entries"]
