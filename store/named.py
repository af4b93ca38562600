"""Codecs and policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from ragkv.errors import StoreError

Kind = TypeVar("Kind")


def named(what: str, given: str | Kind, base: type[object], kinds: Mapping[str, Callable[[], Kind]]) -> Kind:
    """The kind of that name with its default settings; an object of your own is passed through.

    Raises:
        StoreError: there is none of that name.
    """
    if not isinstance(given, str) and isinstance(given, base):
        return given
    if not isinstance(given, str) or given not in kinds:
        raise StoreError(f"{what} must be one of {', '.join(sorted(kinds))} or a {base.__name__}, got {given!r}")
    return kinds[given]()
