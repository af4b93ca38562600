"""``ragkv publish``: which documents there are goes to a pool, for others to answer from."""

from __future__ import annotations

import argparse

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, require_documents


def run(args: argparse.Namespace) -> int:
    """Send what KV the pool lacks, then the catalogue, and say how much it was."""
    path = folder(args)
    require_documents(path)
    with open_rag(path, **options_of(args)) as rag:
        done = rag.publish(only=args.only)
    if args.json:
        said = {"path": str(path), "bytes": done.size_bytes}
        show.as_json(said | {name: getattr(done, name) for name in ("documents", "passages", "unread", "withdrawn")})
        return 0
    amount = f"{show.number(done.documents, 'document')}, {show.number(done.passages, 'passage')}"
    withdrawn = f"; {show.number(done.withdrawn, 'catalogue')} of other models withdrawn" if done.withdrawn else ""
    print(f"published {amount}, {show.size(done.size_bytes)}{withdrawn}")
    if done.unread:
        show.hint(
            f"{show.number(done.unread, 'passage')} without KV: 'ragkv refresh' reads them, or whoever is asked does"
        )
    return 0
