"""What a chunk is: token ids with an identity and a context, and the keys and values computed for them.

L layers, H kv heads, T tokens of the chunk, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def digest(*parts: bytes | str | Sequence[int]) -> bytes:
    """32-byte blake2b over a length-prefixed encoding: equal on every machine and in every process.

    Strings are encoded as UTF-8, sequences of token ids as little-endian uint32.
    """
    hasher = blake2b(digest_size=32)
    for part in parts:
        if isinstance(part, str):
            data = part.encode()
        elif isinstance(part, bytes):
            data = part
        else:
            data = np.asarray(part, dtype="<u4").tobytes()
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.digest()


@dataclass(frozen=True, eq=False)
class Chunk:
    """The token ids of one passage with its wrapper, and the context that it is prefilled behind.

    Attributes:
        ids: token ids, wrapper included; never empty.
        text: the passage as it was given; ``None`` when ids were given.
        previous: the chunk before it in the same document; ``None`` for a document's first chunk and for a passage
            that stands alone. The chain of predecessors is the chunk's context, behind the anchor.
        mark: not empty where KV from here on were repaired after an edit instead of read: a part of the context, so that they are
            never taken for exact ones.
        offset: tokens of its context, the anchor not counted.
        context: digest of the ids of its context, the anchor not counted.
    """

    ids: tuple[int, ...]
    text: str | None = None
    previous: Chunk | None = field(default=None, repr=False)
    mark: str = ""
    offset: int = field(init=False)
    context: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        before = self.previous
        object.__setattr__(self, "offset", 0 if before is None else before.offset + len(before))
        context = b"" if before is None else digest(before.context, before.ids)
        object.__setattr__(self, "context", digest(context, self.mark) if self.mark else context)

    @property
    def id(self) -> str:
        """Content hash of ``ids``: 64 hex digits, the same in whatever document the chunk stands."""
        return digest(self.ids).hex()

    def lineage(self) -> list[Chunk]:
        """The chunks of its context in document order, then the chunk itself."""
        chain: list[Chunk] = []
        node: Chunk | None = self
        while node is not None:
            chain.append(node)
            node = node.previous
        return chain[::-1]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class ChunkKV:
    """Keys and values of one chunk, one ``[H, T, D]`` pair a layer; H and D may differ between layers.

    Attributes:
        keys: L tensors ``[H, T, D]``, with rotary embedding applied for positions ``base .. base + T - 1``.
        values: L tensors ``[H, T, D]``.
        base: position at which the chunk's first token stood when the KV was made.
        sensitivity: ``[T]`` how much each token's values change when another text stands in front of the document; ``None`` where
            it was not measured. See :mod:`ragkv.library.sensitivity`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    base: int
    sensitivity: Tensor | None = None

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
        return ChunkKV(keys, values, self.base, None if self.sensitivity is None else self.sensitivity[:tokens])

    def to(self, device: torch.device | str) -> ChunkKV:
        """The same KV on another device; tensors that are there already are not copied."""
        keys, values = [k.to(device) for k in self.keys], [v.to(device) for v in self.values]
        return ChunkKV(keys, values, self.base, self.sensitivity)
