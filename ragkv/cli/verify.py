"""``ragkv verify``: every record is read to its end and every checksum compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import store_folder
from ragkv.folder import problems
from ragkv.retrieval import Catalogue
from ragkv.retrieval.rescue import rescue
from ragkv.store.maintenance import repair, structure, verify


def run(args: argparse.Namespace) -> int:
    """Verify, and with ``--repair`` remove what is damaged; 1 where damage was found, repaired or not."""
    path = folder(args)
    place = store_folder(path)
    broken, saved = structure(place), None
    if broken and args.repair:
        saved = repair(place)
    documents = _documents(path / "documents", args.repair)
    if broken and saved is None:
        damaged, checked, read, dropped = [], 0, 0, 0
    else:
        with show.progress(unit=" records") as bar:
            verdict = verify(place, drop=args.repair, progress=lambda done, total: bar.update())
        damaged, checked, read, dropped = verdict.damaged, verdict.checked, verdict.bytes_read, verdict.dropped
    if args.json:
        show.as_json(
            {
                "path": str(path),
                "checked": checked,
                "bytes_read": read,
                "damaged": [{"id": key.hex(), "reason": reason} for key, reason in damaged],
                "dropped": dropped,
                "structure": broken,
                "saved": saved,
                "documents": documents,
            }
        )
    else:
        for key, reason in damaged:
            print(f"{key.hex()[:12]}  {reason}")
        for problem in (*(f"the file: {problem}" for problem in broken), *(f"documents: {text}" for text in documents)):
            print(problem)
        print(
            f"{show.number(checked, 'record')}, {show.size(read)} read: {_verdict(len(damaged) + len(broken), args.repair)}"
        )
        if (damaged or broken) and not args.repair:
            show.hint("ragkv: 'ragkv verify --repair' removes what is damaged; it is read again when it is asked for")
    return 1 if damaged or broken or documents else 0


def _verdict(damaged: int, repaired: bool) -> str:
    if not damaged:
        return "nothing is damaged"
    return f"{damaged:,} damaged{', removed' if repaired else ''}"


def _documents(place: Path, repair: bool) -> list[str]:
    if not place.is_dir():
        return []
    broken = [f"the file: {problem}" for problem in problems(place)]
    if broken and repair:
        broken.append(f"{show.number(rescue(place), 'value')} saved into a new file")
    elif broken:
        return broken
    with Catalogue(place) as catalogue:
        return broken + catalogue.check()
