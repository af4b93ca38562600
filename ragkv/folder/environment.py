"""One LMDB environment a folder and process: shared by all that have it open, reopened after a fork.

LMDB forbids opening a folder twice in one process and using an environment across ``fork``.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ragkv.errors import RecordError, StoreError
from ragkv.folder.connection import Connection, Databases, problems
from ragkv.folder.filesystem import prepare
from ragkv.folder.shared_lock import SharedLock
from ragkv.folder.transaction import Transaction
from ragkv.folder.translation import HOW_TO_REPAIR, translated

# Address space, not disk: never grown, because growing a map that others have open is what goes wrong.
MIN_MAP_BYTES, MAX_MAP_BYTES = 1 << 40, 1 << 45


class Environment:
    """A folder's LMDB environment. Obtained by :meth:`open`, given back by :meth:`close`.

    Attributes:
        path: the folder.
        readonly: whether it can only be read: then no lock file is made.
        write_lock: held by the thread of this process that writes.
        gate: entered by every thread that reads, for as long as it is inside LMDB.
    """

    _open: ClassVar[dict[tuple[int, int], Environment]] = {}
    # Reentrant: what the garbage collector drops is closed wherever it happens to run.
    _registry_lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path, databases: Databases, map_bytes: int, durable: bool, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self.write_lock: threading.RLock = threading.RLock()
        self.gate: SharedLock = SharedLock()
        self._databases = databases
        self._connect = partial(Connection, path, databases, map_bytes, durable, readonly)
        self._users = 0
        self._suspicious = False
        self._problems: list[str] | None = None
        self._readings: weakref.WeakSet[Transaction] = weakref.WeakSet()
        self._inherited: Connection | None = None
        self._connection: Connection | None = self._connect()

    @classmethod
    def open(
        cls, path: Path, databases: Databases, *, map_bytes: int = 0, durable: bool = True, readonly: bool = False
    ) -> Environment:
        """The environment of a folder: the one that is open in this process, or a new one.

        Args:
            path: the folder; made with its parents unless it is for reading only.
            databases: name and LMDB flags (as ``dupsort``) of each database.
            map_bytes: address space that the data may take; at least 1 TiB.
            durable: what was committed is on the disk, not only with the operating system.
            readonly: never write. A folder that may not be written to is opened so by itself.

        Raises:
            StoreError: the folder cannot be opened, is open for something else in this process, or was replaced under
                what has it open.
            RecordError: the file is damaged.
        """
        only_reading = prepare(path, readonly=readonly)
        status = path.stat()
        identity = (status.st_dev, status.st_ino)
        with cls._registry_lock:
            environment = cls._open.get(identity)
            if environment is None:
                map_bytes = min(max(map_bytes, MIN_MAP_BYTES), MAX_MAP_BYTES)
                environment = cls._open[identity] = cls(path, databases, map_bytes, durable, only_reading)
            elif environment.readonly and not only_reading:
                raise StoreError(f"{path} is open for reading only in this process: close that first")
            elif environment._databases != databases:
                raise StoreError(
                    f"{path} is open as a folder of another kind in this process: give each its own folder"
                )
            else:
                environment._live.check_place()
            environment._users += 1
            return environment

    @classmethod
    def is_open(cls, path: Path) -> bool:
        """Whether this process has the folder open."""
        if not path.is_dir():
            return False
        status = path.stat()
        with cls._registry_lock:
            return (status.st_dev, status.st_ino) in cls._open

    def close(self) -> None:
        """Gives the environment back; the last one to do so closes it, once no other thread is inside LMDB."""
        with self._registry_lock:
            self._users -= 1
            if self._users:
                return
        with self.write_lock:  # locks in the order in which a fork takes them
            self.gate.shut()
            try:
                with self._registry_lock:
                    if self._users == 0:  # nobody has opened it meanwhile
                        for identity in [key for key, value in self._open.items() if value is self]:
                            del self._open[identity]
                        if self._connection is not None:
                            self._connection.env.close()
            finally:
                self.gate.open()

    def begin(self) -> Transaction:
        """A transaction that reads, with buffers, to be closed by the caller.

        Raises:
            StoreError: every reader slot is taken.
            RecordError: the file was cut short and cannot be lengthened.
        """
        import lmdb

        with self.inside():
            connection = self._live
            try:
                txn = connection.env.begin(buffers=True)
            except lmdb.ReadersFullError:
                # Slots of killed processes stay taken until somebody looks.
                connection.env.reader_check()
                txn = connection.env.begin(buffers=True)
        reading = Transaction(txn, connection.databases, self._outside)
        self._readings.add(reading)
        return reading

    @contextmanager
    def inside(self) -> Iterator[None]:
        """To look at LMDB's memory in a transaction that is open: no fork meanwhile, and the file is as long as it has to be."""
        with self.gate, translated(self.path):
            self._live.ensure_length()
            yield

    @contextmanager
    def _outside(self) -> Iterator[None]:
        """See :meth:`Transaction.outside`."""
        with self.gate.left():
            yield
        if not self._users:
            raise StoreError(f"{self.path} was closed meanwhile")
        self._live.ensure_length()

    def transaction(self, *, write: bool = False, suspicious: bool = False) -> AbstractContextManager[Transaction]:
        """A state to read, or the one transaction that may write now: committed, and on disk, when the block ends.

        It is undone when the block raises.

        Args:
            write: to write.
            suspicious: damage was seen. LMDB trusts its pages, and to change damaged ones can end the process or spoil
                others: the first time they are all looked at before. So they are where reading found damage.

        Raises:
            StoreError: the folder is for reading only, was deleted, or was replaced.
            StoreFullError: the disk or the map is full; nothing was changed.
            RecordError: LMDB's own pages are damaged.
        """
        return self._writing(suspicious) if write else self._reading()

    @contextmanager
    def _writing(self, suspicious: bool) -> Iterator[Transaction]:
        if self.readonly:
            raise StoreError(f"{self.path} is open for reading only")
        with self.write_lock, translated(self.path):
            connection = self._live
            connection.check_place()
            connection.ensure_length()
            with connection.env.begin(write=True) as txn:
                if (suspicious or self._suspicious) and self._problems is None:
                    self._problems = problems(self.path)
                if self._problems:
                    raise RecordError(f"{self.path} is damaged ({self._problems[0]}): {HOW_TO_REPAIR}")
                writing = Transaction(txn, connection.databases, nullcontext)
                try:
                    yield writing
                finally:
                    writing.txn = None

    @contextmanager
    def _reading(self) -> Iterator[Transaction]:
        with self.gate:
            reading = self.begin()
            try:
                with translated(self.path):
                    yield reading
            except RecordError:
                self._suspicious = True
                raise
            finally:
                reading.close()

    def problems(self) -> list[str]:
        """What is wrong with LMDB's own pages, a line each; about 5 s for 100,000 entries."""
        # Nobody may commit meanwhile: a page would seem wrong that is only used again.
        if self.readonly:
            return problems(self.path)
        with self.write_lock, translated(self.path), self._live.env.begin(write=True):
            return problems(self.path)

    def copy(self, target: Path) -> None:
        """Writes a copy without free pages into an empty folder."""
        with self.gate, translated(self.path):
            env: Any = self._live.env  # its types know of no bytes, as a name needs that is no Unicode
            env.copy(os.fsencode(target), compact=True)

    def file_bytes(self) -> int:
        """The length of the data file.

        Raises:
            StoreError: it was deleted.
        """
        try:
            return (self.path / "data.mdb").stat().st_size
        except FileNotFoundError:
            self._live.check_place()
            raise

    def sync(self) -> None:
        """Writes what the operating system still holds to the disk."""
        if not self.readonly:
            with self.gate, translated(self.path):
                self._live.env.sync(True)

    @property
    def _live(self) -> Connection:
        connection = self._connection
        if connection is None:
            with self._registry_lock:
                if self._inherited is not None:
                    self._inherited.env.close()
                    self._inherited = None
                if self._connection is None:
                    self._connection = self._connect()
                connection = self._connection
        return connection

    def _disown(self) -> None:
        """In a child: lets go of the parent's transactions and of its environment, which the next use reopens.

        A transaction of the parent is dropped, not ended: its slot in the lock file is the parent's.
        """
        for reading in self._readings:
            reading.txn = None
        self._readings = weakref.WeakSet()
        self._inherited, self._connection = self._connection or self._inherited, None
        self.write_lock = threading.RLock()
        self.gate.anew()


_forking = threading.local()  # what a thread has taken to fork: several may fork at once


def _before_fork() -> None:
    """No thread may be reading, writing, opening or closing while the process is forked."""
    while True:
        held = _forking.held = list(Environment._open.values())
        for environment in held:
            environment.write_lock.acquire()
        for environment in held:
            environment.gate.shut()
        Environment._registry_lock.acquire()
        if held == list(Environment._open.values()):  # none was opened meanwhile
            return
        _after_fork_in_parent()


def _after_fork_in_parent() -> None:
    Environment._registry_lock.release()
    for environment in _forking.held:
        environment.gate.open()
        environment.write_lock.release()
    _forking.held.clear()


def _after_fork_in_child() -> None:
    _forking.held.clear()
    Environment._registry_lock = threading.RLock()
    for environment in Environment._open.values():
        environment._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
