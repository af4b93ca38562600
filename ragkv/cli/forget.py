"""``ragkv forget``: documents go, with their passages, vectors and KV. No model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ragkv.cli.arguments import folder
from ragkv.cli.entries import listed, removed
from ragkv.cli.opening import require_documents
from ragkv.errors import RagKVError
from ragkv.retrieval import Catalogue
from ragkv.store.maintenance import remove


def run(args: argparse.Namespace) -> int:
    """Remove what the targets name: all of it exists, or nothing is removed. KV that other documents name stay."""
    path = folder(args)
    require_documents(path)
    with Catalogue(path / "documents") as catalogue:
        names = list(dict.fromkeys(_named(catalogue, target) for target in args.targets))
    entries = listed(path) if (path / "kv" / "data.mdb").is_file() else []
    alone = [item for item in entries if item.places and {name for name, _ in item.places} <= {*names}]

    def forgotten() -> None:
        with Catalogue(path / "documents") as catalogue:
            unused = [key for name in names for key in catalogue.remove(name).unused]
        # Whoever asked in between may have stored some of it again.
        if (path / "kv" / "data.mdb").is_file():
            remove(path / "kv", unused)

    return removed(path, alone, names, ask=not args.yes, dry_run=args.dry_run, as_json=args.json, behind=forgotten)


def _named(catalogue: Catalogue, target: str) -> str:
    for name in (target, str(Path(target).expanduser().absolute())):
        if name in catalogue:
            return name
    raise RagKVError(f"no document is called {target!r}: see 'ragkv ls'; nothing was removed")
