"""Saving what a damaged file still holds. LMDB trusts its pages, so they are read without it."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ragkv.errors import RecordError, StoreError
from ragkv.folder.connection import Databases
from ragkv.folder.environment import Environment

# The format of LMDB 0.9, 64 bits: https://github.com/LMDB/lmdb, libraries/liblmdb/mdb.c (MDB_page, MDB_node, MDB_db, MDB_meta).
_MAGIC, _VERSION = 0xBEEFC0DE, 1
# Magic, version, page size, root of the databases, last page, transaction.
_META = struct.Struct("<16xII16x I44x 40xQ QQ")
_PAGE = struct.Struct("<QHHHH")  # number, size of a fixed value, flags, end of the pointers, start of the nodes
_NODE = struct.Struct("<HHHH")  # size (low, high) or page number, flags, size of the key
_ROOT = struct.Struct("<40xQ")
_BRANCH, _LEAF, _FIXED = 1, 2, 32  # of a page
_BIG, _TREE, _SEVERAL = 1, 2, 4  # of a node: value on pages of its own, in a tree of its own, several values
_COMMIT_BYTES = 1 << 26


def salvage(damaged: Path, folder: Path, databases: Databases) -> int:
    """Copies all that can be read of a damaged data file into a new folder.

    A value may be other than what was stored: seals tell.

    Args:
        damaged: the file; nobody may have it open.
        folder: made if it is not there, without a data file.
        databases: the databases to copy.

    Returns:
        How many values were copied.

    Raises:
        RecordError: nothing can be read.
        StoreError: there is something in the folder, or it cannot be written.
    """
    import lmdb

    environment = Environment.open(folder, databases)
    try:
        with open(damaged, "rb") as file:
            values = _values(_Pages(file), databases)
            copied, more = 0, True
            while more:
                with environment.transaction(write=True) as txn:
                    size, more = 0, False
                    for database, key, value in values:
                        with suppress(lmdb.BadValsizeError):  # damage made it longer than it can have been
                            txn.put(database, key, value)
                        copied, size = copied + 1, size + len(value)
                        if size > _COMMIT_BYTES:
                            more = True
                            break
        return copied
    finally:
        environment.close()


def rewrite(folder: Path, databases: Databases) -> int:
    """Rewrites a folder's file with what :func:`salvage` can save of it.

    The damaged file stays beside the new one, see :func:`replace_damaged`.

    Returns:
        How many values were saved.

    Raises:
        RecordError: nothing can be read; the file stays as it is.
        StoreError: the folder is open.
    """
    refuse_open(folder)
    new = folder / "rescue"
    shutil.rmtree(new, ignore_errors=True)
    try:
        saved = salvage(folder / "data.mdb", new, databases)
        replace_damaged(folder, new / "data.mdb")
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return saved


def replace_damaged(folder: Path, new: Path) -> None:
    """Puts a new file in the place of a folder's, in one step: whatever happens, there is one or the other.

    The damaged file stays as ``data.mdb.damaged``, or with a number behind that where there is one already; delete it
    when it is no longer of interest.
    """
    data = folder / "data.mdb"
    names = (folder / f"data.mdb.damaged{number or ''}" for number in count())
    damaged = next(name for name in names if not name.exists())
    try:
        os.link(data, damaged)
    except OSError:  # a file system without links
        shutil.copyfile(data, damaged)
    _sync(new)
    os.replace(new, data)
    (folder / "lock.mdb").unlink(missing_ok=True)
    _sync(folder)


def _sync(path: Path) -> None:
    """Writes what the operating system still holds of a file, or of a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_open(folder: Path) -> None:
    """Raises StoreError where a folder's file is not there, or is open in this or in another process."""
    if not (folder / "data.mdb").exists():
        raise StoreError(f"{folder} is not a folder of a store or of documents")
    if Environment.is_open(folder):
        raise StoreError(f"{folder} is open in this process: close what uses it first")
    if in_use(folder):
        raise StoreError(f"{folder} is open in another process: stop it first")


def in_use(folder: Path) -> bool:
    """Whether another process has a folder open, that this one has not."""
    return (folder / "lock.mdb").exists() and _locked(folder / "lock.mdb")


def _locked(file: Path) -> bool:
    """Whether another process holds the lock that LMDB keeps on this file for as long as it is open."""
    try:
        import fcntl
    except ImportError:
        return False
    with open(file, "r+b") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


class _Node(NamedTuple):
    flags: int
    key: bytes
    size: int
    data: bytes


def _values(pages: _Pages, databases: Databases) -> Iterator[tuple[str, bytes, bytes]]:
    for table in pages.nodes(pages.root):
        if table.key in databases and table.flags & _TREE and len(table.data) >= _ROOT.size:
            for node in pages.nodes(*_ROOT.unpack_from(table.data)):
                for value in pages.values(node):
                    yield table.key.decode(), node.key, value


class _Pages:
    """The pages of a file. What is missing or makes no sense is passed over.

    Attributes:
        root: page of the tree that names the databases, in the last state that was committed.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = os.fstat(file.fileno()).st_size
        found = []
        for place in (0, *(1 << bits for bits in range(12, 17))):
            file.seek(place)
            head = file.read(_META.size)
            if len(head) == _META.size:
                magic, version, page_bytes, root, _, transaction = _META.unpack(head)
                if (magic, version) == (_MAGIC, _VERSION) and page_bytes in (1 << bits for bits in range(9, 17)):
                    found.append((transaction, page_bytes, root))
        if not found:
            raise RecordError(f"{file.name}: nothing can be read of it: put a copy in its place, or begin anew")
        # Never the state before: what was removed would come back.
        _, self._bytes, self.root = max(found)

    def nodes(self, root: int) -> Iterator[_Node]:
        """All that the leaves of a tree hold."""
        waiting, seen = [root], set()
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            page = self._read(number, self._bytes)
            if len(page) < self._bytes or _PAGE.unpack_from(page)[0] != number:
                continue
            if _PAGE.unpack_from(page)[2] & _BRANCH:
                waiting += [node.size | node.flags << 32 for node in reversed(list(_nodes(page)))]
            else:
                yield from _nodes(page)

    def values(self, node: _Node) -> list[bytes]:
        """What stands under a key."""
        if node.flags & _SEVERAL and node.flags & _TREE:
            return [inner.key for inner in self.nodes(*_ROOT.unpack_from(node.data))] if len(node.data) >= 48 else []
        if node.flags & _SEVERAL:
            return [inner.key for inner in _nodes(node.data)]
        if node.flags & _BIG:
            number = int.from_bytes(node.data[:8], "little")
            value = self._read(number, _PAGE.size + node.size)[_PAGE.size :]
            return [value] if len(value) == node.size else []
        return [node.data]

    def _read(self, number: int, count: int) -> bytes:
        if number * self._bytes + count > self._end:
            return b""
        self._file.seek(number * self._bytes)
        return self._file.read(count)


def _nodes(page: bytes) -> Iterator[_Node]:
    """The nodes of a page, or of a page within a node."""
    if len(page) < _PAGE.size:
        return
    _, fixed_bytes, kind, end, _ = _PAGE.unpack_from(page)
    if not kind & (_BRANCH | _LEAF):
        return
    for index, pointer in enumerate(range(_PAGE.size, min(end, len(page) - 1), 2)):
        if kind & _FIXED:
            start = _PAGE.size + index * fixed_bytes
            yield _Node(0, page[start : start + fixed_bytes], 0, b"")
            continue
        at = int.from_bytes(page[pointer : pointer + 2], "little")
        if at + _NODE.size > len(page):
            continue
        low, high, flags, key_bytes = _NODE.unpack_from(page, at)
        start, size = at + _NODE.size + key_bytes, low | high << 16
        stop = start + (8 if flags & _BIG else size)
        if kind & _BRANCH or stop <= len(page):
            yield _Node(flags, page[at + _NODE.size : start], size, page[start:stop])
