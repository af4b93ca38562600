"""Codecs, one a file, chosen by name and recorded with every entry."""

from __future__ import annotations

from ragkv.errors import RecordError
from ragkv.store.codecs.base import Codec, Side
from ragkv.store.codecs.raw import Raw

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Raw,)}


def get_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        RecordError: this version has no codec of that name.
    """
    if name not in CODECS:
        raise RecordError(f"codec must be one of {', '.join(sorted(CODECS))}, got {name!r}")
    return CODECS[name]()


__all__ = ["CODECS", "Codec", "Raw", "Side", "get_codec"]
