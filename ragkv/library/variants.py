"""What prompts computed of chunks behind others, kept for prompts in which others stand in front (Cache-Craft, arXiv:2502.15734).

A variant is a chunk's tokens that were computed in one prompt, with what they attended to there; what was not computed there stays
as it was before. It is named by the chunk and by those in front, so a chunk has many, of which so many are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ragkv.chunk import Attended, ChunkKV
from ragkv.fusion.layout import Placed
from ragkv.fusion.view import Variant
from ragkv.library.reading import some
from ragkv.store import TieredStore
from ragkv.store.keys import variants_of

if TYPE_CHECKING:
    from ragkv.model.cache import FusedCache

# Of one chunk.
_MOST = 5


def stored_variants(store: TieredStore, chunks: Sequence[Placed], keys: Sequence[bytes]) -> list[list[Variant]]:
    """The variants of each chunk of a prompt; none of those that are exact. That is no use of them.

    Args:
        store: keeps them.
        chunks: of the prompt.
        keys: of the chunks' own KV.
    """
    beginnings = [b"" if placed.exact else variants_of(key) for key, placed in zip(keys, chunks, strict=True)]
    wanted = set(filter(None, beginnings))
    found = store.beginning(wanted) if wanted else {}
    headers = store.headers(key for several in found.values() for key in several)
    made = list[list[Variant]]()
    for beginning, placed in zip(beginnings, chunks, strict=True):
        held = [(key, headers[key]) for key in found.get(beginning, ()) if key in headers]
        made.append(
            [
                Variant(source.attended, key, source.base, source.rows)
                for key, source in held
                if source.attended is not None and len(source.attended.tokens) == len(placed.chunk)
            ]
        )
    return made


def made_variant(
    cache: FusedCache, placed: Placed, mine: Sequence[int], before: Variant, attended: Attended
) -> ChunkKV:
    """A new variant, copied from a prompt's cache.

    Args:
        cache: of the prompt.
        placed: the chunk.
        mine: its slots that were computed, ascending.
        before: the variant that was taken.
        attended: what its tokens attended to.
    """
    tokens, rows = len(placed.chunk), torch.tensor(mine, device="cpu") - placed.start
    if before.rows is not None:
        rows = torch.cat([rows, before.rows]).unique()
    if (before.key and before.rows is None) or len(rows) == tokens:
        rows = torch.arange(tokens, device="cpu")
    kv = some(cache, rows, placed.start)
    return replace(kv, rows=None if len(rows) == tokens else rows, attended=attended)


def displaced(store: TieredStore, key: bytes) -> list[bytes]:
    """The variants whose place a new one takes: as many as there are too many of its chunk, the least valuable."""
    beginning = key[: len(variants_of(key))]
    others = [one for one in store.beginning([beginning])[beginning] if one != key]
    worst = store.worst(others) if len(others) >= _MOST else None
    return [] if worst is None else [worst]
