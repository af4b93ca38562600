"""``ragkv forget``: documents go, with their passages, vectors and KV. No model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from ragkv.cli.arguments import folder
from ragkv.cli.entries import listed, removed
from ragkv.cli.opening import require_documents
from ragkv.errors import RagKVError
from ragkv.library.shelf import mark_name
from ragkv.retrieval import Catalogue
from ragkv.store.maintenance import opened


def run(args: argparse.Namespace) -> int:
    """Remove what the targets name: all of it exists, or nothing is removed. What other documents also say stays."""
    path = folder(args)
    require_documents(path)
    with Catalogue(path / "documents") as catalogue:
        names = list(dict.fromkeys(_named(catalogue, target) for target in args.targets))
    entries = listed(path) if (path / "kv" / "data.mdb").is_file() else []
    alone = [item for item in entries if item.places and {name for name, _ in item.places} <= {*names}]
    # KV first: what is cut short here leaves documents that are read again, and no KV that nobody asks for.
    code = removed(path, alone, names, ask=not args.yes, dry_run=args.dry_run, as_json=args.json)
    if code == 0 and not args.dry_run:
        with Catalogue(path / "documents") as catalogue:
            marks = {mark_name(catalogue.remove(name).old_passages) for name in names}
            marks -= {mark_name(catalogue.texts(document.source)) for document in catalogue}
        _forget_marks(path / "kv", marks)
    return code


def _named(catalogue: Catalogue, target: str) -> str:
    for name in (target, str(Path(target).expanduser().absolute())):
        if name in catalogue:
            return name
    raise RagKVError(f"no document is called {target!r}: see 'ragkv ls'; nothing was removed")


def _forget_marks(kv: Path, names: Iterable[str]) -> None:
    """The store remembers which versions of documents were repaired."""
    if (kv / "data.mdb").is_file():
        with opened(kv) as tier:
            tier.remove((), facts=names)
