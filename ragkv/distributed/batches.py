"""Which documents are read together."""

from __future__ import annotations

from collections.abc import Sequence


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Documents of about the same length in a batch, longest first: workers that share them end at about the same time.

    Args:
        lengths: of the documents, in whatever unit.
        most: of a batch; a longer document is one by itself.

    Returns:
        The documents' numbers, each once.
    """
    found: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not found or lengths[number] > room:
            found.append([])
            room = most
        found[-1].append(number)
        room -= lengths[number]
    return found
