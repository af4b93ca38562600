"""What was computed once is used wherever a prompt begins the same (RAGCache, arXiv:2404.12457, section 5.1).

A prompt is a row of pieces: what all prompts begin with, earlier messages in blocks, chunks. The digest of all ids in front of
a piece is its *path*. The KV that a full prefill computes for a piece are exact under its path for any prompt and any method;
of a chunk that a method repaired, the tokens that it recomputed are kept for the same method under the same path. What
Cache-Craft computes is kept for other paths too (:mod:`ragkv.library.variants`). A path's digest holds all that stands in
front, so what is found under it is right whether or not the pieces in front are found too: unlike the nodes of RAGCache's tree,
pieces may be evicted in any order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ragkv.background import Background
from ragkv.chunk import Chunk, ChunkKV
from ragkv.errors import RecordError, whole_number
from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Variant
from ragkv.library.keeping import Keeping
from ragkv.library.pieces import Known, Path, Piece, mark_of, pieces
from ragkv.library.reading import Reader, cut, some
from ragkv.library.variants import displaced, made_variant, stored_variants
from ragkv.store import Item, TieredStore
from ragkv.store.keys import label_of, variant_key

if TYPE_CHECKING:
    from ragkv.fusion.passes import Pass
    from ragkv.library.attention import Seen
    from ragkv.methods import Method
    from ragkv.model.cache import FusedCache

# Prompts whose KV wait to be stored; those of more are not kept.
_MOST_WAITING = 2
# How long closing waits for what is to be stored.
_LEAVE_S = 5.0
# Paths that are looked along for an order of chunks.
_MOST_LOOKS = 64


class Paths:
    """KV of prompts' pieces under their paths. Safe for several threads and processes.

    Args:
        store: keeps them, perhaps beside chunks; closed with this object.
    """

    def __init__(self, store: TieredStore):
        self.store: TieredStore = store
        self._background = Background("keeping what was computed under a path", _MOST_WAITING)

    @classmethod
    def of(cls, given: TieredStore | int | bool, chunks: TieredStore) -> Paths | None:
        """As :class:`~ragkv.Engine` is given them, ``chunks`` being its own store; ``None`` where nothing is kept."""
        if isinstance(given, bool):
            return cls(chunks) if given else None
        return cls(given if isinstance(given, TieredStore) else TieredStore(cpu_bytes=whole_number("paths", given, 1)))

    def known(self, documents: Keeping, reader: Reader, layout: Layout, method: Method, stack: ExitStack) -> Known:
        """What was computed of a prompt before.

        Args:
            documents: whose chunks they are.
            reader: of them.
            layout: the prompt.
            method: puts it together.
            stack: what is known stays readable until it is closed.
        """
        if layout.held or not layout.even:
            return Known(layout)
        lossless = all(codec is None or codec.exact for codec in documents.store.codecs)
        layout = replace(layout, thrifty=lossless)
        blocks, chunks = pieces(documents, reader, layout, method)
        open_ones = [piece for piece, placed in zip(chunks, layout.chunks, strict=True) if not layout.settles(placed)]
        wanted = [piece.whole for piece in (*blocks, *open_ones)]
        there = self.store.where([*wanted, *(piece.repaired for piece in open_ones if piece.repaired)])
        takes = [piece.whole if piece.whole in there else piece.repaired for piece in open_ones]
        keys = [key for key in (*(piece.whole for piece in blocks), *takes) if key in there]
        if not keys:
            return Known(layout, blocks, chunks)
        batch = stack.enter_context(self.store.read(keys))
        held = {
            key: batch.rows[index]
            for index, key in enumerate(batch.keys)
            if batch.tiers[index] is not None  # nothing was evicted since
        }
        placed, mended = [], list[int]()
        for one, piece in zip(layout.chunks, chunks, strict=True):
            if not layout.settles(one) and piece.whole in held:
                one = replace(one, path=piece.whole, whole=True, base=one.start, exact=True)
            elif not one.exact and piece.repaired in held:
                one = replace(one, path=piece.repaired)
                rows = held[piece.repaired]
                mended += [] if rows is None else (one.start + rows).tolist()
            placed.append(one)
        earlier = tuple((piece.start, piece.stop, piece.whole) for piece in blocks if piece.whole in held)
        layout = replace(layout, chunks=tuple(placed), earlier=earlier, mended=tuple(mended))
        return Known(layout, blocks, chunks, (batch,))

    def variants(self, documents: Keeping, reader: Reader, known: Known) -> list[list[Variant]]:
        """What is kept of each of a prompt's chunks as it was computed behind others.

        Args:
            documents, reader: as for :meth:`known`.
            known: from there.
        """
        chunks = known.layout.chunks
        if not known.chunks:  # of such a prompt nothing is looked up
            return [[] for _ in chunks]
        return stored_variants(self.store, chunks, [documents.key(placed.chunk, reader.space) for placed in chunks])

    def take(self, known: Known, variants: Sequence[Variant], stack: ExitStack) -> Known:
        """Open the variants that a method takes, one of each chunk; the layout says which these are.

        Raises:
            RecordError: one is gone by now.
        """
        keys = [variant.key for variant in variants if variant.key]
        if not keys:
            return replace(known, taken=variants)
        batch = stack.enter_context(self.store.read(keys))
        if None in batch.tiers:
            raise RecordError(f"the variant {keys[batch.tiers.index(None)].hex()} was evicted just now")
        placed = []
        for one, variant in zip(known.layout.chunks, variants, strict=True):
            if variant.key:
                whole = variant.rows is None
                one = replace(one, path=variant.key, whole=whole, base=variant.base if whole else one.base)
            placed.append(one)
        layout = replace(known.layout, chunks=tuple(placed))
        return replace(known, layout=layout, batches=(*known.batches, batch), taken=variants)

    def keep(
        self, documents: Keeping, reader: Reader, known: Known, cache: FusedCache, done: Pass, seen: Seen | None = None
    ) -> None:
        """Store, in a thread of its own, what a prompt computed of its pieces for the first time.

        Args:
            documents, reader: as for :meth:`known`.
            known: from there.
            cache: of the prompt.
            done: what was computed.
            seen: what its chunks attended to, for a method that goes by it.
        """
        layout, items = known.layout, list[Item]()
        if self.store.readonly or layout.held or not layout.even:
            return
        stored = {key for _, _, key in layout.earlier}
        costs = documents.costs(reader)

        def item(kv: ChunkKV, piece: Piece, key: bytes, label: str = "") -> None:
            if kv.nbytes <= self.store.budget_bytes:
                share = len(kv) / (piece.stop - piece.start)
                items.append(Item(key, kv, share * costs(piece.start, piece.stop - piece.start), label))

        for piece in known.blocks:
            if piece.whole not in stored:
                item(cut(cache, piece.start, piece.stop), piece, piece.whole)
        todo = any(not layout.settles(placed) for placed in layout.chunks)
        rows, mended, front = done.rows.tolist() if todo else [], layout.mended, list[bytes]()
        exact = done.context is None
        repairs = exact and len(set(done.fresh)) == 1  # with all in front of them seen, and not fewer with depth
        for number, (placed, piece) in enumerate(zip(layout.chunks, known.chunks, strict=True)):
            mine = rows[bisect_left(rows, placed.start) : bisect_left(rows, placed.stop)]
            front.append(documents.key(placed.chunk, reader.space))
            settled = layout.settles(placed)
            exact = exact and (settled or len(mine) == len(placed.chunk))
            if settled or not mine:
                continue
            if exact:
                item(cut(cache, piece.start, piece.stop), piece, piece.whole, label_of(front))
            elif piece.repaired and repairs and not placed.exact:
                before = mended[bisect_left(mended, placed.start) : bisect_left(mended, placed.stop)]
                mended_rows = torch.tensor(sorted({*mine, *before}), device="cpu") - piece.start
                item(some(cache, mended_rows, piece.start), piece, piece.repaired, label_of(front))
            elif seen is not None and not placed.exact:
                taken = known.taken[number]
                attended = seen.attended(number, torch.tensor(mine, device="cpu") - placed.start, taken.attended)
                key = variant_key(front[-1], attended.front)
                item(made_variant(cache, placed, mine, taken, attended), piece, key, label_of(front))
        if items:
            chunks = [placed.chunk for placed in layout.chunks]
            self._background.add(lambda closing: self._store(documents, reader, items, chunks))

    def order(
        self, documents: Keeping, reader: Reader, prefix: Sequence[int], chunks: Sequence[Chunk], method: Method
    ) -> list[int]:
        """An order of chunks in which as much as possible of what stands in front was computed before.

        RAGCache reorders requests, and ContextPilot passages: an order that was seen before is worth more than the order of rank.

        Args:
            documents, reader, method: as for :meth:`known`.
            prefix: ids in front of the chunks.
            chunks: in the order that they have where nothing is known of any.

        Returns:
            Their numbers in the order of the prompt; those behind the last one of which something is known stand as they were.
        """
        best, best_tokens, looks = list[int](), 0, _MOST_LOOKS

        def go_on(path: Path, taken: list[int], known: int) -> None:
            nonlocal best, best_tokens, looks
            if known > best_tokens:
                best, best_tokens = taken, known
            left = [number for number in range(len(chunks)) if number not in taken]
            if not left or not looks:
                return
            looks -= 1
            found = {number: path.chunk(chunks[number], mark_of(method)) for number in left}
            there = self.store.where(key for piece in found.values() for key in (piece.whole, piece.repaired) if key)
            for number, piece in found.items():
                tokens = piece.stop - piece.start if {piece.whole, piece.repaired} & there.keys() else 0
                # What is computed in front of all others may be exact where its document was read, and is not kept here.
                if tokens or not taken:
                    go_on(path.behind_chunk(chunks[number]), [*taken, number], known + tokens)

        go_on(Path(documents, reader, prefix), [], 0)
        return [*best, *(number for number in range(len(chunks)) if number not in best)]

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all that was computed so far is stored; whether it is."""
        return self._background.wait(timeout_s)

    def settle(self) -> None:
        """Wait until what was computed is stored, and drop what takes long. Nothing is kept any more."""
        self._background.wait(_LEAVE_S)
        self._background.close()

    def close(self) -> None:
        """Close the store, when what was computed is there; what takes long to store is dropped."""
        self.settle()
        self.store.close()

    def _store(self, documents: Keeping, reader: Reader, items: list[Item], chunks: Sequence[Chunk]) -> None:
        too_many = [key for item in items if item.kv.attended is not None for key in displaced(self.store, item.key)]
        if too_many:
            self.store.remove_many(too_many)
        documents.put(reader, items, self.store)
        if not documents.holds(chunks):  # removed meanwhile: whoever did so may have come too early to find them
            self.store.remove_many([item.key for item in items if item.label])
