"""Checksums that bind a value to its key: they find accidents, not forgeries."""

from __future__ import annotations

from xxhash import xxh3_128_digest

from ragkv.errors import RecordError

_SEAL_BYTES = 16


def seal(key: bytes, data: bytes) -> bytes:
    """A checksum over key and data (XXH3, 128 bits), then the data."""
    return xxh3_128_digest(key + data) + data


def unseal(key: bytes, record: bytes, what: str = "a record") -> bytes:
    """The data of :func:`seal`.

    Args:
        key: what it stands under.
        record: what stands there.
        what: what to call it.

    Raises:
        RecordError: it is not what was sealed under this key.
    """
    data = record[_SEAL_BYTES:]
    if xxh3_128_digest(key + data) != record[:_SEAL_BYTES]:
        raise RecordError(f"{what} is damaged: its checksum differs")
    return data
