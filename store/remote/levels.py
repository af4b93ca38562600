"""Levels of a chunk in a pool: the same KV in fewer and fewer bytes, each an object of its own (CacheGen, arXiv:2310.07240)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ragkv.chunk import digest
from ragkv.errors import ArgumentError, listable
from ragkv.store.codecs import CacheGen, Codec, Int8
from ragkv.store.codecs.lossless import zstd


class Level(NamedTuple):
    """How a level is encoded.

    Attributes:
        codec: by which.
        share: of the bytes of what is stored that it takes, before that was seen.
    """

    codec: Codec
    share: float


#: Best first. A name means the same on every machine. CacheGen's have steps for the first, middle and last third of the layers.
LEVELS: dict[str, Level] = {
    "int8": Level(Int8(), 0.58),
    "fine": Level(CacheGen((0.1, 0.15, 0.2)), 0.38),
    "medium": Level(CacheGen((0.2, 0.3, 0.4)), 0.32),
    "coarse": Level(CacheGen((0.5, 1.0, 1.5)), 0.25),
}


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """Levels, best first.

    Raises:
        ArgumentError: one is not known, or there are none of them but a text.
        StoreError: what encodes one is not installed.
    """
    if not listable(names) or not all(name in list(LEVELS) for name in names):
        raise ArgumentError(
            f"levels are some of {', '.join(map(repr, LEVELS))}, as levels=('fine', 'coarse'); got {names!r}"
        )
    if any(isinstance(LEVELS[name].codec, CacheGen) for name in names):
        zstd()
    return tuple(name for name in LEVELS if name in names)


def level_key(key: bytes, name: str) -> bytes:
    """The key of the object that holds a chunk at a level."""
    return digest("ragkv level 1", key, name)


def with_levels(keys: Iterable[bytes]) -> set[bytes]:
    """Chunks, and all levels of them that there may be."""
    keys = list(keys)
    return {*keys, *(level_key(key, name) for key in keys for name in LEVELS)}
