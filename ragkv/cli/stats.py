"""``ragkv stats``: what a folder holds. No model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import require_documents
from ragkv.retrieval import Catalogue
from ragkv.store import TieredStore


def run(args: argparse.Namespace) -> int:
    """Show documents, passages and stored KV."""
    path = folder(args)
    require_documents(path)
    found = {"path": str(path), **_documents(path), "store": _store(path)}
    if args.json:
        show.as_json(found)
    else:
        _show(found)
    return 0


def _documents(path: Path) -> dict[str, Any]:
    with Catalogue(path / "documents") as catalogue:
        documents = catalogue.documents()
        return {
            "made_with": {what: setting["name"] for what, setting in catalogue.settings.items()},
            "documents": len(documents),
            "passages": sum(len(document.passage_ids) for document in documents),
        }


def _store(path: Path) -> dict[str, Any]:
    """The tiers that outlive a process: memory is this process's own, and empty."""
    with TieredStore(path / "kv", cpu_bytes=0) as store:
        stats = store.stats()
    tiers = {tier: {"entries": count, "bytes": stats.bytes[tier]} for tier, count in stats.entries.items()}
    return {"tiers": {tier: held for tier, held in tiers.items() if tier != "cpu"}, "file_bytes": stats.file_bytes}


def _show(found: dict[str, Any]) -> None:
    print(
        f"{show.number(found['documents'], 'document')}, {show.number(found['passages'], 'passage')} in {found['path']}"
    )
    for what, name in found["made_with"].items():
        print(f"{what}: {name}")
    rows = [("KV", "entries", "size")]
    rows += [(tier, f"{held['entries']:,}", show.size(held["bytes"])) for tier, held in found["store"]["tiers"].items()]
    print()
    show.table(rows)
