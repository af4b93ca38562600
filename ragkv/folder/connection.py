"""What one process has open of a folder: its LMDB environment and databases. lmdb is imported when a folder is opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragkv.errors import RecordError, StoreError
from ragkv.folder.translation import HOW_TO_REPAIR, translated

logger = logging.getLogger("ragkv.folder")

Databases = Mapping[bytes, Mapping[str, Any]]

MAX_READERS = 1024
_UNFILLED_BYTES = 1 << 16


class Connection:
    """What one process has open: the LMDB environment and its databases.

    Attributes:
        env: the environment.
        databases: the handle of each database.
        was_cut: whether the file was found shorter than it has to be.
    """

    def __init__(self, path: Path, databases: Databases, map_bytes: int, durable: bool, readonly: bool) -> None:
        import lmdb

        self.was_cut = False
        self._path = path
        self._readonly = readonly
        self._map_bytes = map_bytes
        self._data = str(path / "data.mdb")
        with translated(path):
            self.env = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(databases),
                max_readers=MAX_READERS,
                readonly=readonly,
                lock=not readonly,
                create=not readonly,
                metasync=durable,
                sync=durable,
            )
            try:
                status = os.stat(self._data)
                self._identity = (status.st_dev, status.st_ino)
                self._page_bytes = self.env.stat()["psize"]
                self.ensure_length()
                self.databases = self._open_databases(databases)
                if not readonly:
                    self.env.reader_check()
            except (lmdb.Error, RecordError, OSError):
                self.env.close()
                raise

    def _open_databases(self, databases: Databases) -> dict[bytes, Any]:
        if self._readonly:
            return {name: self.env.open_db(name, create=False, **flags) for name, flags in databases.items()}
        with self.env.begin(write=True) as txn:
            return {name: self.env.open_db(name, txn=txn, **flags) for name, flags in databases.items()}

    def ensure_length(self) -> None:
        """Lengthens a file that is shorter than its pages: to touch what is missing would kill the process.

        What was cut off then reads as zeros, which no checksum and no page header takes for data.

        Raises:
            RecordError: it is short and may not be written to, or there is no telling how long it has to be.
        """
        status = self._status()
        if status is None:
            return  # deleted or replaced: what is mapped stays whole
        length = status.st_size
        # The first two pages say how long the file is: not even they may be touched where they are missing.
        if length < 2 * self._page_bytes:
            raise RecordError(f"{self._data} was cut to {length} bytes: put a copy of it in its place")
        if length >= self._needed_bytes():
            return
        if self._readonly:
            raise RecordError(f"{self._data} was cut short, and it may not be repaired here")
        if self._needed_bytes() > self._map_bytes:
            raise RecordError(f"{self._path} is damaged (it claims {self._needed_bytes()} bytes): {HOW_TO_REPAIR}")
        # The lock of a write transaction keeps the other processes from lengthening it at the same time.
        with self.env.begin(write=True) as txn:
            missing = self._needed_bytes() - os.stat(self._data).st_size
            if missing > 0:
                os.truncate(self._data, self._needed_bytes())
            # LMDB leaves out pages at the end that it never filled; more than that is damage.
            if missing > _UNFILLED_BYTES:
                self.was_cut = True
                logger.warning("%s was %d bytes too short: what stood there is lost", self._data, missing)
            txn.abort()

    def _needed_bytes(self) -> int:
        info = self.env.info()
        return (info["last_pgno"] + 1) * self._page_bytes if info["last_txnid"] else 0

    def check_place(self) -> None:
        """Raises StoreError where the path no longer leads to the file that is open."""
        if self._status() is None:
            raise StoreError(f"{self._path} was deleted or replaced under this process: close it and open it again")

    def _status(self) -> os.stat_result | None:
        """Of the file that is open; None where the path does not lead to it."""
        try:
            status = os.stat(self._data)
        except FileNotFoundError:
            return None
        return status if (status.st_dev, status.st_ino) == self._identity else None
