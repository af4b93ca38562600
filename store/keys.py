"""The name of a chunk's KV: equal on every machine and in every process."""

from __future__ import annotations

from collections.abc import Sequence

from ragkv.chunk import digest


def chunk_key(space: str, ids: Sequence[int], context: bytes, namespace: str = "") -> bytes:
    """32-byte blake2b over the canonical encoding of everything that a chunk's KV depends on.

    Args:
        space: fingerprint of the model, tokenizer, dtype, rope, attention kind and anchor.
        ids: the chunk's token ids, each below 2**32.
        context: digest of what the chunk was prefilled behind (:attr:`ragkv.chunk.Chunk.context`).
        namespace: whose chunk it is. Another namespace's key cannot be derived from the same passage, so its
            entry is neither found nor its existence told.

    Raises:
        OverflowError: an id is negative or does not fit into 32 bits.
    """
    return digest("ragkv chunk 1", space, namespace, ids, context)
