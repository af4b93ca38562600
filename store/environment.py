"""One LMDB environment a folder and process: shared by the stores on it, reopened after a fork.

LMDB forbids opening a folder twice in one process and using an environment across ``fork``. This is the only module
that imports lmdb, and it does so when a folder is opened.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ragkv.errors import RecordError, StoreError, StoreFullError

logger = logging.getLogger("ragkv.store")

DATABASES = (b"entries", b"segments", b"usage", b"order", b"facts", b"state")
# Address space, not disk: never grown, because growing a map that others have open is what goes wrong.
MIN_MAP_BYTES = 1 << 40
MAX_READERS = 1024


class Environment:
    """A folder's LMDB environment. Obtained by :meth:`open`, given back by :meth:`close`.

    Args:
        path: the folder; it must exist.
        map_bytes: address space for the data.
        readonly: open without a lock file and without ever writing.

    Attributes:
        write_lock: held by the thread of this process that writes.
    """

    _open: ClassVar[dict[tuple[int, int], Environment]] = {}
    _registry_lock: ClassVar[threading.Lock] = threading.Lock()
    # Environments of the parent process: neither used nor closed here, only kept from being collected.
    _inherited: ClassVar[list[Any]] = []

    def __init__(self, path: Path, map_bytes: int, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self.write_lock = threading.RLock()
        self._map_bytes = map_bytes
        self._users = 0
        self._handles: tuple[Any, dict[bytes, Any]] | None = self._connect()

    @classmethod
    def open(cls, path: Path, *, map_bytes: int, readonly: bool = False) -> Environment:
        """The environment of a folder: the one that is open in this process, or a new one.

        Raises:
            StoreError: the folder cannot be opened, or is open for reading only and writing is asked for.
        """
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        with cls._registry_lock:
            environment = cls._open.get(identity)
            if environment is None:
                environment = cls._open[identity] = cls(path, max(map_bytes, MIN_MAP_BYTES), readonly)
            elif environment.readonly and not readonly:
                raise StoreError(f"{path} is open for reading only in this process: close that store first")
            environment._users += 1
            return environment

    def close(self) -> None:
        """Gives the environment back; the last one to do so closes it."""
        with self._registry_lock:
            self._users -= 1
            if self._users == 0:
                for identity in [key for key, value in self._open.items() if value is self]:
                    del self._open[identity]
                self._env.close()

    @property
    def _env(self) -> Any:
        if self._handles is None:
            self._handles = self._connect()
        return self._handles[0]

    def db(self, name: bytes) -> Any:
        """The handle of a database."""
        if self._handles is None:
            self._handles = self._connect()
        return self._handles[1][name]

    def begin(self) -> Any:
        """A read transaction with buffers, to be aborted by the caller.

        Raises:
            StoreError: every reader slot is taken.
        """
        import lmdb

        try:
            return self._env.begin(buffers=True)
        except lmdb.ReadersFullError:
            # Slots of killed processes stay taken until somebody looks.
            self._env.reader_check()
        try:
            return self._env.begin(buffers=True)
        except lmdb.ReadersFullError as error:
            raise StoreError(
                f"{self.path} has {self._env.max_readers()} concurrent readers, as many as it can: "
                "close batches that are no longer needed"
            ) from error

    @contextmanager
    def read(self) -> Iterator[Any]:
        """A read transaction. What it hands out is valid inside only: copy it."""
        txn = self.begin()
        try:
            with translated(self.path):
                yield txn
        finally:
            txn.abort()

    @contextmanager
    def write(self) -> Iterator[Any]:
        """A write transaction: committed, and on disk, when the block ends; undone when it raises."""
        if self.readonly:
            raise StoreError(f"{self.path} is open for reading only")
        with self.write_lock, translated(self.path), self._env.begin(write=True) as txn:
            yield txn

    def info(self) -> dict[str, int]:
        """LMDB's own figures."""
        return {**self._env.info(), **self._env.stat()}

    def sync(self) -> None:
        """Writes what the operating system still holds to the disk."""
        if not self.readonly:
            self._env.sync(True)

    def _connect(self) -> tuple[Any, dict[bytes, Any]]:
        import lmdb

        with translated(self.path):
            env = lmdb.open(
                str(self.path),
                map_size=self._map_bytes,
                max_dbs=len(DATABASES),
                max_readers=MAX_READERS,
                readonly=self.readonly,
                lock=not self.readonly,
                create=not self.readonly,
                metasync=False,
                sync=True,
                writemap=False,
            )
            try:
                dbs = self._open_databases(env)
            except lmdb.Error:
                env.close()
                raise
            if not self.readonly:
                env.reader_check()
            return env, dbs

    def _open_databases(self, env: Any) -> dict[bytes, Any]:
        with env.begin(write=not self.readonly) as txn:
            return {name: env.open_db(name, txn=txn, create=not self.readonly) for name in DATABASES}

    @classmethod
    def _after_fork(cls) -> None:
        cls._registry_lock = threading.Lock()
        for environment in cls._open.values():
            cls._inherited.append(environment._handles)
            environment._handles = None
            environment.write_lock = threading.RLock()


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns LMDB's errors into ours."""
    import lmdb

    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFullError(f"{path}: the map is full ({error}): give it a larger disk_bytes") from error
    except (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError) as error:
        raise RecordError(
            f"{path} is damaged ({error}): repair it, or delete the folder and let it be computed anew"
        ) from error
    except lmdb.VersionMismatchError as error:
        raise RecordError(f"{path} was written by another version of LMDB ({error})") from error
    except lmdb.Error as error:
        if "No space left" in str(error) or "File too large" in str(error) or "quota" in str(error).lower():
            raise StoreFullError(f"{path}: the disk is full ({error}); nothing was changed") from error
        raise StoreError(f"{path}: {error}") from error


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Environment._after_fork)
