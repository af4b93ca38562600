"""Codecs, one a file, chosen by name and recorded with every entry."""

from __future__ import annotations

from functools import cache

from ragkv.errors import RecordError
from ragkv.store.codecs.base import Codec, Side
from ragkv.store.codecs.cachegen import CacheGen
from ragkv.store.codecs.fp8 import Fp8
from ragkv.store.codecs.int4 import Int4
from ragkv.store.codecs.int8 import Int8
from ragkv.store.codecs.lossless import Lossless
from ragkv.store.codecs.raw import Raw
from ragkv.store.named import named

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Raw, Lossless, Int8, Int4, Fp8, CacheGen)}


def get_codec(codec: str | Codec) -> Codec:
    """The codec of that name, or the codec itself.

    Raises:
        StoreError: no codec has that name.
    """
    return named("codec", codec, Codec, CODECS)


@cache
def decoder(name: str) -> Codec:
    """The codec that decodes what was recorded under a name.

    Raises:
        RecordError: this version has none.
    """
    if name not in CODECS:
        raise RecordError(f"the record's codec is {name!r}, this version reads {', '.join(sorted(CODECS))}")
    return CODECS[name]()


__all__ = ["CODECS", "CacheGen", "Codec", "Fp8", "Int4", "Int8", "Lossless", "Raw", "Side", "decoder", "get_codec"]
