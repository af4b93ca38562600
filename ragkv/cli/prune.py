"""``ragkv prune``: KV that is old, idle, large or nobody's goes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import Listed, listed, removed


def run(args: argparse.Namespace) -> int:
    """Remove what every given filter holds for and, by ``--max-size``, what is idle longest of the rest."""
    if not (args.filters or args.orphans or args.max_size is not None):
        args.refuse("say what goes: --filter, --orphans or --max-size")
    path = folder(args)
    found = listed(path)
    free = [item for item in found if not item.entry.pinned]
    if len(free) < len(found):
        show.hint(f"{show.number(len(found) - len(free), 'pinned entry', 'pinned entries')} passed over")
    chosen: list[Listed] = []
    if args.filters or args.orphans:
        chosen = [item for item in free if _wanted(item, args)]
    if args.max_size is not None:
        gone = {item.id for item in chosen}
        left = [item for item in found if item.id not in gone]
        excess = sum(item.entry.size_bytes for item in left) - args.max_size
        chosen += _idle_longest((item for item in left if not item.entry.pinned), excess)
    return removed(path, chosen, ask=not args.yes, dry_run=args.dry_run, as_json=args.json)


def _wanted(item: Listed, args: argparse.Namespace) -> bool:
    return (item.orphan or not args.orphans) and all(holds(item) for holds in args.filters)


def _idle_longest(items: Iterable[Listed], excess: int) -> list[Listed]:
    """The entries whose last use is longest ago, until so many bytes are gone."""
    gone: list[Listed] = []
    for item in sorted(items, key=lambda item: item.entry.used_s):
        if excess <= 0:
            break
        gone.append(item)
        excess -= item.entry.size_bytes
    return gone
