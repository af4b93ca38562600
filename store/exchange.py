"""Records in one file, for another machine to take in: a tar archive of safetensors files.

Each member ``<key>.safetensors`` is one record, which any program can read once the archive is unpacked; what the books
say of it (cost, uses, lifetime, namespace) stands in the member's extended header. The last member says how many there
are, so that an archive that was cut short is noticed.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from ragkv.errors import RecordError, StoreError
from ragkv.store.maintenance import load, opened
from ragkv.store.payload import Payload
from ragkv.store.record import Record, checksum
from ragkv.store.terms import Terms
from ragkv.store.tier import Offer

logger = logging.getLogger("ragkv.store")

FORMAT = "ragkv-archive-1"
_END = "end.json"
_MEMBER = re.compile(r"([0-9a-f]{64})\.safetensors")
_ABOUT, _SUM = "RAGKV.terms", "RAGKV.xxh3_64"
_LARGEST_END = 4096
_UNREADABLE = (
    tarfile.TarError,
    struct.error,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    EOFError,
    MemoryError,
    RecursionError,
)

Progress = Callable[[int], None]


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    wanted: Callable[[bytes], bool] = lambda key: True,
    progress: Progress = lambda done: None,
) -> int:
    """Writes records into one file, complete or not at all; how many.

    Args:
        path: the folder of a store.
        target: the file; replaced where it is there.
        wanted: which keys; all by default. What is damaged or has expired is left out.
        progress: called with the number of records done.
    """
    file = Path(target)
    part = file.with_name(f".{file.name}.part")
    written = 0
    try:
        with opened(path) as tier, open(part, "wb") as raw:
            with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for key in filter(wanted, tier.stored()):
                    try:
                        record, payload, row = load(tier, key)
                    except RecordError as error:
                        logger.warning("%s is not exported: %s", key.hex(), error)
                        continue
                    _add(archive, key, record, payload, row.terms(tier.now()))
                    written += 1
                    progress(written)
                end = json.dumps({"format": FORMAT, "records": written}).encode()
                archive.addfile(_member(_END, len(end)), io.BytesIO(end))
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return written


def import_records(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    disk_bytes: int,
    progress: Progress = lambda done: None,
) -> int:
    """Stores the records of a file that :func:`export` wrote; how many. What is there already stays as it is.

    The file is read to its end and every record checked before the first one is stored. That finds accidents and
    nonsense, not forgeries: whoever made the file chose what KV stand under a key. Take in what you trust.

    Args:
        path: the folder of a store, made if it is not there.
        source: the file.
        disk_bytes: what the folder's records may take; beyond that, those of least worth are evicted.
        progress: called with the number of records stored.

    Raises:
        RecordError: the file is damaged, cut short, or not one of ours; nothing was stored.
        StoreFullError: a record does not fit; those before it are stored.
    """
    file = Path(source)
    for _, record, payload, _ in _records(file):
        record.decode(payload)
    stored = 0
    with opened(path, disk_bytes) as tier:
        for key, record, payload, terms in _records(file):
            if tier.missing([key]):
                stored += tier.admit([Offer(key, record, payload, terms)])[0]
                progress(stored)
    return stored


def _add(archive: tarfile.TarFile, key: bytes, record: Record, payload: Payload, terms: Terms) -> None:
    header = record.safetensors_header()
    data = header + payload.data.numpy().tobytes()
    member = _member(f"{key.hex()}.safetensors", len(data))
    namespace = terms.namespace if isinstance(terms.namespace, bytes) else b""
    about = json.dumps(
        {
            "cost_s": terms.cost_s,
            "uses": terms.uses,
            "lifetime_s": None if terms.lifetime_s == math.inf else terms.lifetime_s,
            "namespace": namespace.hex(),
        }
    )
    member.pax_headers = {_ABOUT: about, _SUM: _checksum(key, about, header)}
    archive.addfile(member, io.BytesIO(data))


def _checksum(key: bytes, about: str, header: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(key + about.encode() + header)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _records(file: Path) -> Iterator[tuple[bytes, Record, Payload, Terms]]:
    """The records of an archive, checked one after the other.

    Raises:
        RecordError: see :func:`import_records`.
        StoreError: there is no such file.
    """
    if not file.is_file():
        raise StoreError(f"there is no file {file}")
    count, end = 0, None
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if end is not None:
                    raise RecordError("something stands behind its end")
                data = _content(archive, member, file.stat().st_size)
                if member.name == _END:
                    end = json.loads(data)
                else:
                    yield _parse(member, data)
                    count += 1
        if end != {"format": FORMAT, "records": count}:
            raise RecordError(
                f"it must end with {FORMAT} and its {count} records, it ends with {end}: was it cut short?"
            )
    except RecordError as error:
        raise RecordError(f"{file} is not taken in: {error}") from error
    except _UNREADABLE as error:
        raise RecordError(f"{file} is no archive of ragkv, or damaged: {error}") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, file_bytes: int) -> bytes:
    """A member's bytes; its name and size are somebody's claim."""
    end = member.name == _END
    if not member.isreg() or member.issparse() or not (end or _MEMBER.fullmatch(member.name)):
        raise RecordError(f"it holds {member.name[:80]!r}, and only records belong there")
    if member.offset_data + member.size > file_bytes or (end and member.size > _LARGEST_END):
        raise RecordError(f"{member.name} has {member.size} bytes, more than there can be")
    reader = archive.extractfile(member)
    return b"" if reader is None else reader.read()


def _parse(member: tarfile.TarInfo, data: bytes) -> tuple[bytes, Record, Payload, Terms]:
    key = bytes.fromhex(member.name[:64])
    (length,) = struct.unpack_from("<Q", data)
    header, text = data[: 8 + length], member.pax_headers[_ABOUT]
    if member.pax_headers[_SUM] != _checksum(key, text, header):
        raise RecordError(f"{member.name} is damaged: the checksum of its header differs")
    record = Record.from_safetensors_header(header)
    body = memoryview(data)[8 + length :]
    if len(body) != record.payload_bytes:
        raise RecordError(f"{member.name} has {len(body)} bytes behind its header, it says {record.payload_bytes}")
    payload = Payload(record.payload_bytes)
    payload.data.numpy()[:] = body
    if tuple(checksum(payload.data[start:stop]) for start, stop in record.spans) != record.checksums:
        raise RecordError(f"{member.name} is damaged: a checksum differs")
    about = json.loads(text)
    namespace = bytes.fromhex(about["namespace"]) or bytes(8)
    if len(namespace) != 8 or not 0 <= about["uses"] < 1 << 62:
        raise RecordError(f"{member.name} has terms that cannot be: {about}")
    lifetime_s = math.inf if about["lifetime_s"] is None else float(about["lifetime_s"])
    try:
        return key, record, payload, Terms(namespace, lifetime_s, float(about["cost_s"]), int(about["uses"]))
    except StoreError as error:
        raise RecordError(f"{member.name} has terms that cannot be: {error}") from error
