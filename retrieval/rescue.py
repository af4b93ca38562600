"""Saving a catalogue whose file is damaged in its own pages, or was cut short."""

from __future__ import annotations

import os
from pathlib import Path

from ragkv.folder import Environment, rewrite
from ragkv.retrieval.changes import new_state
from ragkv.retrieval.folder import DATABASES
from ragkv.retrieval.records import passage_key
from ragkv.retrieval.upkeep import FORMAT


def rescue(path: str | os.PathLike[str]) -> int:
    """Puts what can be read into a new file; the damaged one stays as ``data.mdb.damaged``.

    :meth:`Catalogue.repair` then computes vectors that are lost, and deletes, by name, documents of which a text is.
    Nobody may have the folder open.

    Returns:
        How many values were saved.

    Raises:
        RecordError: nothing can be read; the file stays as it is.
        StoreError: the folder is open, or is no catalogue's.
    """
    saved = rewrite(Path(path), DATABASES)
    environment = Environment.open(Path(path), DATABASES)
    try:
        with environment.transaction(write=True) as txn:
            if txn.get("meta", b"format") is None:
                txn.put("meta", b"format", FORMAT)
            if txn.get("meta", b"settings") is None:
                txn.clear("vectors")  # nobody knows which embedder made them
            ids = (max(txn.keys(name), default=b"") for name in ("passages", "vectors"))
            following = max(int.from_bytes(key[:8], "big") + bool(key) for key in ids)
            following = max(following, int.from_bytes(txn.get("meta", b"next id") or b"", "big"))
            txn.put("meta", b"next id", passage_key(following))
            txn.put("meta", b"state", new_state())
    finally:
        environment.close()
    return saved
