"""Lists that are given: one text or one chunk in the place of a list is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ragkv.chunk import Chunk
from ragkv.errors import PromptError, instance


def several(items: Sequence[Any], what: str) -> list[Any]:
    """A list, where one string would be taken for a list of characters, and one chunk for a list of them."""
    if isinstance(items, str | bytes | Chunk | Mapping) or not isinstance(items, Iterable):
        raise PromptError(f"{what} must be a list, got {items!r:.60}: write [...] around it")
    return list(items)


def several_chunks(items: Sequence[Chunk], what: str) -> list[Chunk]:
    """A list of chunks."""
    chunks = several(items, what)
    for chunk in chunks:
        instance(f"each of {what}", chunk, Chunk, "a ragkv.Chunk, as add() and add_document() return them")
    return chunks
