"""A prompt in pieces, each under its path; see :mod:`ragkv.library.paths`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

from ragkv.chunk import Chunk, ChunkKV, digest, marked
from ragkv.errors import RecordError
from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Variant
from ragkv.library.keeping import Keeping
from ragkv.library.reading import Reader
from ragkv.methods import Method
from ragkv.store import Batch
from ragkv.store.keys import path_key

#: Tokens of a block of earlier messages: what two prompts share is found in so many at a time.
BLOCK_TOKENS = 32


class Piece(NamedTuple):
    """A piece of a prompt.

    Attributes:
        start: slot of its first token.
        stop: slot behind its last one.
        whole: key of its exact KV.
        repaired: key of the tokens that the method recomputed; empty where it has none, and for no chunk.
    """

    start: int
    stop: int
    whole: bytes
    repaired: bytes = b""


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a prompt's pieces.

    Attributes:
        layout: of the prompt, which says what is known.
        blocks: of earlier messages.
        chunks: one for each chunk.
        batches: open reads of what is known.
        taken: of each chunk the variant that the method takes, where it says so.
    """

    layout: Layout
    blocks: Sequence[Piece] = ()
    chunks: Sequence[Piece] = ()
    batches: Sequence[Batch] = ()
    taken: Sequence[Variant] = ()

    def kv(self, first: int = 0) -> dict[bytes, ChunkKV]:
        """What is known, by key; in the reads from number ``first`` on.

        Raises:
            RecordError: records proved damaged; the store has dropped all of them.
        """
        found, damaged = dict[bytes, ChunkKV](), None
        for batch in self.batches[first:]:
            for index, key in enumerate(batch.keys):
                try:
                    if batch.tiers[index] is not None:
                        found[key] = _kv(batch, index)
                except RecordError as error:
                    damaged = error
        if damaged is not None:
            raise damaged
        return found

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk of it so far."""
        return sum(batch.bytes_read for batch in self.batches)


class Path:
    """All that stands in front of a piece.

    Args:
        documents, reader: as for :meth:`Paths.known`.
        ids: what stands in front.
    """

    def __init__(self, documents: Keeping, reader: Reader, ids: Sequence[int]):
        self._space, self._namespace = digest("ragkv paths 1", reader.fingerprint).hex(), documents.namespace
        self._digest: bytes = digest(ids)
        self._read: bytes = digest(documents.anchor)  # behind what the chunks in front were read
        self.tokens: int = len(ids)

    def behind(self, ids: Sequence[int]) -> Path:
        """The path behind a piece."""
        longer = copy(self)
        longer._digest, longer.tokens = digest(self._digest, ids), self.tokens + len(ids)
        return longer

    def behind_chunk(self, chunk: Chunk) -> Path:
        """The path behind a chunk."""
        longer = self.behind(chunk.ids)
        longer._read = digest(self._read, chunk.context)
        return longer

    def piece(self, ids: Sequence[int]) -> Piece:
        """A piece of earlier messages that stands behind."""
        return Piece(self.tokens, self.tokens + len(ids), self._key(ids, self._digest))

    def chunk(self, chunk: Chunk, mark: str) -> Piece:
        """A chunk that stands behind.

        What a method recomputes hangs on the stored KV around it too, and so on what these were read behind.
        """
        repaired = marked(digest(self._digest, self._read, chunk.context), mark) if mark else b""
        return self.piece(chunk.ids)._replace(repaired=self._key(chunk.ids, repaired) if mark else b"")

    def _key(self, ids: Sequence[int], path: bytes) -> bytes:
        return path_key(self._space, ids, path, self._namespace)


def pieces(documents: Keeping, reader: Reader, layout: Layout, method: Method) -> tuple[list[Piece], list[Piece]]:
    """The pieces of a prompt: blocks of earlier messages, and its chunks."""
    ids = layout.listed()
    path, blocks, chunks = Path(documents, reader, ids[: layout.opening]), list[Piece](), list[Piece]()
    for stop in range(layout.opening + BLOCK_TOKENS, layout.chunks_start + 1, BLOCK_TOKENS):
        block = ids[path.tokens : stop]
        blocks.append(path.piece(block))
        path = path.behind(block)
    if path.tokens < layout.chunks_start:
        path = path.behind(ids[path.tokens : layout.chunks_start])
    for placed in layout.chunks:
        chunks.append(path.chunk(placed.chunk, mark_of(method)))
        path = path.behind_chunk(placed.chunk)
    return blocks, chunks


def mark_of(method: Method) -> str:
    """What tells a method's work from another's; empty where it keeps variants of its own, or does not say what it is."""
    kind = type(method)
    by_name = not (method.needs_attended or kind.__repr__ is object.__repr__)
    return f"{kind.__module__} {method!r}" if by_name else ""


def _kv(batch: Batch, index: int) -> ChunkKV:
    pairs = [batch.layer(index, layer) for layer in range(batch.layers[index] or 0)]
    keys, values = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return ChunkKV(keys, values, batch.bases[index] or 0, rows=batch.rows[index])
