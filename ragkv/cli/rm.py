"""``ragkv rm``: KV of chosen entries or documents goes. The documents stay, and are read again when they are asked for."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from ragkv.cli.arguments import folder
from ragkv.cli.entries import DOCS, Listed, listed, removed
from ragkv.errors import RagKVError
from ragkv.retrieval.naming import matching, unknown

_ID = re.compile(r"[0-9a-f]{4,64}")


def run(args: argparse.Namespace) -> int:
    """Remove what the targets name: all of it exists, or nothing is removed."""
    path = folder(args)
    found = listed(path)
    chosen = {item.id: item for target in args.targets for item in _named(found, target)}
    return removed(path, list(chosen.values()), ask=not args.yes, dry_run=args.dry_run, as_json=args.json)


def _named(found: Sequence[Listed], target: str) -> list[Listed]:
    """The entries of the documents that are meant, or the one whose id begins so.

    Raises:
        RagKVError: there is none, or several ids begin so.
    """
    sources = {source for item in found for source, _ in item.places}
    names = set(matching(sorted(sources), target))
    of_document = [item for item in found if any(source in names for source, _ in item.places)]
    if of_document:
        return of_document
    of_id = [item for item in found if item.id.startswith(target)] if _ID.fullmatch(target) else []
    if len(of_id) > 1:
        raise RagKVError(f"{len(of_id)} entries begin with {target}: give more digits; nothing was removed")
    if not of_id:
        raise RagKVError(
            f"no entry's id begins with these digits (4 at least), and {unknown(sources, target, DOCS)}; nothing was removed"
        )
    return of_id
