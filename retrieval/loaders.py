"""Files and folders as text: plain text and Markdown as they are, PDF through pypdf.

One bad file among many is named and skipped with its reason; the rest goes on.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.errors import DocumentError, MissingPackageError

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class LoadedFile:
    """A file that could be read.

    Attributes:
        source: its absolute path behind all links, so that a file has one name however it is reached.
        text: its text, line ends as ``\\n``; never blank.
    """

    source: str
    text: str


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
    encoding: str = "utf-8",
    max_bytes: int = 256 << 20,
) -> Iterator[LoadedFile | SkippedFile]:
    """Reads files, and folders with all that is in them, one after the other in a fixed order.

    In a folder, names are sorted, hidden files and folders (``.name``) are passed over, and links to folders are not
    followed. A hidden file that is named itself is read. A file that is reached twice is yielded once.

    Args:
        paths: a path or many, of files and folders, read in the order given.
        encoding: of text files without a byte order mark. Nothing is guessed: a wrong guess is wrong text.
        max_bytes: a larger file is skipped.

    Yields:
        a :class:`LoadedFile` or a :class:`SkippedFile` for every file.

    Raises:
        DocumentError: something else than paths was given.
    """
    codecs.lookup(encoding)
    named = listed_paths(paths)
    seen: set[str] = set()
    for found in (entry for path in named for entry in _walk(os.path.abspath(os.fspath(path)))):
        source = found if isinstance(found, str) else found.source
        real = os.path.realpath(source)
        if real in seen:
            continue
        seen.add(real)
        yield _load(found, real, encoding, max_bytes) if isinstance(found, str) else found


def hidden_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> int:
    """How many hidden files and folders :func:`load_files` passes over in folders."""
    named, found = {os.path.realpath(path) for path in listed_paths(paths)}, set[str]()
    for folder, folders, files in (step for path in named for step in os.walk(path)):
        found.update(os.path.join(folder, name) for name in (*folders, *files) if name.startswith("."))
        folders[:] = [name for name in folders if not name.startswith(".")]
    return len(found - named)


def read_file(path: str | os.PathLike[str], *, encoding: str = "utf-8", max_bytes: int = 256 << 20) -> str:
    """The text of one file.

    Args:
        path: a text, Markdown or PDF file. A name that ends in ``.pdf`` is read with pypdf, any other as text.
        encoding: of a text file without a byte order mark.
        max_bytes: a larger file is refused.

    Returns:
        the text, never blank. Line ends are ``\\n``; the pages of a PDF are joined by a blank line.

    Raises:
        DocumentError: the file cannot be read as text; the message is the reason.
        MissingPackageError: the file is a PDF and pypdf is not installed.
    """
    path = Path(path)
    data = _read_bytes(path, max_bytes)
    text = _pdf_text(data) if path.suffix.lower() == ".pdf" else _decoded(data, encoding)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise DocumentError(
            "no text in it (a scanned PDF needs OCR first)" if path.suffix.lower() == ".pdf" else "empty"
        )
    return text


def _load(path: str, real: str, encoding: str, max_bytes: int) -> LoadedFile | SkippedFile:
    try:
        return LoadedFile(real, read_file(path, encoding=encoding, max_bytes=max_bytes))
    except (DocumentError, MissingPackageError) as error:
        return SkippedFile(path, str(error))


def listed_paths(paths: Any) -> list[str | os.PathLike[str]]:
    """A path, or paths, as a list.

    Raises:
        DocumentError: something else was given.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) or not isinstance(paths, Iterable) else list(paths)
    for path in listed:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise DocumentError(f"paths must be paths of files and folders, each a str or a path; got {path!r:.80}")
    return listed


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


def _read_bytes(path: Path, max_bytes: int) -> bytes:
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


def _decoded(data: bytes, encoding: str) -> str:
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(marked or encoding)
    except UnicodeDecodeError as error:
        if b"\0" in data[:8192]:
            raise DocumentError("binary") from error
        raise DocumentError(f"not {marked or encoding}: byte {error.start} ({error.reason})") from error
    if "\0" in text:
        raise DocumentError("binary")
    return text


def _pdf_text(data: bytes) -> str:
    try:
        import pypdf
    except ImportError as error:
        raise MissingPackageError("reading PDF needs pypdf: pip install 'ragkv[pdf]'") from error
    # Python shows what a logger without handlers says; what stops us is the error's, the rest is for whoever asks for it.
    log = logging.getLogger("pypdf")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # Many files are encrypted with the empty password, only to forbid printing.
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError("encrypted: save a copy without a password")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except DocumentError:
        raise
    except Exception as error:  # a parser of hostile bytes raises nearly anything, RecursionError included
        raise DocumentError(f"not a readable PDF: {type(error).__name__}: {error}".splitlines()[0]) from error
    # Broken fonts leave half surrogate pairs, which no encoder and no tokenizer takes.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
