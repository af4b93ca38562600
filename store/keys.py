"""The names of KV, equal on every machine and in every process: of a chunk, and of what prompts computed of it.

Keys of the latter begin alike, and their labels name the chunks that they were computed of and behind, by the beginnings of these
chunks' keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set

from ragkv.chunk import digest
from ragkv.errors import instance


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


def checked_keys(keys: Iterable[bytes]) -> list[bytes]:
    """Keys, as a list.

    Raises:
        ArgumentTypeError: something else is among them.
    """
    instance("keys", keys, Iterable, "a list of them")
    listed = list(keys)
    for key in listed:
        instance("a key", key, bytes, "bytes, as chunk_key makes them")
    return listed


#: What the keys of KV that prompts computed begin with.
PATH = b"path"

# A label has room for the beginnings of so many keys; it names any, where there are more.
_TAG_BYTES, _MOST_TAGS = 4, 28
# Of a chunk's key, in those of its variants.
_CHUNK_BYTES = 20
#: The label that names any chunk.
ANY = "*"


def path_key(space: str, ids: Sequence[int], path: bytes, namespace: str = "") -> bytes:
    """As :func:`chunk_key`, of what was computed behind the ids whose digest is ``path``."""
    return PATH + chunk_key(space, ids, path, namespace)[len(PATH) :]


def variants_of(key: bytes) -> bytes:
    """What the keys begin with of what was computed of a chunk behind others; ``key`` is that of the chunk's own KV."""
    return PATH + key[:_CHUNK_BYTES]


def variant_key(key: bytes, front: Sequence[str]) -> bytes:
    """The key of what was computed of a chunk behind chunks of these names."""
    return variants_of(key) + digest(*front)[: len(key) - len(PATH) - _CHUNK_BYTES]


def tag(key: bytes) -> str:
    """What labels call a chunk."""
    return key[:_TAG_BYTES].hex()


def tags_of(keys: Iterable[bytes]) -> set[str]:
    """What labels call chunks. Behind what was computed nothing is named."""
    return {tag(key) for key in keys if not key.startswith(PATH)}


def label_of(keys: Collection[bytes]) -> str:
    """The label of what was computed of chunks, and behind them."""
    return " ".join(map(tag, keys)) if len(keys) <= _MOST_TAGS else ANY


def labelled(label: str, tags: Set[str]) -> bool:
    """Whether a label names one of the chunks, or might."""
    return bool(tags) and (label == ANY or not tags.isdisjoint(label.split()))
