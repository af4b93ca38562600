"""``ragkv sync``: the documents of a folder as the folder is now."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from time import perf_counter

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, sent
from ragkv.cli.reading import reading
from ragkv.library.done import Synced


def run(args: argparse.Namespace) -> int:
    """Add, rename, remove; and say what."""
    path = folder(args)
    with open_rag(path, **options_of(args)) as rag:
        begin = perf_counter()
        with reading(args) as bar:
            synced = rag.sync(args.folder, dry_run=args.dry_run, encoding=args.encoding, progress=bar)
        seconds = perf_counter() - begin
        sent(rag.engine.store)
    show.skipped(synced.skipped)
    if args.json:
        show.as_json({"path": str(path), "dry_run": args.dry_run, **asdict(synced), "seconds": round(seconds, 3)})
    else:
        _show(synced, args.dry_run, seconds)
    return 0


def _show(synced: Synced, dry_run: bool, seconds: float) -> None:
    for kind in ("added", "changed", "removed"):
        for source in getattr(synced, kind):
            print(f"{kind:8} {show.short(source)}")
    for source, former in synced.moved.items():
        print(f"{'moved':8} {show.short(former)} -> {show.short(source)}")
    counts = {
        kind: len(getattr(synced, kind)) for kind in ("added", "changed", "moved", "removed", "unchanged", "skipped")
    }
    documents = show.documents(counts, synced.hidden)
    tokens = show.number(synced.tokens, "token")
    if dry_run:
        print(f"{documents}; {tokens} to read; nothing was done")
    else:
        print(f"{documents}; {tokens} read in {seconds:.1f} s{show.kv(synced.kv_bytes)}")
