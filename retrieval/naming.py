"""What people mean by a document's name: as it is called, a path, a folder, or a pattern."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from ragkv.errors import DocumentError

_NEAR = 3


def matching(sources: Iterable[str], target: str | os.PathLike[str]) -> list[str]:
    """The documents that are meant: the one that is called so, or else all below a folder, or all that a pattern holds for.

    Args:
        sources: what there is.
        target: a name, a path from the working folder on, or a pattern with ``*``, ``?`` and ``[...]`` of either; ``*`` stands for
            any characters, ``/`` among them.

    Returns:
        Sources, in their order; none where nothing is meant.

    Raises:
        DocumentError: the target is no text.
    """
    known, name = list(sources), named(target)
    if not name.strip():
        return []
    exact = _called(known, name)
    if exact:
        return [exact]
    inside = [source for source in known if any(below(source, path) for path in _paths(name))]
    if inside or not has_magic(name):
        return inside
    patterns = (name, os.path.join(escape(os.getcwd()), os.path.expanduser(name)))
    return [source for source in known if any(fnmatchcase(source, pattern) for pattern in patterns)]


def only(sources: Sequence[str], target: str | os.PathLike[str], where: str) -> str:
    """The one document that a name or path means.

    Raises:
        DocumentError: there is none; those with a like name are named, and where they are listed.
    """
    name = named(target)
    exact = _called(sources, name)
    if exact is None:
        raise DocumentError(unknown(sources, name, where))
    return exact


def _called(sources: Sequence[str], name: str) -> str | None:
    """The document of just this name, or of the file that it leads to."""
    return next((way for way in (name, *_paths(name)) if way in sources), None)


def unknown(sources: Iterable[str], target: str, where: str) -> str:
    """What to say where no document is meant.

    Args:
        sources: what there is.
        target: what was asked for.
        where: what lists the documents.
    """
    near = nearest(sources, target)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"no document is called {target!r}: {hint}{where} lists them"


def nearest(sources: Iterable[str], target: str) -> list[str]:
    """Documents that are called much like it, those of the same file name first; 3 at most."""
    known = sorted(sources)
    last = Path(target).name.lower()
    same = [source for source in known if Path(source).name.lower() == last]
    by_name = {Path(source).name.lower(): source for source in reversed(known)}
    like = [by_name[name] for name in get_close_matches(last, by_name, _NEAR)]
    return list(dict.fromkeys([*same, *like]))[:_NEAR]


def below(source: str, folder: str) -> bool:
    """Whether a document's file lies somewhere in a folder."""
    return source.startswith(folder.rstrip(os.sep) + os.sep)


def gone(source: str) -> bool:
    """Whether the file that a document was read from is not there any more: it is deleted or moved, or a link stands in its place.

    A file that cannot be looked at, on a disk that fails say, is not gone. A name like ``/wiki/Tar``, of which nothing is on the
    disk, was no file.
    """
    if not os.path.isabs(source) or not os.path.exists(os.path.join(*Path(source).parts[:2])):
        return False
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return os.path.isdir(source) or os.path.realpath(source) != source


def named(target: Any) -> str:
    """A document's name as text.

    Raises:
        DocumentError: it is none.
    """
    if not isinstance(target, str | os.PathLike):
        raise DocumentError(f"a document is named by a str or a path, got {target!r:.80}")
    return os.fspath(target)


def _paths(name: str) -> tuple[str, str]:
    """The absolute path, and the one behind all links; the name itself where no file can be called so."""
    try:
        path = os.path.abspath(os.path.expanduser(name))
        return path, os.path.realpath(path)
    except ValueError:  # a zero in it, or half a surrogate pair
        return name, name
