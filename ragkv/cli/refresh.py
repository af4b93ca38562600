"""``ragkv refresh``: KV that are missing are read, before a question waits for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, open_unwritten, options_of, require_documents, sent
from ragkv.cli.reading import reading


def run(args: argparse.Namespace) -> int:
    """Read what is missing, and say how much it was."""
    path = folder(args)
    require_documents(path)
    if args.dry_run:
        return _dry_run(args, path)
    with open_rag(path, **options_of(args)) as rag:
        begin = perf_counter()
        with reading(args) as bar:
            tokens = rag.refresh(bar)
        seconds = perf_counter() - begin
        rag.engine.store.share()
        sent(rag.engine.store)
    if args.json:
        show.as_json({"path": str(path), "tokens_read": tokens, "seconds": round(seconds, 3)})
    else:
        print(f"{show.number(tokens, 'token')} read in {seconds:.1f} s")
    return 0


def _dry_run(args: argparse.Namespace, path: Path) -> int:
    with open_unwritten(path, **options_of(args)) as rag:
        stale = rag.stale()
    if args.json:
        show.as_json({"path": str(path), "dry_run": True, "stale": stale})
    else:
        print(f"{show.number(len(stale), 'document')} to be read behind other passages{':' * bool(stale)}")
        for source in stale:
            print(f"  {source}")
    return 0
