"""Repair after an edit: only what changed and some tokens behind it are computed (arXiv:2609.17983).

Passages that an edit left alone keep their KV, rotated to their new positions. The tokens right behind the edit saw what is not
there any more: a window of them is computed afresh with the changed passages, in all layers. What lies further behind keeps what it
knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from ragkv.chunk import Chunk, digest


@dataclass(frozen=True)
class Repair:
    """What repairing a document takes.

    Attributes:
        chunks: the new document's chunks, marked from the first change on.
        first: number of the first chunk that is not as it was.
        sources: for each chunk the old one whose KV it takes; ``None`` where it is computed.
        rows: positions of the tokens to compute, counted from the document's first token, ascending.
    """

    chunks: list[Chunk]
    first: int
    sources: list[Chunk | None]
    rows: Tensor


def marked(chunks: Sequence[Chunk], first: int, mark: str) -> list[Chunk]:
    """The same document with a mark at chunk ``first``, which those behind it inherit in their context."""
    done = list(chunks[:first])
    for number in range(first, len(chunks)):
        chunk = chunks[number]
        previous = done[-1] if done else None
        done.append(Chunk(chunk.ids, chunk.text, previous, mark if number == first else ""))
    return done


def plan_repair(old: Sequence[Chunk], new: Sequence[Chunk], behind_tokens: int) -> Repair | None:
    """How to make a document's KV from those of its version before; ``None`` where reading it costs no more.

    Args:
        old: the version before, in one window.
        new: the version now, in one window, without marks.
        behind_tokens: tokens to compute behind every edit.
    """
    same = SequenceMatcher(None, [c.ids for c in old], [c.ids for c in new], autojunk=False).get_matching_blocks()
    sources: list[Chunk | None] = [None] * len(new)
    for block in same:
        for step in range(block.size):
            sources[block.b + step] = old[block.a + step]
    first = next((i for i, chunk in enumerate(new) if _another(sources[i], chunk)), len(new))
    if first == len(new) or not any(sources[first:]):
        return None
    mark = digest(old[-1].context, old[-1].ids, str(behind_tokens)).hex()[:16]
    return Repair(marked(new, first, mark), first, sources, _rows(new, sources, first, behind_tokens))


def _another(source: Chunk | None, chunk: Chunk) -> bool:
    return source is None or source.context != chunk.context


def _rows(new: Sequence[Chunk], sources: Sequence[Chunk | None], first: int, behind_tokens: int) -> Tensor:
    rows, window, before = [], 0, sources[first - 1] if first else None
    for chunk, source in zip(new[first:], sources[first:], strict=True):
        if source is None:
            rows.append(torch.arange(chunk.offset, chunk.offset + len(chunk)))
            window = behind_tokens
        else:
            if source.previous is not before:  # something that stood here is gone
                window = behind_tokens
            rows.append(torch.arange(chunk.offset, chunk.offset + min(window, len(chunk))))
            window = max(0, window - len(chunk))
        before = source
    return torch.cat(rows)
