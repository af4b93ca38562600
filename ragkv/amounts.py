"""Amounts for people."""

from __future__ import annotations


def size(count: int) -> str:
    """Bytes: ``1.5 MiB``."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def milliseconds(value: float) -> str:
    """A time: ``3.2 ms``, ``1.25 s``."""
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.1f} ms"


def number(count: int, noun: str, nouns: str = "") -> str:
    """A count with its noun: ``1 file``, ``2 files``."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
