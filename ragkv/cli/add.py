"""``ragkv add``: files in, read once."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.clustered import check, precomputed, tell
from ragkv.cli.opening import open_rag, open_unwritten, options_of, sent
from ragkv.cli.reading import reading
from ragkv.library.done import Added, Planned


def run(args: argparse.Namespace) -> int:
    """Add files; 1 where none of them could be."""
    path = folder(args)
    check(args)
    if args.dry_run:
        return _dry_run(args, path)
    before = None if args.ray is None else precomputed(args, path)
    with open_rag(path, **options_of(args)) as rag:
        begin = perf_counter()
        with reading(args) as bar:
            added = rag.add_files(args.paths, encoding=args.encoding, progress=bar)
        for change in added.changes if args.pin else ():
            rag.pin(change.document.source)
        summary = _summary(added, perf_counter() - begin)
        sent(rag.engine.store)
        if before is not None:
            tell(before, added, rag.engine.documents.setting)
            summary["precomputed"] = asdict(before)
    show.skipped(added.skipped)
    if args.json:
        show.as_json({"path": str(path), **summary})
    else:
        _show(summary)
    if not added.changes:
        show.hint("ragkv: nothing could be added")
    return 0 if added.changes else 1


def _dry_run(args: argparse.Namespace, path: Path) -> int:
    with open_unwritten(path, **options_of(args)) as rag, reading(args) as bar:
        planned = rag.plan_files(args.paths, encoding=args.encoding, progress=bar)
    show.skipped(planned.skipped)
    if args.json:
        show.as_json({"path": str(path), "dry_run": True, **asdict(planned)})
    else:
        _show_plan(planned)
    return 0 if planned.passages else 1


def _show_plan(planned: Planned) -> None:
    kinds = ("added", "changed", "moved", "unchanged", "skipped")
    documents = show.documents({kind: len(getattr(planned, kind)) for kind in kinds}, planned.hidden)
    print(f"{documents}; {show.number(planned.passages, 'passage')}, {show.number(planned.tokens, 'token')}")
    there, run = show.number(planned.stored_tokens, "token"), show.number(planned.tokens_to_read, "token")
    print(f"KV of {there} are there; to read: {run}, about {show.duration(planned.seconds)}")
    if planned.kv_bytes:
        print()
        rows = [
            (f"{name}{' (in use)' * (name == planned.codec)}", show.size(size))
            for name, size in planned.kv_bytes.items()
        ]
        show.table([("codec", "KV on disk"), *rows])
        print()
    print("nothing was done")


def _summary(added: Added, seconds: float) -> dict[str, Any]:
    return {
        "documents": {kind: len(getattr(added, kind)) for kind in ("added", "changed", "moved", "unchanged")},
        "passages": sum(len(change.document.passage_ids) for change in added.changes),
        "tokens_read": added.tokens_read,
        "kv_bytes": added.kv_bytes,
        "seconds": round(seconds, 3),
        "hidden": added.hidden,
        "skipped": [{"source": skipped.source, "reason": skipped.reason} for skipped in added.skipped],
    }


def _show(summary: dict[str, Any]) -> None:
    counts = {**summary["documents"], "skipped": len(summary["skipped"])}
    read = f"{show.number(summary['tokens_read'], 'token')} read in {summary['seconds']:.1f} s"
    passages = show.number(summary["passages"], "passage")
    print(f"{show.documents(counts, summary['hidden'])}; {passages}; {read}{show.kv(summary['kv_bytes'])}")
