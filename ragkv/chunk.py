"""What a chunk is: token ids with an identity and a context, and the keys and values computed for them.

L layers, H kv heads, T tokens of the chunk, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ragkv.errors import PromptError
from ragkv.lazy import lazy


def digest(*parts: bytes | str | Sequence[int] | NDArray[np.uint32]) -> bytes:
    """32-byte blake2b over a length-prefixed encoding: equal on every machine and in every process.

    Strings are encoded as UTF-8, sequences of token ids as little-endian uint32.
    """
    hasher = blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, str):
            data = part.encode("utf-8", "surrogatepass")  # what is called so is looked for, and not found
        elif isinstance(part, bytes):
            data = part
        else:
            data = np.asarray(part, dtype="<u4").tobytes()
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


@dataclass(frozen=True, eq=False)
class Chunk:
    """The token ids of one passage with its wrapper, and what they are prefilled behind.

    An application may keep it: :meth:`to_dict` is what JSON can hold, and :meth:`from_dict` takes it back. Objects are equal where
    they are one; compare their dicts to see whether they say the same.

    Attributes:
        ids: token ids, wrapper included; never empty.
        text: the passage as it was given; ``None`` where ids were given, or it was not kept.
        document: id of its document; empty for a passage that stands alone.
        number: its place among the chunks of its document, from 0.
        offset: tokens of its context, the anchor not counted.
        front: how many of these, the first ones, are of passages of other documents that its own was read behind.
        context: digest of its context, the anchor not counted (:attr:`context_after` of the chunk in front).
        mark: not empty where KV from here on were repaired after an edit instead of read: a part of the context, so that they are
            never taken for exact ones.
        span: first character of the passage in its document's text, and the one behind its last; ``None`` where not known.
        metadata: of its document; anything that JSON can hold.
        behind: gives the chunks of its context and itself; ``None`` where only its document's record can.
        name: what its document is called, where it was found in a folder; reports show it, and nothing hangs on it.
    """

    ids: tuple[int, ...]
    text: str | None = None
    document: str = ""
    number: int = 0
    offset: int = 0
    front: int = 0
    context: bytes = field(default=b"", repr=False)
    mark: str = ""
    span: tuple[int, int] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    behind: Callable[[], list[Chunk]] | None = field(default=None, repr=False)
    name: str = ""

    @lazy
    def numbers(self) -> NDArray[np.uint32]:
        """``ids`` as an array.

        Raises:
            OverflowError: an id is negative or does not fit into 32 bits.
        """
        return np.asarray(self.ids, dtype="<u4")

    @lazy
    def highest(self) -> int:
        """The largest of the ids."""
        return max(self.ids)

    @lazy
    def id(self) -> str:
        """Content hash of ``ids``: 64 hex digits, the same in whatever document the chunk stands."""
        return digest(self.numbers).hex()

    @property
    def short(self) -> str:
        """The first 16 digits of :attr:`id`."""
        return self.id[:16]

    @lazy
    def context_after(self) -> bytes:
        """Digest of the context that it is, behind its own, to what follows."""
        return digest(self.context, self.numbers)

    @lazy
    def keys(self) -> dict[tuple[str, str], bytes]:
        """Keys of its KV by space and namespace, as far as they were worked out."""
        return {}

    def lineage(self) -> list[Chunk] | None:
        """The chunks of its context in order, each in the context that it has there, then the chunk itself.

        ``None`` where the chunk does not know them: see :meth:`from_dict`.
        """
        if not self.offset:
            return [self]
        return None if self.behind is None else self.behind()

    def to_dict(self) -> dict[str, Any]:
        """All but the text, the name and the context's chunks, as JSON can hold it."""
        return {
            "ids": list(self.ids),
            "document": self.document,
            "number": self.number,
            "offset": self.offset,
            "front": self.front,
            "context": self.context.hex(),
            "mark": self.mark,
            "span": None if self.span is None else list(self.span),
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], text: str | None = None) -> Chunk:
        """The chunk of :meth:`to_dict`.

        Its KV are found by what it says. Should the store have lost them, its document's record says what they are read behind.

        Raises:
            PromptError: it is not what :meth:`to_dict` gives.
        """
        try:
            ids, span = fields["ids"], fields["span"]
            chunk = cls(
                ids=tuple(_whole(i) for i in ids),
                text=text,
                document=str(fields["document"]),
                number=_whole(fields["number"]),
                offset=_whole(fields["offset"]),
                front=_whole(fields.get("front", 0)),  # dicts of former versions have none
                context=bytes.fromhex(fields["context"]),
                mark=str(fields["mark"]),
                span=None if span is None else (_whole(span[0]), _whole(span[1])),
                metadata=dict(fields["metadata"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise PromptError(f"a chunk must be what Chunk.to_dict() gives: {type(error).__name__}: {error}") from error
        if not chunk.ids or len(chunk.context) != (32 if chunk.offset or chunk.mark else 0):
            raise PromptError(
                f"a chunk has at least one id, and a context of 32 bytes where there is one; got {len(chunk.ids)} ids, offset "
                f"{chunk.offset}, a context of {len(chunk.context)} bytes"
            )
        return chunk

    def __len__(self) -> int:
        return len(self.ids)


def marked(context: bytes, mark: str) -> bytes:
    """The context of a chunk that has a mark."""
    return digest(context, mark) if mark else context


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no whole number of at least 0")
    return value


@dataclass(frozen=True, eq=False)
class Attended:
    """What a chunk's tokens attended to when its KV were computed (Cache-Craft, arXiv:2502.15734).

    Sums of attention weights, mean over heads and layers.

    Attributes:
        front: names of the chunks in front, in order (:attr:`Chunk.short`).
        masses: what the chunk's tokens together gave to each of those.
        impact: how much the chunk reads in what stands in front, measured against itself: 0.5 to 1 (CCI, eq. 11).
        tokens: ``[T]`` what each token gave to the chunks in front, all together; fp32, on the CPU.
    """

    front: tuple[str, ...]
    masses: tuple[float, ...]
    impact: float
    tokens: Tensor

    @classmethod
    def nothing(cls, tokens: int) -> Attended:
        """Of so many tokens that saw no chunk in front, or of which nobody knows what they saw."""
        return cls((), (), 0.5, torch.zeros(tokens, dtype=torch.float32, device="cpu"))


@dataclass(eq=False)
class ChunkKV:
    """Keys and values of one chunk, one ``[H, T, D]`` pair a layer; H and D may differ between layers.

    Attributes:
        keys: L tensors ``[H, T, D]``, with rotary embedding applied for positions ``base .. base + T - 1``.
        values: L tensors ``[H, T, D]``.
        base: position at which the chunk's first token stood when the KV was made.
        sensitivity: ``[T]`` how much each token's values change when another text stands in front of the document; ``None`` where
            it was not measured. See :mod:`ragkv.library.sensitivity`.
        foreign: id of the text that stood in front when the sensitivity was measured.
        rows: ``[T]`` where these are some of a chunk's tokens: their numbers in it, ascending; ``base`` is the position of its
            first token. ``None`` for all of a chunk.
        attended: what all of the chunk's tokens attended to; ``None`` where it was not measured.
        kept: whatever was found out of the tensors and stays with them for the next who asks.
    """

    keys: list[Tensor]
    values: list[Tensor]
    base: int
    sensitivity: Tensor | None = None
    foreign: str = ""
    rows: Tensor | None = None
    attended: Attended | None = None
    kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return self.keys[0].shape[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.keys, self.values, strict=True)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def first(self, tokens: int) -> ChunkKV:
        """The first ``tokens`` tokens, as views: by causality they know nothing of the others."""
        keys, values = [k[:, :tokens] for k in self.keys], [v[:, :tokens] for v in self.values]
        sensitivity, rows = (None if held is None else held[:tokens] for held in (self.sensitivity, self.rows))
        return ChunkKV(keys, values, self.base, sensitivity, self.foreign, rows)

    def to(self, device: torch.device | str) -> ChunkKV:
        """The same KV on another device; tensors that are there already are not copied."""
        keys, values = [k.to(device) for k in self.keys], [v.to(device) for v in self.values]
        return ChunkKV(keys, values, self.base, self.sensitivity, self.foreign, self.rows, self.attended)
