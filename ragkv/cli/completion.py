"""``ragkv completion``: a script that lets a shell complete commands and options with the tabulator."""

from __future__ import annotations

import argparse

from ragkv.cli.arguments import parser
from ragkv.errors import MissingPackageError


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise MissingPackageError("completion needs shtab: pip install 'ragkv[completion]'") from error
    print(shtab.complete(parser(), args.shell))
    return 0
