"""How a record lies in a shared pool: as one object, its header and segments one after the other.

    head      b"RAGKVP" | version u8 | cipher u8 (0 none, 1 AES-GCM) | id 16 | length of the header u32 | checksum u64
    header    created f64 | expires f64 | cost f64 | namespace 8 | the record's header (:mod:`ragkv.store.record`)
    segments  the record's, in order

A published catalogue (:mod:`ragkv.store.remote.publications`) is an object of the same kind, with a header and segments of its own.

The id is a random number of each object. The checksum (xxh3_64) covers the key, the head and the header. With a cipher, header and
segments are encrypted one by one, each 16 bytes longer: with a key of this object alone (HKDF of the pool's key, the id and the
chunk's key) and its number, from 0 for the header, as nonce. Head and key are authenticated with each. Numbers are little-endian.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ragkv.errors import MissingPackageError, RecordError, StoreError
from ragkv.store.payload import Payload
from ragkv.store.policy import Usage
from ragkv.store.record import Record
from ragkv.store.rows import Row

VERSION = 1
_MAGIC = b"RAGKVP"
_HEAD = struct.Struct("<6sBB16sI")
_CHECKSUM = struct.Struct("<Q")
_TERMS = struct.Struct("<ddd8s")
_HEAD_BYTES = _HEAD.size + _CHECKSUM.size
_PLAIN, _AES_GCM = 0, 1
_TAG_BYTES = 16
_MOST_HEADER_BYTES = 64 << 20
ID = slice(8, 24)
"""Where an object's id stands."""


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
        extra = 0 if self.decrypt is None else _TAG_BYTES
        return self.segments_start + span[0] + segment * extra, self.segments_start + span[1] + (segment + 1) * extra

    def plain(self, segment: int, data: Any) -> Any:
        """A segment's plain bytes.

        Raises:
            RecordError: it is encrypted and not what was written.
        """
        return data if self.decrypt is None else self.decrypt(segment + 1, data)


@dataclass(frozen=True)
class Opened:
    """An object whose header was read.

    Attributes:
        record: the record's header.
        row: on what terms it is kept.
        head: the object's.
    """

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
        encryption_key: 32 bytes, with which they are encrypted and authenticated; None for neither.

    Raises:
        StoreError: it is no such key.
        MissingPackageError: ``cryptography`` is not installed.
    """

    def __init__(self, encryption_key: bytes | None = None) -> None:
        if encryption_key is not None and (not isinstance(encryption_key, bytes) or len(encryption_key) != 32):
            raise StoreError("an encryption key is 32 bytes, as secrets.token_bytes(32) makes them")
        self._secret = encryption_key
        if encryption_key is not None:
            _cryptography()

    def __repr__(self) -> str:
        return "Envelope()" if self._secret is None else "Envelope(encryption_key=...)"

    def seal(self, key: bytes, record: Record, payload: Payload, row: Row) -> bytearray:
        """A chunk's object."""
        terms = _TERMS.pack(row.created_s, row.expires_s, row.usage.cost_s, row.namespace)
        segments = [memoryview(payload.data.numpy()[start:stop]) for start, stop in record.spans]
        return self.seal_pieces(key, terms + record.pack(key), segments)

    def seal_pieces(self, key: bytes, header: bytes, segments: Sequence[Any]) -> bytearray:
        """An object of any header and segments, bound to a key."""
        extra = 0 if self._secret is None else _TAG_BYTES
        cipher = _PLAIN if self._secret is None else _AES_GCM
        head = _HEAD.pack(_MAGIC, VERSION, cipher, os.urandom(16), len(header) + extra)
        pieces: list[Any] = [header, *segments]
        if self._secret is not None:
            encrypt, bound = _cipher(self._secret, key, head).encrypt, head + key
            pieces = [encrypt(_nonce(number), bytes(piece), bound) for number, piece in enumerate(pieces)]
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

    def open_head(self, key: bytes, data: Any) -> Head:
        """The beginning of an object.

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
        if version != VERSION or cipher not in (_PLAIN, _AES_GCM):
            raise ForeignError(f"it is of version {version}, this version of ragkv reads {VERSION}")
        if (cipher == _AES_GCM) != (self._secret is not None):
            raise ForeignError("it is encrypted, and no key was given" if cipher else "it is not encrypted")
        decrypt = None if self._secret is None else _decrypt(self._secret, key, head)
        if decrypt is not None:
            try:
                header = decrypt(0, header)
            except RecordError as error:
                raise ForeignError("it is encrypted with another key") from error
        return Head(header, number, whole, decrypt)

    @staticmethod
    def needed(data: Any) -> int:
        """Bytes of an object up to its segments, from its first bytes.

        Raises:
            RecordError: it is none.
        """
        if len(data) < _HEAD_BYTES or bytes(data[: len(_MAGIC)]) != _MAGIC:
            raise RecordError("it is no object of a pool of ragkv")
        size: int = _HEAD.unpack(bytes(data[: _HEAD.size]))[4]
        if not _TERMS.size <= size <= _MOST_HEADER_BYTES:
            raise RecordError(f"the object's header cannot have {size} bytes")
        return _HEAD_BYTES + size


def _checksum(key: bytes, head: bytes, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + head + header)


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _cipher(secret: bytes, key: bytes, head: bytes) -> Any:
    """AES-GCM with a key of this object alone, so that numbers of pieces may be nonces."""
    hashes, hkdf, ciphers = _cryptography()
    derived = hkdf.HKDF(hashes.SHA256(), 32, salt=head[ID], info=b"ragkv pool 1" + key).derive(secret)
    return ciphers.AESGCM(derived)


def _decrypt(secret: bytes, key: bytes, head: bytes) -> Callable[[int, Any], bytes]:
    cipher, bound = _cipher(secret, key, head), head + key

    def decrypt(number: int, data: Any) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(cipher.decrypt(_nonce(number), bytes(data), bound))
        except (InvalidTag, ValueError) as error:
            raise RecordError("a piece is damaged, or was not written with this key") from error

    return decrypt


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers import aead
        from cryptography.hazmat.primitives.kdf import hkdf
    except ImportError as error:
        raise MissingPackageError(
            f"encryption needs the package cryptography: pip install 'ragkv[encryption]' ({error})"
        ) from error
    return hashes, hkdf, aead
