"""Bytes as text: by a byte order mark, by the encoding that was named, as UTF-8, or by what charset-normalizer takes them for."""

from __future__ import annotations

import codecs
import re
from encodings.aliases import aliases

from ragkv.errors import ArgumentError, DocumentError, instance

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Most of those that browsers know (https://encoding.spec.whatwg.org): among more, short texts are taken for others too often.
_DETECTED = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256"),
    *("iso8859_2", "iso8859_5", "koi8_r", "cp874"),
    *("cp932", "euc_jp", "iso2022_jp", "gb18030", "big5", "cp949", "euc_kr", "utf_16_le", "utf_16_be"),
]
# Languages that Windows-1252 has not the letters of, in which it is sometimes taken for likeliest all the same.
_CENTRAL_EUROPEAN = ("Croatian", "Czech", "Hungarian", "Polish", "Romanian", "Slovak", "Slovene")
# What a file says of itself in its first kilobyte: a page's <meta>, the first line of XML.
_DECLARED = re.compile(rb"""<(?:meta\b|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?([\w.:-]+)""", re.IGNORECASE)
# Fewer bytes with a zero among them are hardly text.
_LEAST_WITH_ZERO = 16


def checked_encoding(name: str | None) -> str | None:
    """The encoding that was named.

    Raises:
        ArgumentTypeError: it is no name.
        ArgumentError: Python knows none of this name; the message lists those that it knows.
    """
    instance("encoding", name, str | None, "the name of an encoding as 'cp1252', or None to find it out")
    if name is None or _known(name):
        return name
    known = ", ".join(sorted(filter(_known, {*aliases.values(), "utf_8_sig"})))
    raise ArgumentError(f"encoding must be one that Python knows, got {name!r:.80}; it knows {known}")


def decoded(data: bytes, encoding: str | None = None, *, markup: bool = False) -> str:
    """The text of a file.

    Args:
        data: all of it.
        encoding: of bytes without a byte order mark; ``None``: UTF-8 if they are, else the one that they are found to be in.
        markup: an encoding that the file itself names counts before one that is found out.

    Raises:
        DocumentError: it is binary, is not in this encoding, or there is no telling in which; the message is the reason.
    """
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), encoding)
    declared = _DECLARED.search(data, 0, 1024) if markup else None
    text = _strict(data, marked or "utf-8", named=marked is not None)
    if text is None and declared and _known(declared[1].decode()):
        text = _strict(data, declared[1].decode())
    if text is None or ("\0" in text and marked is None):  # UTF-16 may pass for UTF-8
        text = _detected(data)
    if "\0" in text:
        raise DocumentError("binary")
    return text


def _known(name: str) -> bool:
    try:
        return codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):  # ValueError: a zero in the name
        return False


def _strict(data: bytes, encoding: str, named: bool = False) -> str | None:
    """The text in this encoding; ``None`` where it is none, which for one that was named is an error."""
    try:
        return data.decode(encoding)
    except UnicodeError as error:
        if not named:
            return None
        if b"\0" in data[:8192]:
            raise DocumentError("binary") from error
        at = f"byte {error.start} ({error.reason})" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DocumentError(f"not {encoding}: {at}") from error


def _detected(data: bytes) -> str:
    """The text in the likeliest encoding; Windows-1252, as browsers take it, where no other is likelier."""
    if b"\0" in data and len(data) < _LEAST_WITH_ZERO:
        raise DocumentError("binary")
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        if b"\0" in data[:8192]:
            raise DocumentError("binary") from error
        raise DocumentError(
            "not UTF-8: name its encoding (encoding=, --encoding), or have it found out: pip install 'ragkv[files]'"
        ) from error
    matches = from_bytes(data, cp_isolation=_DETECTED)
    best = matches.best()
    if best is None and b"\0" in data:
        raise DocumentError("binary")
    if best is None:
        raise DocumentError("binary, or in an encoding that is not found out: name it (encoding=, --encoding)")
    if best.encoding == "cp1252" and best.language in _CENTRAL_EUROPEAN:
        return str(next((match for match in matches if match.encoding == "cp1250"), best))
    western = any(
        "cp1252" in match.could_be_from_charset and match.coherence >= best.coherence and match.chaos <= best.chaos
        for match in matches
    )
    text = _strict(data, "cp1252") if western else None
    return str(best) if text is None else text
