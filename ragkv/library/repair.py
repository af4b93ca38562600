"""Repair after an edit: only what changed and some tokens behind it are computed (arXiv:2609.17983).

Passages that an edit left alone keep their KV, rotated to their new positions. The tokens right behind the edit saw what is not
there any more: a window of them is computed afresh with the changed passages, in all layers. What lies further behind keeps what it
knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from time import perf_counter

import torch
from torch import Tensor

from ragkv.chunk import Attended, Chunk, ChunkKV, digest
from ragkv.errors import ModelChangedError
from ragkv.fusion.layout import Layout, Placed
from ragkv.fusion.passes import recompute
from ragkv.fusion.placement import Placement
from ragkv.library.document import ChunkedDocument
from ragkv.library.documents import Documents
from ragkv.library.reading import Reader, cut


@dataclass(frozen=True)
class Repair:
    """What repairing a document takes.

    Attributes:
        document: the new document, marked from the first change on.
        first: number of the first chunk that is not as it was.
        sources: for each chunk the old one whose KV it takes; ``None`` where it is computed.
        rows: positions of the tokens to compute, counted from the document's first token, ascending.
    """

    document: ChunkedDocument
    first: int
    sources: list[Chunk | None]
    rows: Tensor


def plan_repair(
    documents: Documents, old: Sequence[Chunk], document: ChunkedDocument, behind_tokens: int
) -> Repair | None:
    """How to make a document's KV from those of its version before.

    Args:
        documents: that both are of.
        old: the version before.
        document: the version now, without marks. Both are of one window, or it is read.
        behind_tokens: tokens to compute behind every edit.

    Returns:
        ``None`` where it has to be read exactly: nothing was changed, or too much, or old KV are lost.
    """
    new = list(document)
    if (
        documents.context != "document"
        or not old
        or old[0].offset
        or not document.one_window
        or any(b.offset != a.offset + len(a) for a, b in pairwise(old))
    ):
        return None
    same = SequenceMatcher(None, [c.ids for c in old], [c.ids for c in new], autojunk=False).get_matching_blocks()
    sources: list[Chunk | None] = [None] * len(new)
    for block in same:
        for step in range(block.size):
            sources[block.b + step] = old[block.a + step]
    first = next((i for i, chunk in enumerate(new) if _another(sources[i], chunk)), len(new))
    if first == len(new) or not any(sources[first:]) or documents.missing(list(filter(None, sources))):
        return None
    mark = digest(old[-1].context_after, str(behind_tokens)).hex()[:16]
    return Repair(document.with_mark(first, mark), first, sources, _rows(new, sources, first, behind_tokens))


def repair(documents: Documents, plan: Repair) -> int | None:
    """Make and store the KV of a repaired document; returns the tokens that were computed.

    ``None`` where old KV are lost, or the model is another one now: the document has to be read.

    Args:
        documents: that it is of.
        plan: from :func:`plan_repair`.
    """
    begin, reader = perf_counter(), documents.reader
    try:
        made = _repaired(reader, documents, plan)
    except ModelChangedError:
        return None
    if made is None:
        return None
    per_token = (perf_counter() - begin) / (len(documents.anchor) + sum(map(len, plan.document)))
    items = [documents.item(reader, chunk, kv, per_token * len(chunk)) for chunk, kv in made]
    documents.put(reader, items, documents.store)
    return len(plan.rows)


@torch.no_grad()
def _repaired(reader: Reader, documents: Documents, plan: Repair) -> list[tuple[Chunk, ChunkKV]] | None:
    """The KV of the chunks from the first change on; ``None`` where old KV are lost."""
    decoder, start = reader.decoder, len(reader.anchor_ids)
    pairs = list(zip(plan.document, plan.sources, strict=True))
    placed = [
        Placed(chunk, start + chunk.offset, start + (source or chunk).offset, exact=False, continues=False)
        for chunk, source in pairs
    ]
    ids = [*reader.anchor_ids, *(i for chunk, _ in pairs for i in chunk.ids)]
    layout = Layout(torch.tensor(ids, device=decoder.device), tuple(placed), start, len(ids))
    keys = {chunk: documents.key(source, reader.space) for chunk, source in pairs if source}
    with documents.store.read(list(keys.values())) as batch:
        if None in batch.tiers:
            return None
        cache = decoder.cache(len(ids))
        cache.append(reader.anchor)
        Placement(decoder, cache, layout, batch, keys, {}, by_layer=False).ahead()
        with reader.turn():
            recompute(decoder, cache, layout.ids, (start + plan.rows).to(decoder.device), reader.piece_tokens)
        cache.set_length(len(ids))
        known = dict(zip(keys, zip(batch.sensitivities, batch.foreigns, batch.attended, strict=True), strict=True))
    made = [(item.chunk, cut(cache, item.start, item.stop)) for item in placed[plan.first :]]
    foreign = next((foreign for _, foreign, _ in known.values() if foreign), "")
    watched = any(attended for _, _, attended in known.values())
    for chunk, kv in made:  # what was computed now counts as insensitive, until its document is read afresh
        unknown = (
            torch.zeros(len(chunk), dtype=torch.float32, device="cpu") if foreign else None,
            foreign,
            Attended.nothing(len(chunk)) if watched else None,
        )
        kv.sensitivity, kv.foreign, kv.attended = known.get(chunk, unknown)
    return made


def _another(source: Chunk | None, chunk: Chunk) -> bool:
    return source is None or source.context != chunk.context


def _rows(new: Sequence[Chunk], sources: Sequence[Chunk | None], first: int, behind_tokens: int) -> Tensor:
    rows, window, before = [], 0, sources[first - 1] if first else None
    for chunk, source in zip(new[first:], sources[first:], strict=True):
        if source is None:
            rows.append(torch.arange(chunk.offset, chunk.offset + len(chunk), device="cpu"))
            window = behind_tokens
        else:
            if source.number != (before.number + 1 if before else 0):  # something that stood here is gone
                window = behind_tokens
            rows.append(torch.arange(chunk.offset, chunk.offset + min(window, len(chunk)), device="cpu"))
            window = max(0, window - len(chunk))
        before = source
    return torch.cat(rows)
