"""``ragkv export`` and ``ragkv import``: KV in one file, to another folder or machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import listed, store_folder
from ragkv.errors import RagKVError
from ragkv.store.exchange import Progress, export, import_records


def run(args: argparse.Namespace) -> int:
    """Write or read the file."""
    path, file = folder(args), Path(args.file).expanduser()
    with show.progress(unit=" records") as bar:
        if args.command == "export":
            count = _export(path, file, args, lambda done: bar.update())
        else:
            place = store_folder(path) if (path / "data.mdb").is_file() else path / "kv"
            count = import_records(place, file, disk_bytes=args.disk_size, progress=lambda done: bar.update())
    size = file.stat().st_size
    if args.json:
        show.as_json({"path": str(path), "file": str(file), "records": count, "bytes": size})
    elif args.command == "export":
        print(f"{show.number(count, 'record')} written to {file}, {show.size(size)}")
    else:
        print(f"{show.number(count, 'record')} taken in from {file}, {show.size(size)}")
    return 0


def _export(path: Path, file: Path, args: argparse.Namespace, progress: Progress) -> int:
    if file.exists() and not args.force:
        raise RagKVError(f"{file} is there already: --force replaces it")
    place = store_folder(path)
    if not args.filters:
        return export(place, file, progress=progress)
    chosen = {item.entry.key for item in listed(path) if all(holds(item) for holds in args.filters)}
    return export(place, file, wanted=chosen.__contains__, progress=progress)
