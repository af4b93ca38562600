"""Pages that commands write: one file each, with its pictures in it, no network and no script."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkv.cli import show
from ragkv.errors import RagKVError
from ragkv.pictures import need_matplotlib, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check(args: argparse.Namespace) -> None:
    """Says before anything is done that the page of ``args`` cannot be written; fine where none is asked for.

    Raises:
        RagKVError: the file is there and is not to be replaced, its folder is not there, or ``--force`` has no file.
        MissingPackageError: jinja2 or matplotlib is not installed.
    """
    if args.page is None:
        if args.force:
            raise RagKVError("--force replaces a page, and no file for one was named")
        return
    from ragkv.evaluation.report.page import templates

    file = _file(args)
    if file.is_dir() or not file.parent.is_dir():
        raise RagKVError(f"{file} cannot be written: it must name a file in a folder that is there")
    if file.exists() and not args.force:
        raise RagKVError(f"{file} is there already: --force replaces it")
    templates(__package__)
    need_matplotlib()


def write(args: argparse.Namespace, template: str, title: str, picture: Figure | None, **values: Any) -> None:
    """Write the page of ``args`` from a template, which is given a picture as ``picture`` and functions of :mod:`show`."""
    from ragkv.evaluation.report.page import templates

    drawn = None if picture is None else svg(picture, title)
    text = templates(__package__).get_template(template).render(picture=drawn, show=show, **values)
    file = _file(args)
    file.write_text(text, "utf-8", errors="replace")  # a file's name need not be Unicode
    show.hint(f"written to {show.plain(str(file))}")


def _file(args: argparse.Namespace) -> Path:
    return Path(args.page).expanduser()
