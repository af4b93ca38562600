"""The shelf: from a document's passages, as the catalogue has them, to the engine's chunks, and their KV."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence

from ragkv.chunk import Chunk, digest
from ragkv.engine import Engine
from ragkv.library.repair import marked
from ragkv.retrieval import Change

_KNOWN_DOCUMENTS = 256


class Shelf:
    """Keeps the KV of an engine in step with the documents of a catalogue.

    Args:
        engine: reads.
        repair_tokens: read a changed document by computing the changed passages and this many tokens behind each change;
            ``None``: read it exactly, from the first changed passage on.
    """

    def __init__(self, engine: Engine, repair_tokens: int | None):
        self.engine, self.repair_tokens = engine, repair_tokens
        self._known: OrderedDict[bytes, list[Chunk]] = OrderedDict()

    def read(self, passages: Sequence[str], change: Change | None = None) -> int:
        """Read what is missing of a document.

        Args:
            passages: the document's, in order.
            change: what the catalogue says of it, where it was just put there.

        Returns:
            Tokens that the model read.
        """
        chunks, before = self.chunks(passages), self.engine.tokens_read
        if self.engine.missing(chunks):
            if change and change.old_passages and self.repair_tokens is not None:
                old = self.chunks(change.old_passages)
                self._keep_mark(passages, self.engine.repair_document(old, list(passages), self.repair_tokens))
            else:
                self.engine.add_chunks(chunks)
        return self.engine.tokens_read - before

    def _keep_mark(self, passages: Sequence[str], chunks: list[Chunk]) -> None:
        """Remember where a document was repaired, beside its KV: they are found by it."""
        first = next((number for number, chunk in enumerate(chunks) if chunk.mark), None)
        if first is not None:
            fact = json.dumps({"first": first, "mark": chunks[first].mark}).encode()
            self.engine.store.meta_put(mark_name(passages), fact)
            self._known[digest(*passages)] = chunks

    def forget(self, change: Change, passages: Sequence[str] = ()) -> None:
        """Remove the KV that no document uses any more, and the mark of a version that was repaired.

        Args:
            change: what the catalogue says.
            passages: the document's version now; empty where it was removed.
        """
        old = list(change.old_passages)
        gone = set(change.orphans if self.engine.context == "document" else change.orphan_texts)
        # A mark stands for exactly these passages: what only begins with them has KV of its own.
        continued = len(passages) > len(old) and list(passages[: len(old)]) == old
        done = bool(old) and (len(old) - 1 in gone or continued) and self._mark(old) is not None
        if not gone and not done:
            return
        chunks = self.chunks(old)
        if done:
            gone |= {number for number, chunk in enumerate(chunks) if _repaired(chunk)}
        # A document of several windows may still use a chunk, although the text before its window has changed.
        used = {self.engine.chunk_key(chunk) for chunk in self.chunks(passages)} if passages else set()
        self.engine.forget([chunks[at] for at in sorted(gone) if self.engine.chunk_key(chunks[at]) not in used])
        if done:
            self.engine.store.meta_remove(mark_name(old))
            self._known.pop(digest(*old), None)

    def _mark(self, passages: Sequence[str]) -> bytes | None:
        return self.engine.store.meta_get(mark_name(passages))

    def chunks(self, passages: Sequence[str]) -> list[Chunk]:
        """A document's chunks; tokenising a long one takes a while, so the latest are kept."""
        key = digest(*passages)
        if key not in self._known:
            chunks, fact = self.engine.cut_document(list(passages)), self._mark(passages)
            self._known[key] = chunks if fact is None else marked(chunks, **json.loads(fact))
            if len(self._known) > _KNOWN_DOCUMENTS:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def mark_name(passages: Sequence[str]) -> str:
    """The fact under which a store remembers where a document was repaired."""
    return f"repaired:{digest(*passages).hex()}"


def _repaired(chunk: Chunk) -> bool:
    """Whether a chunk's KV were repaired, or made behind such ones."""
    return any(before.mark for before in chunk.lineage())
