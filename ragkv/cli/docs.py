"""``ragkv docs``: which documents there are. No model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import require_documents
from ragkv.folder.filesystem import has_data
from ragkv.library.listing import ListedDocument, kept_bytes, listed_documents
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore


def run(args: argparse.Namespace) -> int:
    """List documents: a table, or JSON."""
    path = folder(args)
    require_documents(path)
    with _opened(path) as (catalogue, store):
        found = listed_documents(catalogue, store)
        kept = {} if store is None else kept_bytes(catalogue, store)
    if args.json:
        listed = [asdict(document) for document in found]
        show.as_json({"path": str(path), "found": len(found), "kv_bytes": kept, "documents": listed})
        return 0
    if found:
        table(found)
    size = sum(kept.values())
    said = f"Found {show.number(len(found), 'document')}, {show.size(size)} of KV on disk."
    more = sum(sum(document.kv_bytes.values()) for document in found) - size
    if more:
        said += f" What several documents share counts for each of them above: {show.size(more)} more."
    show.hint(said)
    return 0


def documents(path: Path) -> list[ListedDocument]:
    """The documents of a folder; of KV what is on disk, for memory is each process's own."""
    with _opened(path) as (catalogue, store):
        return listed_documents(catalogue, store)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Catalogue, TieredStore | None]]:
    with ExitStack() as stack:
        catalogue = stack.enter_context(Catalogue(path / "documents"))
        store = stack.enter_context(TieredStore(path / "kv", cpu_bytes=0)) if has_data(path / "kv") else None
        yield catalogue, store


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
