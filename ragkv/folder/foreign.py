"""What a file is that was taken for one of ours."""

from __future__ import annotations

# How files begin that people may take for an archive.
_OTHERS = {
    b"PK\x03\x04": "a zip file",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"%PDF": "a PDF file",
}


def what_it_is(begin: bytes) -> str:
    """What a file is that is no tar archive, as far as its first bytes show it."""
    known = next((what for mark, what in _OTHERS.items() if begin.startswith(mark)), None)
    if known or not begin:
        return f"it is {known or 'empty'}"
    try:
        text = begin.decode()
    except UnicodeDecodeError as error:
        text = begin[: error.start].decode() if error.start > len(begin) - 4 else ""
    if text and "\0" not in text:
        return f"it is a text that begins with {text[:40]!r}"
    return "it is no tar file"
