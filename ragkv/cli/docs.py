"""``ragkv docs``: which documents there are. No model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import require_documents
from ragkv.folder.filesystem import has_data
from ragkv.library.listing import ListedDocument, listed_documents
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore


def run(args: argparse.Namespace) -> int:
    """List documents: a table, or JSON."""
    path = folder(args)
    require_documents(path)
    found = documents(path)
    size = sum(sum(document.kv_bytes.values()) for document in found)
    if args.json:
        show.as_json({"path": str(path), "found": len(found), "documents": [asdict(document) for document in found]})
        return 0
    if found:
        table(found)
    show.hint(f"Found {show.number(len(found), 'document')}, {show.size(size)} of KV on disk.")
    return 0


def documents(path: Path) -> list[ListedDocument]:
    """The documents of a folder; of KV what is on disk, for memory is each process's own."""
    with Catalogue(path / "documents") as catalogue:
        if not has_data(path / "kv"):
            return listed_documents(catalogue, None)
        with TieredStore(path / "kv", cpu_bytes=0) as store:
            return listed_documents(catalogue, store)


def table(items: Iterable[ListedDocument]) -> None:
    """Prints documents, one a line."""
    items = list(items)
    named = any(item.namespace for item in items)
    rows = [("document", *(["namespace"] if named else []), "passages", "tokens", "KV on disk", "")]
    for item in items:
        tokens = "" if item.tokens is None else f"{item.tokens:,}"
        size = show.size(item.kv_bytes.get("disk", 0))
        name = [show.short(item.source), *([item.namespace] if named else [])]
        rows.append((*name, f"{item.passages:,}", tokens, size, "pinned" if item.pinned else ""))
    show.table(rows, left=2 if named else 1)
