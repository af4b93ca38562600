"""A document as a model reads it: the ids of its chunks, and what each of them is read behind.

n chunks, T tokens of one of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ragkv.chunk import Chunk, marked
from ragkv.errors import RecordError
from ragkv.lazy import lazy

# The second has fronts; a document without any is written as it always was.
_FORMAT, _FRONTED = "ragkv document 1", "ragkv document 2"


@dataclass(frozen=True, eq=False)
class ChunkedDocument:
    """The chunks of one document. Its bytes are its record: with it a chunk is read again whenever its KV are lost.

    Attributes:
        id: what it is known by: all its chunks have it, and no other document's.
        ids: n sequences of token ids, wrappers included.
        firsts: per chunk the number of the first chunk of its context; its own where it is read alone.
        marks: by number, where KV were repaired from a chunk on (:attr:`~ragkv.Chunk.mark`).
        texts: the passages, where they are known.
        fronts: passages of other documents, their ids, that a context begins with; by the number of its first chunk.
        behind: ids of these passages in a catalogue, where they are of one; no part of the record.
    """

    id: str
    ids: Sequence[Sequence[int] | np.ndarray]
    firsts: Sequence[int]
    marks: Mapping[int, str] = field(default_factory=dict)
    texts: Sequence[str | None] = ()
    fronts: Mapping[int, Sequence[tuple[int, ...]]] = field(default_factory=dict)
    behind: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Chunk]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Chunk:
        return self._chunk(number, self.firsts[number], self._contexts[number], partial(self.lineage, number))

    @property
    def one_window(self) -> bool:
        """Whether every chunk is read behind the whole text in front of it."""
        return not any(self.firsts)

    def lineage(self, number: int) -> list[Chunk]:
        """The chunks that a chunk is read behind, each in the context that it has there, then the chunk itself."""
        first, chain = self.firsts[number], list[Chunk]()
        for ids in self.fronts.get(first, ()):
            chain.append(Chunk(ids, offset=sum(map(len, chain)), context=_after(chain), behind=_up_to_here(chain)))
        for at in range(first, number + 1):
            chain.append(self._chunk(at, first, _after(chain), _up_to_here(chain)))
        return chain

    def with_mark(self, number: int, mark: str) -> ChunkedDocument:
        """The same document, its KV repaired from a chunk on."""
        return replace(self, marks={**self.marks, number: mark})

    def read_behind(
        self, fronts: Mapping[int, Sequence[tuple[int, ...]]], behind: tuple[int, ...] = ()
    ) -> ChunkedDocument:
        """The same document behind other passages, read exactly; itself where they are the same."""
        return self if fronts == self.fronts else replace(self, fronts=fronts, behind=behind, marks={})

    def to_bytes(self) -> bytes:
        """Its record, a safetensors file; texts are not in it."""
        header = {"id": self.id, "marks": list(self.marks.items())}
        fronts = [(first, np.asarray(ids, "<u4")) for first, front in self.fronts.items() for ids in front]
        arrays = {
            "ids": np.concatenate([np.asarray(ids, "<u4") for ids in self.ids]),
            "lengths": np.asarray([len(ids) for ids in self.ids], "<u4"),
            "firsts": np.asarray(self.firsts, "<u4"),
            "contexts": np.frombuffer(b"".join(context.ljust(32, b"\0") for context in self._contexts), np.uint8),
        }
        if fronts:
            arrays["front_firsts"] = np.asarray([first for first, _ in fronts], "<u4")
            arrays["front_lengths"] = np.asarray([len(ids) for _, ids in fronts], "<u4")
            arrays["front_ids"] = np.concatenate([ids for _, ids in fronts])
        return save(arrays, {"format": _FRONTED if fronts else _FORMAT, "document": json.dumps(header)})

    @classmethod
    def from_bytes(cls, data: bytes) -> ChunkedDocument:
        """The document of :meth:`to_bytes`.

        Raises:
            RecordError: it is damaged, or of another format.
        """
        try:
            facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            if facts["format"] not in (_FORMAT, _FRONTED):
                raise ValueError(f"of format {facts['format']!r}, this version reads {_FORMAT!r} and {_FRONTED!r}")
            header, arrays = json.loads(facts["document"]), load(data)
            firsts, bounds = arrays["firsts"].tolist(), [0, *accumulate(arrays["lengths"].tolist())]
            if not len(bounds) - 1 == len(firsts) == len(arrays["contexts"]) // 32 or bounds[-1] != len(arrays["ids"]):
                raise ValueError(f"{len(bounds) - 1} lengths, {len(firsts)} firsts, {len(arrays['ids'])} ids")
            fronts = _fronts(arrays) if facts["format"] == _FRONTED else {}
            document = cls(
                id=header["id"],
                ids=[arrays["ids"][start:stop] for start, stop in pairwise(bounds)],
                firsts=firsts,
                marks=dict(header["marks"]),
                fronts=fronts,
            )
            contexts = arrays["contexts"].tobytes()
            known = [
                b"" if first == at and at not in fronts else contexts[32 * at : 32 * at + 32]
                for at, first in enumerate(firsts)
            ]
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise RecordError(f"a document's record is damaged: {type(error).__name__}: {error}") from error
        vars(document)["_contexts"] = known  # in the cached property's place
        return document

    def _chunk(self, number: int, first: int, context: bytes, behind: Any) -> Chunk:
        """A chunk as it is read behind those from ``first`` on, and what stands in front of that one."""
        ids, mark = self.ids[number], self.marks.get(number, "")
        front = sum(map(len, self.fronts.get(first, ())))
        return Chunk(
            ids=ids if isinstance(ids, tuple) else tuple(np.asarray(ids).tolist()),
            text=self.texts[number] if self.texts else None,
            document=self.id,
            number=number,
            offset=front + self._starts[number] - self._starts[first],
            front=front,
            context=marked(context, mark),
            mark=mark,
            behind=behind,
        )

    @lazy
    def _starts(self) -> list[int]:
        """Tokens in front of each chunk."""
        return [0, *accumulate(len(ids) for ids in self.ids)]

    @lazy
    def _contexts(self) -> list[bytes]:
        """Of each chunk the digest of its context, without its own mark."""
        contexts: list[bytes] = []
        for number, first in enumerate(self.firsts):
            if number and first == self.firsts[number - 1]:
                contexts.append(self._chunk(number - 1, first, contexts[-1], None).context_after)
            else:
                contexts.append(_after(self.lineage(number)[:-1]))
        return contexts


def _after(chain: Sequence[Chunk]) -> bytes:
    """The context of what stands behind chunks."""
    return chain[-1].context_after if chain else b""


def _up_to_here(chain: list[Chunk]) -> Callable[[], list[Chunk]]:
    """The lineage of the chunk that comes next."""
    here = len(chain) + 1
    return lambda: chain[:here]


def _fronts(arrays: Mapping[str, np.ndarray]) -> dict[int, list[tuple[int, ...]]]:
    """The fronts of a record."""
    fronts, at = dict[int, list[tuple[int, ...]]](), 0
    for first, length in zip(arrays["front_firsts"].tolist(), arrays["front_lengths"].tolist(), strict=True):
        fronts.setdefault(first, []).append(tuple(arrays["front_ids"][at : at + length].tolist()))
        at += length
    if at != len(arrays["front_ids"]):
        raise ValueError(f"fronts of {at} ids, got {len(arrays['front_ids'])}")
    return fronts


def windows(lengths: Sequence[int], window_tokens: int) -> list[int]:
    """Per chunk the number of the first chunk of its context.

    Where the next chunk would exceed the window, the context begins anew with the last chunks that fill at most a quarter of it.

    Args:
        lengths: tokens of each chunk.
        window_tokens: tokens of context and chunk together, at most.
    """
    firsts, first, used = [], 0, 0
    for number, length in enumerate(lengths):
        if used + length > window_tokens:
            first, used, room = number, 0, min(window_tokens // 4, window_tokens - length)
            while first and used + lengths[first - 1] <= room:
                first -= 1
                used += lengths[first]
        firsts.append(first)
        used += length
    return firsts
