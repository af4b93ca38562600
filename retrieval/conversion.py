"""Turns files into Markdown, one after the other: a program of its own, which :mod:`ragkv.retrieval.converter` starts.

It imports nothing of ragkv, so that it starts at once, and what a file needs only when such a file comes. For each file stdin has a
line of JSON (``kind``, ``bytes``: how many follow, ``seconds`` and ``unpacked_bytes``: limits) and the file, stdout a line of JSON:
``pages``, a text each; or ``error``, why there are none.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, time
from typing import Any, BinaryIO, NoReturn

# Parts of a web page that are none of its text.
_NOISE = ("script", "style", "noscript", "template", "nav", "footer", "svg", "iframe", "button", "select")
# Of markdownify: no links' targets, no pictures, and names_like_this as they are.
_PLAIN: dict[str, Any] = {"strip": ["a", "img"], "escape_underscores": False, "escape_asterisks": False}
_ZIPPED = ("docx", "pptx", "xlsx", "epub")
# What a file of Microsoft Office begins with that is encrypted, or older than 2007.
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Refused(Exception):
    """Why a file is not converted."""


def pages(kind: str, data: bytes, unpacked_bytes: int) -> list[str]:
    """The text of a file, page by page; one page where it has none.

    Raises:
        Refused: the message is the reason.
    """
    try:
        if kind in _ZIPPED:
            _check_archive(data, unpacked_bytes)
        texts = _KINDS[kind](data)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # a parser of hostile bytes raises nearly anything, RecursionError included
        raise Refused(f"{_damaged(kind)} ({_first_line(error)})") from error
    return [_clean(text) for text in ([texts] if isinstance(texts, str) else texts)]


def _damaged(kind: str) -> str:
    name = kind.upper()
    return (
        f"damaged or cut short, or no {name} at all: see whether another program opens it, and save or fetch it again"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def table(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as a table of Markdown, the first of them its head; blank rows and columns behind the last cell are left out."""
    cells = [[_cell(value) for value in row] for row in rows]
    cells = [row for row in cells if any(row)]
    width = max((max(at for at, cell in enumerate(row, 1) if cell) for row in cells), default=0)
    lines = [f"| {' | '.join((row + [''] * width)[:width])} |" for row in cells]
    return "\n".join([*lines[:1], "|" + " --- |" * width, *lines[1:]]) if lines else ""


def _check_archive(data: bytes, most: int) -> None:
    """zipfile unpacks no more of an entry than is declared, so what is declared can be believed."""
    from zipfile import ZipFile

    if data.startswith(_OLE):
        raise Refused("encrypted, or of an old format: save a copy as .docx, .pptx or .xlsx without a password")
    with ZipFile(io.BytesIO(data)) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > most:
        raise Refused(f"too large: unpacked it has {size} bytes, at most {most}")


def _clean(text: str) -> str:
    """Line ends as in Python, no zeros, and no half surrogate pairs, which broken fonts leave and no encoder takes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime) and value.time() == time():
        value = value.date()
    return " ".join(str(value).split()).replace("|", "\\|")


def _pdf(data: bytes) -> list[str]:
    import pypdf

    reader = pypdf.PdfReader(io.BytesIO(data))
    # Many files are encrypted with the empty password, only to forbid printing.
    if reader.is_encrypted and not reader.decrypt(""):
        raise Refused("encrypted: save a copy without a password")
    return [page.extract_text() for page in reader.pages]


def _html(data: bytes) -> str:
    """By markdownify, as markitdown does it, without what is no text of the page."""
    from bs4 import BeautifulSoup
    from markdownify import ATX, MarkdownConverter

    soup = BeautifulSoup(data.decode(), "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for part in soup(["title", *_NOISE]):
        part.decompose()
    for image in soup("img"):
        image.replace_with(str(image.get("alt") or ""))
    body = soup.find("main") or soup
    try:
        text = MarkdownConverter(heading_style=ATX, **_PLAIN).convert_soup(body).strip()
    except RecursionError:  # thousands of tags, one inside the other
        text = body.get_text("\n", strip=True)
    return f"# {title}\n\n{text}" if title and not body.find("h1") else text


def _markitdown(name: str) -> Callable[[bytes], str]:
    """By a converter of markitdown, called by its name: nothing guesses types, fetches anything or asks a model."""

    def convert(data: bytes) -> str:
        from markitdown import StreamInfo, converters

        info = StreamInfo(charset="utf-8")
        return getattr(converters, name)().convert(io.BytesIO(data), info, **_PLAIN).markdown

    return convert


def _pptx(data: bytes) -> list[str]:
    import re

    text = _markitdown("PptxConverter")(data)
    return re.split(r"<!-- Slide number: \d+ -->\n?", text)[1:]


def _xlsx(data: bytes) -> str:
    """By openpyxl alone: markitdown's way through pandas shows 31 as 31.0 and empty cells as NaN."""
    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True)
    sheets = []
    for sheet in book.worksheets:
        sheet.reset_dimensions()  # what some programs say of them is wrong, and cells would be left out
        sheets.append((sheet.title, table(sheet.iter_rows(values_only=True))))
    return "\n\n".join(f"## {title}\n\n{cells}" for title, cells in sheets if cells)


def _csv(data: bytes) -> str:
    import csv

    text = data.decode()
    csv.field_size_limit(len(text) + 1)
    try:
        delimiter = csv.Sniffer().sniff(text[:8192], ",;\t|").delimiter
    except csv.Error:  # one column
        delimiter = ","
    return table(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


def _json(data: bytes) -> str:
    """Laid out in lines, escapes as the letters that they stand for; what is no JSON, as it is."""
    try:
        return json.dumps(json.loads(data), ensure_ascii=False, indent=1)
    except (ValueError, RecursionError):
        return data.decode()


def _mail(data: bytes) -> str:
    import email
    import email.policy

    message = email.message_from_bytes(data, policy=email.policy.default)
    body = message.get_body(("plain", "html"))
    text = body.get_content() if body else ""
    if body and body.get_content_subtype() == "html":
        text = _html(text.encode("utf-8", "replace"))
    names = [name for name in ("From", "To", "Cc", "Date") if message[name]]
    head = "\n".join(f"{name}: {message[name]}" for name in names)
    return "\n\n".join(filter(None, (message["Subject"] and f"# {message['Subject']}", head, text)))


_KINDS: dict[str, Callable[[bytes], str | list[str]]] = {
    "pdf": _pdf,
    "html": _html,
    "docx": _markitdown("DocxConverter"),
    "pptx": _pptx,
    "xlsx": _xlsx,
    "epub": _markitdown("EpubConverter"),
    "ipynb": _markitdown("IpynbConverter"),
    "feed": _markitdown("RssConverter"),
    "msg": _markitdown("OutlookMsgConverter"),
    "mail": _mail,
    "csv": _csv,
    "json": _json,
}


def _limit_time(seconds: float) -> None:
    """Processor time, in case that whoever would stop this process is gone: more than is given by the clock."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit_memory(most: int) -> None:
    with suppress(ImportError, ValueError, OSError):  # no such limits on this system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _serve(given: BinaryIO, answers: BinaryIO) -> None:
    for line in given:
        asked = json.loads(line)
        data = given.read(asked["bytes"])
        _limit_time(asked["seconds"])
        try:
            answer: dict[str, Any] = {"pages": pages(asked["kind"], data, asked["unpacked_bytes"])}
        except Refused as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        answers.flush()


def main(memory_bytes: int) -> NoReturn:
    """Convert until stdin ends. With :data:`NO_MEMORY` as its code the process ends where a file takes too much of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits for us
    _limit_memory(memory_bytes)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a parser prints is no answer
    try:
        _serve(sys.stdin.buffer, answers)
    except MemoryError:
        os._exit(NO_MEMORY)
    os._exit(0)


#: The code of a process that had no memory left.
NO_MEMORY = 77

if __name__ == "__main__":
    main(int(sys.argv[1]))
