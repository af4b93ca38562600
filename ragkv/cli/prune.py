"""``ragkv prune``: KV that is old, idle, large or nobody's goes, from a folder or from a pool."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import Listed, listed, removed
from ragkv.cli.pools import opened_pool
from ragkv.errors import PublicationError, RagKVError

if TYPE_CHECKING:
    from ragkv.store import RemoteTier
    from ragkv.store.remote.pruning import Pruned


def run(args: argparse.Namespace) -> int:
    """Remove what every given filter holds for and, by ``--max-size``, what is idle longest of the rest; or prune a pool."""
    pool = opened_pool(args)
    if pool is not None:
        return _prune_pool(args, pool)
    if args.grace is not None or args.older_than is not None:
        args.refuse("--grace and --older-than are of --remote URL; in a folder say --filter 'age>30d'")
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


def _prune_pool(args: argparse.Namespace, pool: RemoteTier) -> int:
    """Delete in a pool what nobody needs any more, or what is old."""
    if args.filters or args.orphans or args.max_size is not None:
        args.refuse("--remote prunes a pool, and takes --grace or --older-than; the others are of a folder")
    ages = {"grace_s": args.grace, "older_than_s": args.older_than}
    given = {name: age for name, age in ages.items() if age is not None}
    with closing(pool):

        def pruned(dry_run: bool) -> Pruned:
            with show.progress(unit=" objects") as bar:
                return pool.prune(**given, dry_run=dry_run, progress=bar.update)

        try:
            done = pruned(args.dry_run or not args.yes)
            if done.objects and not args.dry_run and not args.yes:
                if not show.confirmed(f"Delete {_amount(done)} in {pool.publications.place}, for all that share it?"):
                    show.hint("ragkv: nothing was deleted; --yes deletes without asking")
                    return 1
                done = pruned(False)
        except PublicationError as error:
            raise RagKVError(f"{error}; --older-than TIME goes by age alone") from error
    if args.json:
        said = {"pool": pool.publications.place, "dry_run": args.dry_run, "bytes": done.size_bytes}
        show.as_json(said | {name: getattr(done, name) for name in ("objects", "needed", "young", "unreadable")})
        return 0
    print(
        f"{'would delete' if args.dry_run else 'deleted'} {_amount(done)}; {done.needed:,} needed, {done.young:,} young"
    )
    if done.unreadable:
        show.hint(
            f"{show.number(done.unreadable, 'object')} left that cannot be read: damaged, encrypted with another key, or refused"
        )
    return 0


def _amount(done: Pruned) -> str:
    return f"{show.number(done.objects, 'object')}, {show.size(done.size_bytes)}"


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
