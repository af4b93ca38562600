"""What documents' KV take, before anything is read."""

from __future__ import annotations

import logging
import shutil

from ragkv.amounts import size
from ragkv.errors import StoreError, StoreFullError
from ragkv.library.documents import Documents
from ragkv.model.cache import random_kv
from ragkv.store.codecs import CODECS

logger: logging.Logger = logging.getLogger(__name__)

# Long enough for an entry's header and its whole pages to weigh little, as in a passage.
_SAMPLE_TOKENS = 64


def token_bytes(documents: Documents, codec: str | None = None) -> float:
    """Bytes that a token's KV take where they are kept: of random numbers of the model's shapes, in the store's codec or another.

    Exact but for headers where a codec's size hangs on shapes alone; ``lossless`` and ``cachegen`` do better on real KV.
    """
    decoder = documents.reader.decoder
    kv = random_kv(decoder.specs, _SAMPLE_TOKENS)
    return documents.store.stored_bytes(kv, rotations=decoder.rotations, codec=codec) / _SAMPLE_TOKENS


def codec_bytes(documents: Documents) -> dict[str, float]:
    """:func:`token_bytes` by codec; those that need a package that is not there are left out."""
    sizes = dict[str, float]()
    for codec in CODECS:
        try:
            sizes[codec] = token_bytes(documents, codec)
        except StoreError as error:
            logger.info("%s is left out: %s", codec, str(error))
    return sizes


def check_room(documents: Documents, tokens: int) -> int:
    """See whether there is room for so many more tokens' KV, and say so where there is not. What a budget lacks is logged.

    Returns:
        Bytes that they take, estimated.

    Raises:
        StoreFullError: the disk is too small for what the budget allows.
    """
    store = documents.store
    needed = int(tokens * token_bytes(documents)) if tokens else 0
    stats, budget = store.stats(), store.budget_bytes
    used = stats.bytes["cpu" if store.path is None else "disk"]
    if needed and used + needed > budget:
        logger.warning(
            "the KV of %d tokens take about %s, and %s of %s are free: what is used least goes from the store, and is read again "
            "when a question asks for it. Allow more (disk_bytes, --disk-size), or encode them smaller (codec, --codec int8)",
            *(tokens, size(needed), size(max(0, budget - used)), size(budget)),
        )
    if needed and store.path is not None:
        free = shutil.disk_usage(store.path).free + max(0, stats.file_bytes - used)
        if min(needed, budget - used) > free:
            raise StoreFullError(
                f"the KV of {tokens} tokens take about {size(needed)}, and the disk of {store.path} has {size(free)} left: free "
                "some, encode them smaller (codec, --codec int8), or allow less (disk_bytes, --disk-size). Nothing was added"
            )
    return needed
