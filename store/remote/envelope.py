"""How a record lies in a shared pool: as one object, its header and segments one after the other.

    head      b"RAGKVP" | version u8 | cipher u8 | id 16 | length of the header u32 | checksum u64
    header    created f64 | expires f64 | cost f64 | namespace 8 | the record's header (:mod:`ragkv.store.record`)
    segments  the record's, in order

A published catalogue (:mod:`ragkv.store.remote.publications`) is an object of the same kind, with a header and segments of its own.

The id is a random number of each object. The checksum (xxh3_64) covers the key, the head and the header. With a cipher (0 none, 1
AES-GCM, 2 with a key for each namespace: :mod:`ragkv.store.remote.ciphers`) header and segments are encrypted one by one, each 16
bytes longer, with its number, from 0 for the header, as nonce. Head and key are authenticated with each. Numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ragkv.errors import RecordError, StoreError
from ragkv.store.payload import Payload
from ragkv.store.policy import Usage
from ragkv.store.record import Record
from ragkv.store.remote.ciphers import (
    KEY_EACH,
    ONE_KEY,
    PLAIN,
    TAG_BYTES,
    Ciphers,
    cipher_of,
    decrypting,
    encrypted,
)
from ragkv.store.rows import Row

VERSION = 1
_MAGIC = b"RAGKVP"
_HEAD = struct.Struct("<6sBB16sI")
_CHECKSUM = struct.Struct("<Q")
_TERMS = struct.Struct("<ddd8s")
_HEAD_BYTES = _HEAD.size + _CHECKSUM.size
MOST_HEADER_BYTES = 64 << 20
ID = slice(8, 24)
"""Where an object's id stands."""
_OTHERWISE = {
    PLAIN: "it is not encrypted",
    **dict.fromkeys((ONE_KEY, KEY_EACH), "it is encrypted, and no key was given"),
    -1: "one key is for all namespaces, or each has its own: it is the other way here",
}


class ForeignError(StoreError):
    """An object is of another version, or encrypted with another key: whole perhaps, but not for us."""


class Head(NamedTuple):
    """The beginning of an object, checked.

    Attributes:
        header: its plain bytes.
        id: the object's.
        segments_start: where its segments begin.
        decrypt: one piece, by its number; None where nothing is encrypted.
    """

    header: bytes
    id: bytes
    segments_start: int
    decrypt: Callable[[int, Any], bytes] | None

    def place(self, segment: int, span: tuple[int, int]) -> tuple[int, int]:
        """Where a segment lies in the object, that lies so among the plain ones."""
        extra = 0 if self.decrypt is None else TAG_BYTES
        return self.segments_start + span[0] + segment * extra, self.segments_start + span[1] + (segment + 1) * extra

    def plain(self, segment: int, data: Any) -> Any:
        """A segment's plain bytes.

        Raises:
            RecordError: it is encrypted and not what was written.
        """
        return data if self.decrypt is None else self.decrypt(segment + 1, data)


@dataclass(frozen=True)
class Opened:
    """An object whose header was read: the record's header, on what terms it is kept, and the object's own head."""

    record: Record
    row: Row
    head: Head

    @property
    def id(self) -> bytes:
        """The object's."""
        return self.head.id

    def place(self, segment: int) -> tuple[int, int]:
        """Where a segment lies in the object."""
        return self.head.place(segment, self.record.spans[segment])

    def take(self, segment: int, data: Any, payload: Payload) -> None:
        """Puts a segment to its place, and verifies it there.

        Raises:
            RecordError: it is not what was stored.
        """
        start, stop = self.record.spans[segment]
        plain = self.head.plain(segment, data)
        if len(plain) != stop - start:
            raise RecordError(f"segment {segment} is cut short")
        payload.data.numpy()[start:stop] = np.frombuffer(plain, np.uint8)
        self.record.check_segment(segment, payload.data[start:stop])


class Envelope:
    """Writes and reads objects.

    Args:
        encryption_key: see :class:`~ragkv.store.remote.ciphers.Ciphers`.

    Raises:
        StoreError, MissingPackageError: as there.
    """

    def __init__(self, encryption_key: bytes | Mapping[str, bytes] | None = None) -> None:
        self._ciphers = Ciphers(encryption_key)

    def __repr__(self) -> str:
        return "Envelope()" if self._ciphers.kind == PLAIN else "Envelope(encryption_key=...)"

    def seals(self, namespace: bytes) -> bool:
        """Whether objects of a namespace, by its id, can be written: where each has a key, those that have none cannot."""
        return self._ciphers.knows(namespace)

    def seal(self, key: bytes, record: Record, payload: Payload, row: Row) -> bytearray:
        """A chunk's object."""
        terms = _TERMS.pack(row.created_s, row.expires_s, row.usage.cost_s, row.namespace)
        segments = [payload.data.numpy()[start:stop].data for start, stop in record.spans]
        return self.seal_pieces(key, terms + record.pack(key), segments, row.namespace)

    def seal_pieces(self, key: bytes, header: bytes, segments: Sequence[Any], namespace: bytes) -> bytearray:
        """An object of any header and segments, bound to a key, of a namespace, by its id.

        Raises:
            StoreError: each namespace has a key, and this one has none.
        """
        secret = self._ciphers.secret(namespace)
        extra = 0 if secret is None else TAG_BYTES
        number = self._ciphers.new_id(secret)
        head = _HEAD.pack(_MAGIC, VERSION, self._ciphers.kind, number, len(header) + extra)
        pieces: list[Any] = [header, *segments]
        if secret is not None:
            cipher = cipher_of(secret, key, number)
            pieces = [encrypted(cipher, number, piece, head + key) for number, piece in enumerate(pieces)]
        whole = bytearray(head + _CHECKSUM.pack(_checksum(key, head, pieces[0])))
        for piece in pieces:
            whole += piece
        return whole

    def open(self, key: bytes, data: Any) -> Opened:
        """The chunk's object that begins with these bytes, at least :meth:`needed` of them.

        Raises:
            RecordError, ForeignError: see :meth:`open_head`.
        """
        head = self.open_head(key, data)
        created_s, expires_s, cost_s, namespace = _TERMS.unpack_from(head.header)
        record = Record.unpack(key, head.header[_TERMS.size :])
        row = Row(Usage(record.payload_bytes, cost_s), 0.0, created_s, created_s, expires_s, namespace=namespace)
        return Opened(record, row, head)

    def open_head(self, key: bytes, data: Any, namespace: bytes | None = None) -> Head:
        """The beginning of an object.

        Args:
            key: that it is bound to.
            data: at least :meth:`needed` bytes.
            namespace: the id of its namespace, where that is known: then another one's key opens nothing.

        Raises:
            RecordError: it is damaged, or belongs under another key.
            ForeignError: it is of another version, or not encrypted with this key.
        """
        head, whole = bytes(data[: _HEAD.size]), self.needed(data)
        _, version, cipher, number, size = _HEAD.unpack(head)
        header = bytes(data[_HEAD_BYTES:whole])
        if len(header) != size or _CHECKSUM.unpack(bytes(data[_HEAD.size : _HEAD_BYTES]))[0] != _checksum(
            key, head, header
        ):
            raise RecordError("the object's header is damaged, or another's: its checksum differs")
        if version != VERSION or cipher not in (PLAIN, ONE_KEY, KEY_EACH):
            raise ForeignError(f"it is of version {version}, this version of ragkv reads {VERSION}")
        if cipher != self._ciphers.kind:
            raise ForeignError(_OTHERWISE[cipher if self._ciphers.kind == PLAIN or cipher == PLAIN else -1])
        if cipher == PLAIN:
            return Head(header, number, whole, None)
        for secret in self._ciphers.for_reading(number, namespace):
            decrypt = decrypting(cipher_of(secret, key, number), head + key)
            with suppress(RecordError):
                return Head(decrypt(0, header), number, whole, decrypt)
        raise ForeignError("it is encrypted with another key")

    @staticmethod
    def needed(data: Any) -> int:
        """Bytes of an object up to its segments, from its first bytes.

        Raises:
            RecordError: it is none.
        """
        if len(data) < _HEAD_BYTES or bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise RecordError("it is no object of a pool of ragkv")
        size: int = _HEAD.unpack(bytes(data[: _HEAD.size]))[4]
        if not _TERMS.size <= size <= MOST_HEADER_BYTES:
            raise RecordError(f"the object's header cannot have {size} bytes")
        return _HEAD_BYTES + size


def _checksum(key: bytes, head: bytes, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + head + header)
