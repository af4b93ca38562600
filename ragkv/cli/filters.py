"""Filters and orders as words: ``size>10MB``, ``idle>30d``, ``document=docs/*``, ``hits:desc``."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ragkv.cli.entries import Listed

_BYTES = {"": 1, "B": 1}
_BYTES |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)}
_BYTES |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_536_000}
_COMPARE = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
}
_EXPRESSION = re.compile(r"\s*([a-z]+)\s*(>=|<=|!=|>|<|=)\s*(.*?)\s*")
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes: ``10MB`` are a thousand thousands each, ``10MiB`` 1024 times 1024."""
    return int(_amount(text, _BYTES, str.upper, "a size, as 500MB or 2GiB"))


def parse_duration(text: str) -> float:
    """Seconds: ``90s``, ``15m``, ``12h``, ``7d``, ``2w``, ``1y``."""
    return _amount(text, _SECONDS, str.lower, "a time, as 12h or 7d")


def parse_count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise ValueError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


#: What entries can be filtered and sorted by, and how its values are written; ``str`` is compared as a pattern.
FIELDS: dict[str, Callable[[str], Any]] = {
    "size": parse_size,
    "tokens": parse_count,
    "hits": parse_count,
    "age": parse_duration,
    "idle": parse_duration,
    "cost": parse_duration,
    "document": str,
    "codec": str,
    "space": str,
    "id": str,
}


@dataclass(frozen=True)
class Filter:
    """One condition.

    Attributes:
        name: the field.
        sign: how it is compared.
        value: what it is compared with; for text a pattern with ``*`` and ``?``.
    """

    name: str
    sign: str
    value: Any

    def __call__(self, listed: Listed) -> bool:
        """Whether it holds for an entry."""
        mine = listed.field(self.name)
        if FIELDS[self.name] is str:
            return fnmatchcase(str(mine), self.value) is (self.sign == "=")
        return bool(_COMPARE[self.sign](mine, self.value))


def parse_filter(text: str) -> Filter:
    """The condition that a text writes."""
    match = _EXPRESSION.fullmatch(text)
    if match is None or match[1] not in FIELDS:
        raise ValueError(f"a filter is FIELD, one of > >= < <= = !=, VALUE; fields: {', '.join(FIELDS)}; got {text!r}")
    name, sign, value = match.groups()
    if FIELDS[name] is str and sign not in ("=", "!="):
        raise ValueError(f"{name} is compared with = or !=, got {text!r}")
    return Filter(name, sign, FIELDS[name](value))


def parse_order(text: str) -> tuple[str, bool]:
    """A field and whether the largest comes first; by default that is so for numbers."""
    name, _, direction = text.partition(":")
    if name not in FIELDS or direction not in ("", "asc", "desc"):
        raise ValueError(f"must be FIELD, FIELD:asc or FIELD:desc; fields: {', '.join(FIELDS)}; got {text!r}")
    return name, direction == "desc" if direction else FIELDS[name] is not str


def _amount(text: str, units: dict[str, int], spelled: Callable[[str], str], what: str) -> float:
    match = _AMOUNT.fullmatch(text.strip())
    unit = None if match is None else spelled(match[2])
    if match is None or unit not in units:
        raise ValueError(f"must be {what}, got {text!r}")
    return float(match[1]) * units[unit]
