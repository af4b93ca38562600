"""Files and folders as text: plain text and Markdown as they are, anything else through a converter.

One bad file among many is named and skipped with its reason; the rest goes on.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.errors import DocumentError, MissingPackageError, whole_number
from ragkv.folder.filesystem import impossible
from ragkv.retrieval.converter import Converter, converts
from ragkv.retrieval.encodings import checked_encoding, decoded
from ragkv.retrieval.outline import NO_OUTLINE, Outline, joined, sections

# What begins as no text does: what it is, and what to do.
_NO_TEXT = (
    (
        re.compile(
            rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|PK\x03\x04.{26}(\[Content_Types\]|mimetypeapplication/vnd\.oasis)|{\\rtf",
            re.S,
        ),
        "of an Office format that is not read: save a copy as .docx, .xlsx, .pptx or .pdf",
    ),
    (
        re.compile(
            rb"PK[\x03\x05\x07]|\x1f\x8b|BZh\d1AY|\xfd7zXZ\0|7z\xbc\xaf|Rar!\x1a|\x28\xb5\x2f\xfd|.{257}ustar", re.S
        ),
        "an archive: unpack it, and add the folder",
    ),
)
_LARGEST = 256 << 20
_MARKDOWN = (".md", ".markdown", ".mdown", ".mdx", ".qmd", ".rmd")


@dataclass(frozen=True)
class LoadedFile:
    """A file that could be read.

    Attributes:
        source: its absolute path behind all links, so that a file has one name however it is reached.
        text: its text, line ends as ``\\n``; never blank.
        outline: where its pages and sections begin.
    """

    source: str
    text: str
    outline: Outline = NO_OUTLINE


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that could not be read.

    Attributes:
        source: its absolute path.
        reason: why, in one line.
    """

    source: str
    reason: str


def load_files(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    encoding: str | None = None,
    max_bytes: int = _LARGEST,
) -> Iterator[LoadedFile | SkippedFile]:
    """Reads files, and folders with all that is in them, one after the other in a fixed order.

    In a folder, names are sorted, hidden files and folders (``.name``) are passed over, and links to folders are not
    followed. A hidden file that is named itself is read. A file that is reached twice is yielded once.

    Args:
        paths: a path or many, of files and folders, read in the order given.
        encoding: of text files (HTML, CSV and JSON among them) without a byte order mark; ``None``: UTF-8 where they are, else
            it is found out.
        max_bytes: a larger file is skipped.

    Yields:
        a :class:`LoadedFile` or a :class:`SkippedFile` for every file.

    Raises:
        DocumentError: something else than paths was given.
        ArgumentError: Python knows no encoding of this name.
    """
    checked_encoding(encoding)
    whole_number("max_bytes", max_bytes)
    with Converter() as converter:
        for found in found_files(paths):
            yield found if isinstance(found, SkippedFile) else load(found, converter, encoding, max_bytes)


def found_files(paths: Any) -> list[str | SkippedFile]:
    """The files that :func:`load_files` reads, as they are reached, each once; and folders that cannot be listed."""
    entries = (entry for path in listed_paths(paths) for entry in _walk(os.path.abspath(path)))
    found: dict[str, str | SkippedFile] = {}
    for entry in entries:
        found.setdefault(os.path.realpath(entry if isinstance(entry, str) else entry.source), entry)
    return list(found.values())


def hidden_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> int:
    """How many hidden files and folders :func:`load_files` passes over in folders."""
    named, found = {os.path.realpath(path) for path in listed_paths(paths)}, set[str]()
    for folder, folders, files in (step for path in named for step in os.walk(path)):
        found.update(os.path.join(folder, name) for name in (*folders, *files) if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
    return len(found - named)


def load(path: str, converter: Converter, encoding: str | None, max_bytes: int = _LARGEST) -> LoadedFile | SkippedFile:
    """One file; see :func:`load_files`."""
    try:
        text, outline = text_of(Path(path), file_bytes(path, max_bytes), converter, encoding)
    except (DocumentError, MissingPackageError) as error:
        return SkippedFile(path, str(error))
    return LoadedFile(os.path.realpath(path), text, outline)


def read_file(path: str | os.PathLike[str], *, encoding: str | None = None, max_bytes: int = _LARGEST) -> str:
    """The text of one file.

    Args:
        path: the file. Its ending says what it is; one that is not known is read as text.
        encoding: see :func:`load_files`.
        max_bytes: a larger file is refused.

    Returns:
        the text, never blank. Line ends are ``\\n``; pages are joined by a blank line.

    Raises:
        DocumentError: the file cannot be read as text; the message is the reason.
        MissingPackageError: what reads it is not installed; the message names the command that installs it.
        ArgumentError: Python knows no encoding of this name.
    """
    checked_encoding(encoding)
    whole_number("max_bytes", max_bytes)
    (name,) = listed_paths([path])
    with Converter() as converter:
        return text_of(Path(name), file_bytes(name, max_bytes), converter, encoding)[0]


def text_of(path: Path, data: bytes, converter: Converter, encoding: str | None) -> tuple[str, Outline]:
    """The text of a file, and where its pages and sections begin; see :func:`read_file`."""
    if converts(path):
        converted = converter.convert(path, data, encoding)
        text, starts = joined(converted.pages)
        pages, markdown = starts if converted.numbered else (), converted.markdown
    else:
        for begins, reason in _NO_TEXT:
            if begins.match(data):
                raise DocumentError(reason)
        text = decoded(data, encoding).replace("\r\n", "\n").replace("\r", "\n")
        pages, markdown = (), path.suffix.lower() in _MARKDOWN
    if not text.strip():
        raise DocumentError("no text in it (a scan needs OCR first)" if pages else "empty")
    return text, Outline(pages, sections(text) if markdown else ())


def listed_paths(paths: Any) -> list[str]:
    """A path, or paths, as a list; ``~`` is the home folder.

    Raises:
        DocumentError: something else was given.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else list(paths)
    for path in listed:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise DocumentError(f"paths must be paths of files and folders, each a str or a path; got {path!r:.80}")
        if impossible(path):
            raise DocumentError(f"a path with a zero or half a surrogate pair in it is no name of a file: {path!r:.80}")
    return [os.path.expanduser(os.fspath(path)) for path in listed]


def _walk(path: str) -> Iterator[str | SkippedFile]:
    """The files of a folder in a fixed order, or the path itself; what cannot be listed as skipped."""
    if not os.path.isdir(path):
        yield path
        return
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        yield SkippedFile(path, f"the folder cannot be listed: {error.strerror}")
        return
    for name in names:
        inner = os.path.join(path, name)
        if not (os.path.isdir(inner) and os.path.islink(inner)):
            yield from _walk(inner)


def file_bytes(path: str | os.PathLike[str], max_bytes: int = _LARGEST) -> bytes:
    """A whole file.

    Raises:
        DocumentError: it cannot be read, or is larger.
    """
    path = Path(path)
    try:
        status = path.stat()
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(status.st_mode):
            raise DocumentError("not a regular file")
        if status.st_size > max_bytes:
            raise DocumentError(f"too large: {status.st_size} bytes, at most {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror or error}") from error
