"""Reading: documents are prefilled as a whole, in pieces, and cut into chunks afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

import torch
from safetensors.torch import load, save
from torch import Tensor

from ragkv.chunk import Chunk, ChunkKV, digest
from ragkv.lazy import keep_last, lazy
from ragkv.library.attention import Seen
from ragkv.library.depth import check_layer
from ragkv.library.measured import Measured
from ragkv.library.sensitivity import sensitivity
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.rows import Rows
from ragkv.model.steps import Seat, Steps
from ragkv.model.traits import Facts, keep, model_key, recalled

# A longer opening is computed by every process: the store's small values are never evicted.
_KEPT_BYTES = 32 << 20

# Prefixes whose KV are kept, besides the anchor's: a template's own, and those of other system messages.
_OPENINGS = 8


class Reader:
    """Prefills chunks behind the anchor and their context, with a model as it is now.

    Args:
        decoder: the model.
        anchor: ids that everything is read behind.
        piece_tokens: tokens of one forward pass.
        foreign: ids of a text to stand in front of documents for their sensitivity to be measured.
        steps: the model's forwards; by default nobody else uses it.
        fingerprint: of the model.
        facts: where KV of the anchor, and of a template's prefix, outlive the process; by default they do not.

    Attributes:
        space: fingerprint of all that KV depend on besides their chunk.
        anchor: KV of the anchor; ``None`` where it is empty.
        foreign: id of the foreign text.
    """

    def __init__(
        self,
        decoder: Decoder,
        anchor: Sequence[int],
        piece_tokens: int,
        foreign: Sequence[int] = (),
        steps: Steps | None = None,
        fingerprint: str = "",
        facts: Facts | None = None,
    ):
        self.steps: Steps = Steps(decoder, lambda: nullcontext(fingerprint)) if steps is None else steps
        self.decoder: Decoder = decoder
        self.piece_tokens: int = piece_tokens
        self.fingerprint: str = fingerprint
        self.space: str = digest(fingerprint, anchor).hex()
        room = None if decoder.max_positions is None else max(0, decoder.max_positions - len(anchor))
        self.anchor_ids: tuple[int, ...] = tuple(anchor)
        self._foreign_ids = tuple(foreign)[:room]
        self.foreign: str = digest(self._foreign_ids).hex()[:16]
        self._openings: dict[tuple[int, ...], ChunkKV | None] = {}
        self._facts = facts
        self._model = None if facts is None else model_key(decoder.model, fingerprint, decoder.kernels)
        self.anchor: ChunkKV | None = self._kept(self.anchor_ids, "anchor")

    def turn(self) -> AbstractContextManager[None]:
        """The model for this thread alone, as it was when this reader was made (:meth:`ragkv.model.steps.Steps.turn_of`)."""
        return self.steps.turn_of(self.fingerprint)

    def forward(self, rows: Rows, seat: Seat | None = None) -> Tensor:
        """Run rows of a prompt, with whatever other threads ask for; as :meth:`ragkv.model.steps.Steps.run`."""
        return self.steps.run(rows, self.fingerprint, seat)

    def opening(self, ids: Sequence[int], name: str = "") -> ChunkKV | None:
        """KV of ids that stand at position 0, computed once and kept, as long as others are not asked for; ``None`` for no ids.

        Args:
            ids: what a prompt or a document begins with.
            name: what the KV are kept under for the next process, in the place of those of other ids; empty: they are not.
        """
        ids = tuple(ids)
        if ids == self.anchor_ids:
            return self.anchor
        known = self._openings.get(ids)
        if known is None:
            known = self._kept(ids, name) if name else self._computed(ids)
            keep_last(self._openings, ids, known, _OPENINGS)
        return known

    def _kept(self, ids: tuple[int, ...], name: str) -> ChunkKV | None:
        if self._facts is None or self._model is None:
            return self._computed(ids)
        name, key = f"{name}:{self._model.hex()}", digest(self._model, ids)
        data = recalled(self._facts, name, key)
        if data is not None:
            tensors, layers = load(data), self.decoder.specs
            keys = [tensors[f"k{number}"].to(spec.device) for number, spec in enumerate(layers)]
            return ChunkKV(keys, [tensors[f"v{number}"].to(spec.device) for number, spec in enumerate(layers)], 0)
        kv = self._computed(ids)
        if kv is not None and kv.nbytes <= _KEPT_BYTES:
            named = {
                f"{part}{number}": tensor
                for number, pair in enumerate(kv)
                for part, tensor in zip("kv", pair, strict=True)
            }
            keep(self._facts, name, key, save({part: tensor.cpu() for part, tensor in named.items()}))
        return kv

    def read(
        self,
        wanted: Sequence[Chunk],
        lineage: Callable[[Chunk], list[Chunk]],
        stored: Callable[[Chunk], ChunkKV | None],
        measured: Measured = Measured.NOTHING,
        ran: Callable[[str, int], object] = lambda document, tokens: None,
    ) -> Iterator[tuple[Chunk, ChunkKV, float]]:
        """Prefill chunks, several of one document in one pass.

        Args:
            wanted: chunks whose KV are missing.
            lineage: gives the chunks that one is read behind, and itself at the end.
            stored: looks up the KV of a chunk that may be stored; a document's stored beginning is not read again.
            measured: what is measured on the way; documents are read a second time, behind the foreign text, for their
                sensitivity.
            ran: called behind each piece with its document and its tokens.

        Yields:
            A chunk, its KV, and the seconds that reading it took.
        """
        left = {identity(chunk): chunk for chunk in wanted}
        for chain in chains(wanted, lineage):
            yield from self._read_chain(chain, left, stored, measured, ran)

    def _read_chain(
        self, chain: list[Chunk], left: dict, stored: Callable, measured: Measured, ran: Callable
    ) -> Iterator[tuple[Chunk, ChunkKV, float]]:
        cache = self.decoder.cache(self._behind(chain[-1]))
        cache.append(self.anchor)
        first = self._append_stored(cache, chain, left, stored)
        second = self._second(chain, chain[:first]) if Measured.SENSITIVITY in measured else None
        seen = Seen(self.decoder, chain, self._anchor_tokens) if Measured.ATTENDED in measured else None
        for group in _pieces(chain[first:], self.piece_tokens):
            begin = perf_counter()
            ids = [i for chunk in group for i in chunk.ids]
            self.run(ids, cache, group[0].offset + self._anchor_tokens, seen)
            if second is not None:
                self.run(ids, second, second.get_seq_length())
            per_token = (perf_counter() - begin) / len(ids)
            for chunk in group:
                mine = left.pop(identity(chunk), None)
                if mine is not None:
                    end = self._behind(chunk)
                    kv = cut(cache, end - len(chunk), end)
                    if second is not None:
                        later = second.get_seq_length() - cache.get_seq_length()
                        kv.sensitivity, kv.foreign = self._sensitivity(kv, second, end + later), self.foreign
                    if seen is not None:
                        kv.attended = seen.attended(chain.index(chunk))
                    yield mine, kv, per_token * len(chunk)
            ran(chain[-1].document, len(ids))  # whoever stops us here has what we say was read

    def _sensitivity(self, kv: ChunkKV, second: FusedCache, end: int) -> torch.Tensor:
        """Of a chunk that ends at ``end`` in the second reading."""
        later = end - len(kv) - kv.base  # by so much a token stands later there: the foreign text's length
        behind = [layer.values[0, :, end - len(kv) : end] for layer in second.layers]
        foreign = [layer.values[0, :, self._anchor_tokens : self._anchor_tokens + later] for layer in second.layers]
        return sensitivity(kv.values, behind, foreign)

    def _second(self, chain: list[Chunk], stored: list[Chunk]) -> FusedCache:
        """The cache of a second reading: anchor, as much of the foreign text as the positions allow, and what is stored."""
        limit, whole = self.decoder.max_positions, self._behind(chain[-1])
        room = len(self._foreign_ids) if limit is None else min(len(self._foreign_ids), max(0, limit - whole))
        cache = self.decoder.cache(whole + room)
        front = self.opening([*self.anchor_ids, *self._foreign_ids])
        cache.append(None if front is None else front.first(self._anchor_tokens + room))
        self.run([i for chunk in stored for i in chunk.ids], cache, cache.get_seq_length())
        return cache

    @lazy
    def check_layer(self) -> int:
        """The layer at which CacheBlend best sees which tokens depend on the text in front (:func:`~.depth.check_layer`)."""
        return check_layer(self.changes())

    def changes(self) -> torch.Tensor:
        """How much the values of the foreign text's second half change, in each layer, behind its first half.

        Returns:
            ``[L, F]`` squared distance over heads and dimensions; fp32, on the CPU.
        """
        half = len(self._foreign_ids) // 2
        front, text = self._foreign_ids[:half], self._foreign_ids[half:]
        alone = self._computed([*self.anchor_ids, *text])
        behind = self._computed([*self.anchor_ids, *front, *text])
        if not text or alone is None or behind is None:
            return torch.zeros(len(self.decoder.layers), 0, dtype=torch.float32, device="cpu")
        pairs = zip(alone.values, behind.values, strict=True)
        moved = [own[:, -len(text) :].float() - other[:, -len(text) :].float() for own, other in pairs]
        return torch.stack([change.square().sum((0, 2)).cpu() for change in moved])

    def _append_stored(self, cache: FusedCache, chain: list[Chunk], left: dict, stored: Callable) -> int:
        """Take the stored beginning of a chain; returns the number of the first chunk to read."""
        for number, chunk in enumerate(chain):
            kv = None if identity(chunk) in left else stored(chunk)
            if kv is None:
                return number
            cache.append(kv)
        return len(chain)

    @property
    def _anchor_tokens(self) -> int:
        return len(self.anchor_ids)

    def _behind(self, chunk: Chunk) -> int:
        return self._anchor_tokens + chunk.offset + len(chunk)

    def _computed(self, ids: Sequence[int]) -> ChunkKV | None:
        if not ids:
            return None
        cache = self.decoder.cache(len(ids))
        self.run(ids, cache, 0)
        return cut(cache, 0, len(ids))

    @torch.no_grad()
    def run(self, ids: Sequence[int], cache: FusedCache, start: int, seen: Seen | None = None) -> None:
        """Compute the KV of ids behind what a cache holds, a turn a piece.

        Args:
            ids: which.
            cache: appended to.
            start: position of the first one.
            seen: is shown what they attend to.
        """
        tensor = torch.tensor(ids, dtype=torch.long, device=self.decoder.device)
        for at in range(0, len(ids), self.piece_tokens):
            piece = tensor[at : at + self.piece_tokens]
            with self.turn():
                self.decoder.read(piece, cache, start + at, None if seen is None else seen.by(start + at, len(piece)))


def _pieces(chunks: Sequence[Chunk], tokens: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks, gathered until a piece is full; a chunk longer than a piece stands alone."""
    piece: list[Chunk] = []
    for chunk in chunks:
        if piece and sum(len(c) for c in piece) + len(chunk) > tokens:
            yield piece
            piece = []
        piece.append(chunk)
    if piece:
        yield piece


def chains(wanted: Sequence[Chunk], lineage: Callable[[Chunk], list[Chunk]]) -> Iterator[list[Chunk]]:
    """The lineages that chunks are read along: the longest of a document covers its others."""
    left = {identity(chunk) for chunk in wanted}
    for chunk in sorted(wanted, key=lambda chunk: -chunk.offset):
        if identity(chunk) in left:
            chain = lineage(chunk)
            yield chain
            left.difference_update(map(identity, chain))


def identity(chunk: Chunk) -> tuple[tuple[int, ...], bytes]:
    """What a chunk's KV hang on, as far as one model and one namespace are concerned."""
    return chunk.ids, chunk.context


def some(cache: FusedCache, rows: Tensor, start: int) -> ChunkKV:
    """A copy of what a cache holds of some tokens of a chunk that begins at ``start``."""
    keys = [layer.key_room[0].index_select(1, (start + rows).to(layer.device)) for layer in cache.layers]
    values = [layer.value_room[0].index_select(1, (start + rows).to(layer.device)) for layer in cache.layers]
    return ChunkKV(keys, values, start, rows=rows)


def cut(cache: FusedCache, start: int, end: int) -> ChunkKV:
    """A copy of what a cache holds at positions ``start .. end - 1``."""
    keys = [layer.keys[0, :, start:end].clone() for layer in cache.layers]
    return ChunkKV(keys, [layer.values[0, :, start:end].clone() for layer in cache.layers], start)
