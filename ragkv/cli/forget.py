"""``ragkv forget``: documents go, with their passages, vectors and KV. No model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ragkv.cli import docs
from ragkv.cli.arguments import folder
from ragkv.cli.entries import DOCS, listed, removed
from ragkv.cli.opening import require_documents, sent
from ragkv.cli.pools import opened_pool
from ragkv.errors import RagKVError
from ragkv.folder.filesystem import has_data
from ragkv.retrieval import Catalogue
from ragkv.retrieval.naming import matching, unknown
from ragkv.store import TieredStore
from ragkv.store.maintenance import computed_of, remove


def run(args: argparse.Namespace) -> int:
    """Remove what the targets name: all of it exists, or nothing is removed. KV that other documents name stay."""
    path = folder(args)
    require_documents(path)
    pool = opened_pool(args)
    namespace = _kept_namespace(path) if args.namespace is None else args.namespace
    found = {document.source: document for document in docs.documents(path) if document.namespace == namespace}
    chosen: dict[str, None] = {}
    for target in args.targets:
        meant = matching(found, target)
        if not meant:
            raise RagKVError(f"{unknown(found, target, DOCS)}; nothing was removed")
        chosen.update(dict.fromkeys(meant))
    names = sorted(chosen)
    entries = listed(path) if has_data(path / "kv") else []
    keys = _keys(path, names, namespace)
    behind = set(computed_of(path / "kv", keys)) if entries else set()
    alone = [
        item
        for item in entries
        if item.entry.key in behind or (item.entry.key in keys and {name for name, _ in item.places} <= chosen.keys())
    ]

    def forgotten() -> None:
        with Catalogue(path / "documents") as catalogue:
            for name in names:
                catalogue.remove(name, namespace)
            unused = catalogue.unused()  # whoever asked in between may have stored some of it again
            computed = computed_of(path / "kv", unused) if has_data(path / "kv") else []
            if pool is not None:
                with TieredStore(path / "kv", cpu_bytes=0, remote=pool) as store:
                    store.remove_many([*unused, *computed])
                    sent(store)
            elif has_data(path / "kv"):
                remove(path / "kv", [*unused, *computed])
            catalogue.dropped(unused)

    if not args.json:
        docs.table(found[name] for name in names)
    return removed(path, alone, names, ask=not args.yes, dry_run=args.dry_run, as_json=args.json, behind=forgotten)


def _kept_namespace(path: Path) -> str:
    with Catalogue(path / "documents") as catalogue:
        return catalogue.defaults.get("namespace", "")


def _keys(path: Path, names: list[str], namespace: str) -> set[bytes]:
    """The keys of the KV of documents."""
    with Catalogue(path / "documents") as catalogue, catalogue.snapshot() as view:
        documents = filter(None, [view.get(name, namespace) for name in names])
        return {key for document in documents for reading in view.readings(document) for key in reading.keys}
