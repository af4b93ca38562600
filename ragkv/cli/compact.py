"""``ragkv compact``: the file of KV without its free pages."""

from __future__ import annotations

import argparse

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import store_folder
from ragkv.store.maintenance import compact


def run(args: argparse.Namespace) -> int:
    """Compact, and say what it gave back."""
    path = folder(args)
    before, after = compact(store_folder(path))
    if args.json:
        show.as_json({"path": str(path), "before_bytes": before, "after_bytes": after})
    else:
        print(f"{show.size(before)} before, {show.size(after)} now")
    return 0
