"""What the commands that care for stored KV take. Imports nothing heavy, as :mod:`ragkv.cli.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ragkv.cli import filters
from ragkv.cli.pools import add_key_option
from ragkv.cli.values import parsed

_FILTER_HELP = (
    "only entries for which this holds, as 'size>10MB', 'idle>30d', 'hits<2', 'document=docs/*', 'codec=raw'; may be "
    f"repeated. Fields: {', '.join(filters.FIELDS)}"
)


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Registers ``docs``, ``ls``, ``rm``, ``forget``, ``prune``, ``verify``, ``stats``, ``compact``, ``export`` and ``import``.

    Args:
        command: makes a command's parser from its name, its parents and ``summary=``.
    """
    chosen, removal = _filter(), _removal()
    stats = command("stats", summary="Show what the folder holds and how it was used.")
    page_option(stats, "--html", "write a page with pictures of the store over time")

    listing = command("ls", chosen, summary="List the stored KV, an entry for each passage that was read.")
    listing.add_argument(
        "--sort",
        type=parsed(filters.parse_order),
        metavar="FIELD[:asc|:desc]",
        help="order of the list (default: by document)",
    )
    listing.add_argument("--limit", type=parsed(filters.parse_count), metavar="N", help="show only the first N")
    listing.add_argument("-q", "--quiet", action="store_true", help="print ids only, one a line")

    rm = command(
        "rm", removal, summary="Remove KV by id or by document. Passages are read again when they are asked for."
    )
    rm.add_argument(
        "targets",
        nargs="+",
        metavar="ID|DOCUMENT",
        help="the first digits of an id (at least 4), or documents as for forget",
    )

    command("docs", summary="List the documents, with what their KV take.")

    forget = command("forget", removal, summary="Remove documents, with their passages, vectors and KV.")
    forget.add_argument(
        "targets",
        nargs="+",
        metavar="DOCUMENT",
        help="what a document is called, a path, a folder with all below it, or a pattern as 'docs/*.md'",
    )
    forget.add_argument("--namespace", metavar="NAME", help="whose documents (default: the one kept in the folder)")

    forget.add_argument("--remote", metavar="URL", help="delete their KV in this pool, too, for all that share it")
    add_key_option(forget)

    prune = command(
        "prune",
        chosen,
        removal,
        summary="Remove the KV that a filter, --orphans or --max-size choose; with --remote what nobody needs in a pool.",
    )
    prune.add_argument("--orphans", action="store_true", help="what belongs to no document any more")
    prune.add_argument(
        "--max-size", type=parsed(filters.parse_size), metavar="SIZE", help="what is idle longest, until this is left"
    )
    prune.add_argument(
        "--remote",
        metavar="URL",
        help="in this pool, instead of a folder: KV that no published catalogue names, for all",
    )
    add_key_option(prune)
    age = prune.add_mutually_exclusive_group()
    duration_option(age, "--grace", "of --remote: what was sent since stays (default: 7d)")
    duration_option(age, "--older-than", "of --remote: whatever was sent before goes, also what is named")
    prune.set_defaults(refuse=prune.error)

    verify = command(
        "verify", summary="Read every record and compare every checksum; exit code 1 where something is damaged."
    )
    verify.add_argument("--repair", action="store_true", help="remove what is damaged, so that it is computed anew")

    command("compact", summary="Give free pages back to the disk. Nothing else may use the folder meanwhile.")

    export = command("export", chosen, summary="Write documents, vectors and KV into one file.")
    export.add_argument("file", metavar="FILE")
    _extent(export, "documents, vectors, what models read and KV (the default)", "KV alone")
    export.add_argument("--force", action="store_true", help="replace the file where it is there")

    taking = command("import", summary="Take in a file that 'ragkv export' wrote; nothing is read again.")
    taking.add_argument("file", metavar="FILE")
    _extent(taking, "all that is in the file (the default)", "its KV alone")
    taking.add_argument(
        "--replace", action="store_true", help="take the file's version of a document that is here already"
    )
    taking.add_argument(
        "--disk-size",
        type=parsed(filters.parse_size),
        default="100GiB",
        metavar="SIZE",
        help="budget (default: 100GiB)",
    )


def page_option(parser: argparse.ArgumentParser, name: str, summary: str) -> None:
    """Registers an option that names an HTML file to be written."""
    parser.add_argument(name, dest="page", metavar="FILE", help=f"{summary} (needs ragkv[report,plots])")
    parser.add_argument("--force", action="store_true", help="replace the file where it is there")


def duration_option(options: argparse._ActionsContainer, name: str, summary: str, default: float | None = None) -> None:
    """Registers an option that is a time, in seconds once it is parsed."""
    options.add_argument(name, type=parsed(filters.parse_duration), default=default, metavar="TIME", help=summary)


def _filter() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "-f",
        "--filter",
        dest="filters",
        action="append",
        default=[],
        type=parsed(filters.parse_filter),
        metavar="EXPR",
        help=_FILTER_HELP,
    )
    return options


def _extent(parser: argparse.ArgumentParser, everything: str, alone: str) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--all", action="store_false", dest="kv_only", default=False, help=everything)
    either.add_argument("--kv-only", action="store_true", help=alone)


def _removal() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("-y", "--yes", action="store_true", help="do not ask")
    options.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")
    return options
