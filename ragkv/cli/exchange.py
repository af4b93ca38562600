"""``ragkv export`` and ``ragkv import``: a folder, or its KV alone, in one file, to another folder or machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import listed, store_folder
from ragkv.errors import RagKVError
from ragkv.exchange import export_folder, import_folder, kv_folder
from ragkv.folder.archive import Exchanged
from ragkv.folder.filesystem import has_data
from ragkv.store.exchange import Progress, export, import_records


def run(args: argparse.Namespace) -> int:
    """Write or read the file; 1 where something of the folder is damaged and is not in it."""
    path, file = folder(args), Path(args.file).expanduser()
    with show.progress(unit=" entries") as bar:
        exchange = _export if args.command == "export" else _import
        done = exchange(path, file, args, lambda done: bar.update())
    size = file.stat().st_size
    if args.json:
        show.as_json({"path": str(path), "file": str(file), **asdict(done), "bytes": size})
        return 1 if done.damaged else 0
    said = "written to" if args.command == "export" else "taken in from"
    amount = show.number(done.records, "record")
    if not args.kv_only:
        amount = f"{show.number(done.documents, 'document')}, {amount}"
    there = [(done.documents_there, "document"), (done.records_there, "record")]
    already = ", ".join(show.number(count, noun) for count, noun in there if count)
    print(f"{amount} {said} {file}, {show.size(size)}{already and f'; already there: {already}'}")
    for source in done.kept:
        show.hint(f"kept {show.short(source)}: another version of it is here, --replace takes the file's")
    if done.useless:
        show.hint(f"left out {show.number(done.useless, 'record')} that no document needs")
    if done.damaged:
        show.hint(f"ragkv: {len(done.damaged):,} damaged and not in the file: 'ragkv verify' says more")
    return 1 if done.damaged else 0


def _export(path: Path, file: Path, args: argparse.Namespace, progress: Progress) -> Exchanged:
    if file.exists() and not args.force:
        raise RagKVError(f"{file} is there already: --force replaces it")
    if args.kv_only or not has_data(path / "documents"):
        place = store_folder(path)
        wanted = _chosen(path, args)[1].__contains__ if args.filters else lambda key: True
        return export(place, file, wanted=wanted, progress=progress)
    if not args.filters:
        return export_folder(path, file, progress=progress)
    sources, keys = _chosen(path, args)
    return export_folder(path, file, sources=sources.__contains__, wanted=keys.__contains__, progress=progress)


def _chosen(path: Path, args: argparse.Namespace) -> tuple[set[str], set[bytes]]:
    """The documents, as a list shows them, and the keys of the entries for which all filters hold."""
    chosen = [item for item in listed(path, passing_over=True) if all(holds(item) for holds in args.filters)]
    if not chosen:
        raise RagKVError(
            f"--filter holds for no entry, and {args.file} was not written: 'ragkv ls' lists them, and takes it too"
        )
    return {source for item in chosen for source, _ in item.places[:1]}, {item.entry.key for item in chosen}


def _import(path: Path, file: Path, args: argparse.Namespace, progress: Progress) -> Exchanged:
    if args.kv_only:
        return import_records(kv_folder(path), file, disk_bytes=args.disk_size, progress=progress)
    return import_folder(path, file, disk_bytes=args.disk_size, replace=args.replace, progress=progress)
