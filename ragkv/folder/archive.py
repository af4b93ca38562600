"""Records and documents in one file, for another machine to take in: a tar archive of safetensors files.

Any program can read the members once the archive is unpacked; nothing here is ever unpacked to the disk. What is said of a member,
and a checksum, stand in its extended header. The last member counts the others, so that an archive that was cut short is noticed.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ragkv.errors import RagKVError, RecordError, StoreError
from ragkv.folder.foreign import what_it_is

logger: logging.Logger = logging.getLogger(__name__)

Item = TypeVar("Item")

#: KV alone; and documents with their KV, which begins with :data:`BEGIN`.
RECORDS_FORMAT, FOLDER_FORMAT = "ragkv-archive-1", "ragkv-archive-2"

#: The first member of an archive with documents: what they were made with.
BEGIN = "begin.json"

_END = "end.json"
_KINDS = {
    "records": re.compile(r"(?:[0-9a-f]{2}){1,494}\.safetensors"),
    "documents": re.compile(r"documents/[0-9a-f]{64}\.safetensors"),
}
_ABOUT, _SUM = "RAGKV.terms", "RAGKV.xxh3_64"
_NAMED = 20
_LARGEST_NOTE = {BEGIN: 64 << 20, _END: 4096}
#: What reading somebody's bytes may raise.
UNREADABLE = (
    tarfile.TarError,
    struct.error,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    EOFError,
    MemoryError,
    RecursionError,
)


@dataclass
class Exchanged:
    """What was written into an archive, or taken in from one.

    Attributes:
        documents: how many.
        records: KV of how many passages.
        documents_there, records_there: how many more of the archive's the folder had already.
        kept: sources of which the folder has another version, which stayed.
        useless: records that were left out, because no document needs them: they belong to the archive's version of one of which
            another stayed, or to one that was removed meanwhile.
        damaged: what is damaged in the folder, so that it was not written: a document's id, or a key of KV, in hex digits.
    """

    documents: int = 0
    records: int = 0
    documents_there: int = 0
    records_there: int = 0
    kept: list[str] = field(default_factory=list)
    useless: int = 0
    damaged: list[str] = field(default_factory=list)


class Member(NamedTuple):
    """One file of an archive.

    Attributes:
        name: ``KEY.safetensors`` of a record, ``documents/ID.safetensors`` of a document, in hex digits; :data:`BEGIN`.
        data: its bytes.
        about: what is said of it beside, as text.
        checksum: what whoever wrote it made of it.
    """

    name: str
    data: bytes
    about: str = ""
    checksum: str = ""

    @property
    def kind(self) -> str:
        """``"records"`` or ``"documents"``; empty for what is neither."""
        return next((kind for kind, pattern in _KINDS.items() if pattern.fullmatch(self.name)), "")


class Writer:
    """Adds members to an archive.

    Attributes:
        counts: how many there are, by kind.
        damaged: what could not be read to be added.
    """

    def __init__(self, archive: tarfile.TarFile, archive_format: str):
        self._archive = archive
        self.counts: dict[str, int] = (
            {"records": 0} if archive_format == RECORDS_FORMAT else {"records": 0, "documents": 0}
        )
        self.damaged: list[str] = []

    def add(self, member: Member) -> None:
        """Write a member."""
        info = tarfile.TarInfo(member.name)
        info.size = len(member.data)
        if member.checksum:
            info.pax_headers = {_ABOUT: member.about, _SUM: member.checksum}
        self._archive.addfile(info, io.BytesIO(member.data))
        self._archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
        if member.kind:
            self.counts[member.kind] += 1

    def pass_over(self, name: str, error: RagKVError) -> None:
        """Name what is damaged, and go on without it."""
        logger.warning("%s is not exported: %s", name, str(error))
        self.damaged.append(name)

    @property
    def done(self) -> Exchanged:
        """What was written."""
        return Exchanged(self.counts.get("documents", 0), self.counts["records"], damaged=self.damaged)


@contextmanager
def written(target: str | os.PathLike[str], archive_format: str) -> Iterator[Writer]:
    """To write an archive: complete when the block ends, or not there at all; a file that was there stays until then.

    Raises:
        StoreError: nothing was added, or there is no place for the file.
    """
    file = Path(target)
    try:
        if file.is_dir():
            raise StoreError(f"{file} is a folder: name a file to write")
        if not file.parent.is_dir():
            raise StoreError(f"there is no folder {file.parent} to write {file.name} into: make it first")
        # Another export to the same file has its own.
        handle, name = tempfile.mkstemp(".part", f".{file.name}.", file.parent)
    except (OSError, ValueError) as error:
        raise StoreError(f"{str(file)!r:.200} cannot be written: {error!s:.200}") from error
    part = Path(name)
    try:
        with open(handle, "wb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
                writer = Writer(archive, archive_format)
                yield writer
                if not any(writer.counts.values()):
                    left = f": {len(writer.damaged)} that were chosen are damaged" if writer.damaged else ""
                    raise StoreError(f"there is nothing to export{left}; {file} was not written")
                writer.add(Member(_END, json.dumps({"format": archive_format, **writer.counts}).encode()))
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def members(source: str | os.PathLike[str]) -> Iterator[Member]:
    """The members of an archive, one after the other; what is in them is for the caller to check.

    Raises:
        RecordError: it is cut short or damaged between its members; behind those that are whole.
    """
    file = Path(source)
    counts: dict[str, int] = {}
    end: Any = None
    try:
        with tarfile.open(file, "r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                if end is not None:
                    raise RecordError("something stands behind its end")
                member = _member(archive, info, file.stat().st_size)
                if member.name == _END:
                    end = json.loads(member.data)
                    continue
                counts[member.kind] = counts.get(member.kind, 0) + 1
                yield member
        kinds = {kind: counts.get(kind, 0) for kind in (("records", "documents") if "" in counts else ("records",))}
        want = {"format": FOLDER_FORMAT if "" in counts else RECORDS_FORMAT, **kinds}
        if end != want:
            raise RecordError(
                f"what stands behind {sum(counts.values())} of its members: it must end with {want}, it ends with {end}"
            )
    except UNREADABLE as error:
        raise RecordError(f"what stands behind {sum(counts.values())} of its members: {error}") from error


def recognise(source: str | os.PathLike[str]) -> None:
    """See that a file can be one of ours.

    Raises:
        StoreError: there is no such file.
        RecordError: it is another kind of file; the message says which, as far as its beginning shows it.
    """
    file = Path(source)
    try:
        if not file.is_file():
            raise StoreError(f"{file} is a folder, no file" if file.is_dir() else f"there is no file {file}")
        with open(file, "rb") as raw:
            begin = raw.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise StoreError(f"{str(file)!r:.200} cannot be read: {error.strerror}") from error
    what = "" if begin[257:262] == b"ustar" else what_it_is(begin)
    try:
        with tarfile.open(file, "r:") as archive:
            first = archive.next()
        if first and not (Member(first.name, b"").kind or first.name in _LARGEST_NOTE):
            what = f"it holds {first.name[:80]!r}, and only records and documents belong there"
    except UNREADABLE:
        pass  # it begins as one and is damaged
    if what:
        raise RecordError(f"{file} is no archive that 'ragkv export' wrote: {what}; nothing was taken in")


def _member(archive: tarfile.TarFile, info: tarfile.TarInfo, file_bytes: int) -> Member:
    """A member's bytes; its name and size are somebody's claim."""
    said = info.pax_headers
    member = Member(info.name, b"", said.get(_ABOUT, ""), said.get(_SUM, ""))
    if not info.isreg() or info.issparse() or not (member.kind or info.name in _LARGEST_NOTE):
        raise RecordError(f"it holds {info.name[:80]!r}, and only records and documents belong there")
    if info.offset_data + info.size > file_bytes or info.size > _LARGEST_NOTE.get(info.name, file_bytes):
        raise RecordError(f"{info.name} has {info.size} bytes, more than there can be")
    reader = archive.extractfile(info)
    return member._replace(data=b"" if reader is None else reader.read())


class Lost:
    """Reads an archive and remembers what of it cannot be taken in, so that the rest is.

    Args:
        source: the archive.
    """

    def __init__(self, source: str | os.PathLike[str]):
        self._source, self._count, self._reasons = source, 0, list[str]()

    def until_broken(self) -> Iterator[Member]:
        """The members, up to where the file cannot be read any more.

        Raises:
            StoreError, RecordError: as :func:`recognise`.
        """
        recognise(self._source)
        reader = members(self._source)
        while True:
            try:
                member = next(reader)
            except StopIteration:
                return
            except RecordError as error:
                self.note(str(error))
                return
            yield member

    def parsed(self, parse: Callable[[Member], Item], member: Member) -> Item | None:
        """What is in a member; ``None`` where it proves damaged."""
        try:
            return parse(member)
        except RecordError as error:
            self.note(str(error))
            return None

    def refuse(self, taken: str) -> None:
        """Say what was lost, if anything was.

        Args:
            taken: what was taken in.

        Raises:
            RecordError: something was lost.
        """
        if self._count:
            more = f"; and {self._count - _NAMED} more" if self._count > _NAMED else ""
            how = "is damaged" if _whole(self._source) else "was cut short"
            raise RecordError(f"{self._source} {how}; taken in: {taken}; not: {'; '.join(self._reasons)}{more}")

    def note(self, reason: str) -> None:
        """Remember why something is not taken in."""
        self._count += 1
        if self._count <= _NAMED:
            self._reasons.append(reason)


def _whole(source: str | os.PathLike[str]) -> bool:
    """Whether a file ends as an archive does: tar fills up its last record, with two empty blocks at least."""
    with open(source, "rb") as raw:
        length = raw.seek(0, os.SEEK_END)
        raw.seek(max(0, length - 2 * tarfile.BLOCKSIZE))
        return length % tarfile.RECORDSIZE == 0 and not any(raw.read())
