"""``ragkv publish``: which documents there are goes to a pool, for others to answer from."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, require_documents, sent


def run(args: argparse.Namespace) -> int:
    """Send what KV the pool lacks, then the catalogue, and say how much it was."""
    path = folder(args)
    require_documents(path)
    with open_rag(path, **options_of(args)) as rag:
        rag.engine.store.share()
        sent(rag.engine.store)
        done = rag.publish()
    if args.json:
        show.as_json({"path": str(path), **asdict(done)})
        return 0
    amount = f"{show.number(done.documents, 'document')}, {show.number(done.passages, 'passage')}"
    print(f"published {amount}, {show.size(done.size_bytes)}")
    if done.unread:
        show.hint(
            f"{show.number(done.unread, 'passage')} without KV: 'ragkv refresh' reads them, or whoever is asked does"
        )
    return 0
