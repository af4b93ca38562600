"""How the objects of a pool are encrypted: with one key for all of them, with one for each namespace, or not at all.

AES-GCM, with a key of each object alone: HKDF-SHA256 of the secret, of the object's id and of the key that it is bound to. Where
each namespace has a secret of its own, an object's id begins with four bytes that all of one secret share, to find that by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ragkv.errors import RecordError, StoreError
from ragkv.store.remote.pool import needing
from ragkv.store.rows import namespace_id

#: What stands in an object's head: how it is encrypted.
PLAIN, ONE_KEY, KEY_EACH = 0, 1, 2

#: By so many bytes a piece is longer.
TAG_BYTES = 16

_ID_BYTES, _HINT_BYTES = 16, 4


class Ciphers:
    """The secrets of a pool.

    Args:
        given: 32 bytes; or those of each namespace, by its name; ``None`` for none. What is added to a mapping later counts, too.

    Attributes:
        kind: what stands in the heads of objects that are written.

    Raises:
        StoreError: it is none of these.
        MissingPackageError: ``cryptography`` is not installed.
    """

    def __init__(self, given: bytes | Mapping[str, bytes] | None) -> None:
        self.kind: int = PLAIN if given is None else KEY_EACH if isinstance(given, Mapping) else ONE_KEY
        self._given = given
        self._of: dict[bytes, bytes] = {}
        self._hinted: dict[bytes, list[bytes]] = {}
        if given is not None:
            _cryptography()
        self._read()

    def secret(self, namespace: bytes) -> bytes | None:
        """With which a namespace, by its id, is written; ``None`` where nothing is encrypted.

        Raises:
            StoreError: the namespace has none, while others have: it must not be written.
        """
        if not isinstance(self._given, Mapping):
            return self._given
        if not self.knows(namespace):
            raise StoreError("encryption_key has no key for the namespace: nothing of it comes to the pool")
        return self._of[namespace]

    def knows(self, namespace: bytes) -> bool:
        """Whether a namespace, by its id, can be written."""
        if self.kind == KEY_EACH and namespace not in self._of:
            self._read()
        return self.kind != KEY_EACH or namespace in self._of

    def new_id(self, secret: bytes | None) -> bytes:
        """Of an object that is to be written."""
        hint = _hint(secret) if secret is not None and self.kind == KEY_EACH else b""
        return hint + os.urandom(_ID_BYTES - len(hint))

    def for_reading(self, number: bytes, namespace: bytes | None) -> list[bytes]:
        """Secrets with which an object may be encrypted.

        Args:
            number: the object's id.
            namespace: the id of its namespace, where that is known.
        """
        if not isinstance(self._given, Mapping):
            return [] if self._given is None else [self._given]
        if namespace is not None:
            return [self._of[namespace]] if self.knows(namespace) else []
        hint = number[:_HINT_BYTES]
        if hint not in self._hinted:
            self._read()
        return self._hinted.get(hint, [])

    def _read(self) -> None:
        given = self._given
        named = dict(given) if isinstance(given, Mapping) else {} if given is None else {"": given}
        for name, secret in named.items():
            if not isinstance(name, str) or not isinstance(secret, bytes) or len(secret) != 32:
                raise StoreError(
                    "an encryption key is 32 bytes, as secrets.token_bytes(32) makes them, or a mapping from namespaces to such"
                )
        known = {namespace_id(name): secret for name, secret in named.items()}
        if known == self._of:
            return
        hinted: dict[bytes, list[bytes]] = {}
        for secret in dict.fromkeys(known.values()):
            hinted.setdefault(_hint(secret), []).append(secret)
        self._of, self._hinted = known, hinted


def cipher_of(secret: bytes, bound: bytes, number: bytes) -> Any:
    """AES-GCM with the key of one object, so that numbers of pieces may be nonces.

    Args:
        secret: the pool's, or a namespace's.
        bound: the key that the object is bound to.
        number: the object's id.
    """
    hashes, hkdf, ciphers = _cryptography()
    derived = hkdf.HKDF(hashes.SHA256(), 32, salt=number, info=b"ragkv pool 1" + bound).derive(secret)
    return ciphers.AESGCM(derived)


def encrypted(cipher: Any, number: int, piece: Any, about: bytes) -> bytes:
    """A piece, by its number, with what is authenticated beside it."""
    return bytes(cipher.encrypt(_nonce(number), bytes(piece), about))


def decrypting(cipher: Any, about: bytes) -> Callable[[int, Any], bytes]:
    """Gives a piece's plain bytes, by its number; a RecordError where it is not what was encrypted."""

    def decrypt(number: int, data: Any) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(cipher.decrypt(_nonce(number), bytes(data), about))
        except (InvalidTag, ValueError) as error:
            raise RecordError("a piece is damaged, or was not written with this key") from error

    return decrypt


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _hint(secret: bytes) -> bytes:
    hashes, hkdf, _ = _cryptography()
    hint: bytes = hkdf.HKDF(hashes.SHA256(), _HINT_BYTES, salt=None, info=b"ragkv pool hint 1").derive(secret)
    return hint


def _cryptography() -> tuple[Any, Any, Any]:
    with needing("encryption needs the package cryptography: pip install 'ragkv[encryption]'"):
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.ciphers import aead
        from cryptography.hazmat.primitives.kdf import hkdf
    return hashes, hkdf, aead
