"""What one process has open of a folder: its LMDB environment and databases. lmdb is imported when a folder is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragkv.errors import RecordError, StoreError
from ragkv.folder.translation import HOW_TO_REPAIR, translated

Databases = Mapping[bytes, Mapping[str, Any]]

MAX_READERS = 1024


class Connection:
    """What one process has open: the LMDB environment and its databases.

    Attributes:
        env: the environment.
        databases: the handle of each database.
    """

    def __init__(self, path: Path, databases: Databases, map_bytes: int, durable: bool, readonly: bool) -> None:
        import lmdb

        self._cut = False
        self._path = path
        self._readonly = readonly
        self._data = str(path / "data.mdb")
        with translated(path):
            self.env: lmdb.Environment = lmdb.open(
                os.fsencode(path),  # lmdb takes no str that is not valid Unicode
                map_size=map_bytes,
                max_dbs=len(databases),
                max_readers=MAX_READERS,
                readonly=readonly,
                # Who only reads says so where others may write: else they would use pages again that it looks at.
                lock=not readonly or os.access(path / "lock.mdb", os.W_OK),
                create=not readonly,
                metasync=durable,
                sync=durable,
            )
            try:
                status = os.stat(self._data)
                self._identity = (status.st_dev, status.st_ino)
                self._page_bytes = self.env.stat()["psize"]
                self.ensure_length()
                self.databases: dict[bytes, Any] = self._open_databases(databases)
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
        """Sees to it that the file is as long as its pages: to touch one that is missing would kill the process.

        LMDB may leave out pages at the end that it never filled; by those it is lengthened.

        Raises:
            RecordError: more is missing, or it may not be lengthened.
        """
        status = self._status()
        if status is None:
            return  # deleted or replaced: what is mapped stays whole
        # The first two pages say how long the file has to be: they may not be touched before they are known to be there.
        if status.st_size >= 2 * self._page_bytes:
            needed = self._needed_bytes()
            # Where it is too short, another process may have committed just now.
            latest = status if status.st_size >= needed else self._status()
            if latest is None or latest.st_size >= needed:
                return
            if not (self._cut or self._readonly):
                self._lengthen()
                return
        raise RecordError(f"{self._data} was cut short, to {status.st_size} bytes: {HOW_TO_REPAIR}")

    def _lengthen(self) -> None:
        # Nobody may commit meanwhile: a page would seem wrong that is only used again.
        txn = self.env.begin(write=True)
        try:
            length = os.stat(self._data).st_size
            self._cut = length < self._needed_bytes() and bool(problems(self._path))
            if self._cut:
                raise RecordError(f"{self._data} was cut short, to {length} bytes: {HOW_TO_REPAIR}")
            os.truncate(self._data, max(length, self._needed_bytes()))
        finally:
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


def problems(path: Path) -> list[str]:
    """What is wrong with the pages of a folder's file, a line each; they are read without LMDB."""
    from lmdb.verify import VerifyError, verify

    try:
        return list(verify(str(path)))
    except VerifyError as error:
        return [str(error)]
