"""How a record lies in a folder: its header in ``entries``, its segments in ``segments``."""

from __future__ import annotations

import struct

from ragkv.folder import Transaction
from ragkv.store.tier import Offer

PAGE_BYTES = 4096
_SEGMENT = struct.Struct(">I")


def segment_key(key: bytes, index: int) -> bytes:
    """What a segment is stored under."""
    return key + _SEGMENT.pack(index)


def stored_size(entry: Offer) -> int:
    """Bytes that an entry takes on disk, in whole pages."""
    return _pages(len(entry.record.pack(entry.key))) + sum(_pages(stop - start) for start, stop in entry.record.spans)


def store(txn: Transaction, entry: Offer) -> None:
    """Writes an entry where nothing is stored under its key."""
    data = entry.payload.data.numpy()
    txn.put("entries", entry.key, entry.record.pack(entry.key))
    for index, (start, stop) in enumerate(entry.record.spans):
        txn.put("segments", segment_key(entry.key, index), data[start:stop])


def delete(txn: Transaction, key: bytes) -> bool:
    """Deletes what is stored under a key; whether there was anything."""
    index = 0
    while txn.delete("segments", segment_key(key, index)):
        index += 1
    return txn.delete("entries", key)


def _pages(count: int) -> int:
    """Bytes of the pages that a value of ``count`` bytes takes, its page header included."""
    return -(-(count + 16) // PAGE_BYTES) * PAGE_BYTES
