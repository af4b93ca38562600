"""Files that are not text, as Markdown: converted in a process of its own, which may hang, explode or die without harm.

Nobody can say what a parser does with the bytes of strangers. The process has limits of time, memory and unpacked size; where a
file breaks one, it is ended, the file is named, and the next file gets a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Timer, get_ident
from typing import Any, NamedTuple

from ragkv.chunk import digest
from ragkv.errors import DocumentError, MissingPackageError
from ragkv.retrieval import conversion
from ragkv.retrieval.encodings import decoded

#: Seconds that a file may take.
TIME_LIMIT_S = 300.0
#: Memory that the process may have, where the system knows such limits.
MEMORY_LIMIT_BYTES = 4 << 30
#: What the parts of a zipped file (DOCX, PPTX, XLSX, EPUB) may have together.
UNPACKED_LIMIT_BYTES = 1 << 30


class _Kind(NamedTuple):
    """How files of some endings are converted.

    Attributes:
        name: see :mod:`ragkv.retrieval.conversion`.
        extra: what has to be installed with ragkv for it.
        packages: that come with it and are needed.
        text: it is a text file, whose encoding is ours to find out.
        numbered: it has pages.
        markdown: what comes out has headings of Markdown.
    """

    name: str
    extra: str = "files"
    packages: tuple[str, ...] = ("markitdown",)
    text: bool = False
    numbered: bool = False
    markdown: bool = True


_HTML = _Kind("html", packages=("bs4", "markdownify"), text=True)
_KINDS = {
    ".pdf": _Kind("pdf", "pdf", ("pypdf",), numbered=True, markdown=False),
    ".html": _HTML,
    ".htm": _HTML,
    ".xhtml": _HTML,
    ".docx": _Kind("docx", packages=("markitdown", "mammoth")),
    ".pptx": _Kind("pptx", packages=("markitdown", "pptx"), numbered=True),
    ".xlsx": _Kind("xlsx", packages=("openpyxl",)),
    ".xlsm": _Kind("xlsx", packages=("openpyxl",)),
    ".epub": _Kind("epub"),
    ".ipynb": _Kind("ipynb", text=True),
    ".rss": _Kind("feed"),
    ".atom": _Kind("feed"),
    ".msg": _Kind("msg", packages=("markitdown", "olefile")),
    ".eml": _Kind("mail", packages=("bs4", "markdownify")),
    ".csv": _Kind("csv", packages=(), text=True, markdown=False),
    ".tsv": _Kind("csv", packages=(), text=True, markdown=False),
    ".json": _Kind("json", packages=(), text=True, markdown=False),
}


#: Packages that are not installed by the name by which they are imported.
_DISTRIBUTIONS = {"bs4": "beautifulsoup4", "pptx": "python-pptx"}


class Converted(NamedTuple):
    """A file as text.

    Attributes:
        pages: its text, page by page; one page where it has none.
        numbered: it has pages, numbered from 1.
        markdown: its headings are those of Markdown.
    """

    pages: list[str]
    numbered: bool
    markdown: bool


def converts(path: Path) -> bool:
    """Whether files of this name are no text and have to be converted."""
    return path.suffix.lower() in _KINDS


def fingerprint(path: Path, data: bytes, encoding: str | None) -> str:
    """Digest of a file's bytes, and of whatever else its text hangs on: its kind, the encoding, versions of what reads it."""
    kind = _KINDS.get(path.suffix.lower())
    packages = ("ragkv", "charset-normalizer", *(kind.packages if kind else ()))
    return digest(path.suffix.lower(), encoding or "", *map(_version, packages), sha256(data).digest()).hex()


@cache
def _version(package: str) -> str:
    try:
        return version(_DISTRIBUTIONS.get(package, package))
    except PackageNotFoundError:
        return ""


class Converter:
    """Converts files one after the other; its process begins with the first one and ends with :meth:`close`.

    Args:
        kept: a folder where converted files are kept, so that they need not be converted again after Ctrl-C; ``None``: nowhere.
    """

    def __init__(self, kept: Path | None = None) -> None:
        self._kept = kept
        self._process: subprocess.Popen[bytes] | None = None

    def convert(self, path: Path, data: bytes, encoding: str | None = None) -> Converted:
        """A file's text.

        Args:
            path: what it is called; the ending says what it is.
            data: all of it.
            encoding: of a text file, as HTML or CSV; ``None``: it is found out.

        Raises:
            DocumentError: it cannot be read, or not within the limits; the message is the reason.
            MissingPackageError: what reads it is not installed; the message names the command that installs it.
        """
        kind = _KINDS[path.suffix.lower()]
        if not all(map(find_spec, kind.packages)):
            raise MissingPackageError(
                f"reading {path.suffix.lower()} files needs more: pip install 'ragkv[{kind.extra}]'"
            )
        if not data:
            raise DocumentError("empty")
        name = fingerprint(path, data, encoding)
        pages = self._pages(name)
        if pages is None:
            if kind.text:
                data = decoded(data, encoding, markup=kind is _HTML).encode("utf-8", "replace")
            answer = self._asked(kind.name, data)
            if "error" in answer:
                raise DocumentError(answer["error"])
            pages = answer["pages"]
            self._keep(name, pages)
        return Converted(pages, kind.numbered, kind.markdown)

    def _pages(self, name: str) -> list[str] | None:
        """What is kept of a file; ``None`` where that is nothing, or damaged."""
        try:
            return json.loads((self._kept / name).read_bytes()) if self._kept else None
        except (OSError, ValueError):
            return None

    def _keep(self, name: str, pages: list[str]) -> None:
        if self._kept is not None:
            beside = self._kept / f"{name}.{os.getpid()}.{get_ident()}"
            with suppress(OSError):  # where the disk is full, it is converted again
                self._kept.mkdir(exist_ok=True)
                beside.write_text(json.dumps(pages), encoding="ascii")
                beside.replace(self._kept / name)

    def _asked(self, kind: str, data: bytes) -> dict[str, Any]:
        process = self._process = self._process or _started()
        limits = {"seconds": TIME_LIMIT_S, "unpacked_bytes": UNPACKED_LIMIT_BYTES}
        late = Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = Timer(TIME_LIMIT_S, end)
        timer.start()
        try:
            line = _answer(process, json.dumps({"kind": kind, "bytes": len(data), **limits}).encode() + b"\n" + data)
        except BaseException:  # Ctrl-C: what it answers later is no answer to the next file
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if line.endswith(b"\n"):
            if late.is_set():
                self.close()
            return json.loads(line)
        self.close()
        if late.is_set():
            raise DocumentError(f"not converted within {TIME_LIMIT_S:g} s")
        if process.returncode == conversion.NO_MEMORY:
            raise DocumentError(f"not converted within {MEMORY_LIMIT_BYTES >> 20} MiB of memory")
        raise DocumentError(f"the converter broke down at it (exit code {process.returncode})")

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> Converter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """The process's line; less than one where it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""


def _started() -> subprocess.Popen[bytes]:
    """The program as a script, so that it imports nothing of ours; what can be imported here, can be there."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-P", conversion.__file__, str(MEMORY_LIMIT_BYTES)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.Popen(command, env=environment, **pipes)
    except OSError as error:
        raise DocumentError(f"no process for converting files can be started: {error}") from error
