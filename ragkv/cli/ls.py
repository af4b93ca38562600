"""``ragkv ls``: what is stored. No model is loaded."""

from __future__ import annotations

import argparse

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import listed, table


def run(args: argparse.Namespace) -> int:
    """List entries: a table, ids alone, or JSON."""
    path = folder(args)
    found = [item for item in listed(path) if all(holds(item) for holds in args.filters)]
    if args.sort is not None:
        name, largest_first = args.sort
        found.sort(key=lambda item: item.field(name), reverse=largest_first)
    shown = found if args.limit is None else found[: args.limit]
    size = sum(item.entry.size_bytes for item in found)
    if args.json:
        entries = [item.as_dict() for item in shown]
        show.as_json({"path": str(path), "found": len(found), "bytes": size, "entries": entries})
    elif args.quiet:
        for item in shown:
            print(item.id)
    else:
        if shown:
            table(shown)
        cut = f", {len(shown):,} shown" if len(shown) < len(found) else ""
        show.hint(f"Found {show.number(len(found), 'entry', 'entries')}{cut}, {show.size(size)} on disk.")
    return 0
