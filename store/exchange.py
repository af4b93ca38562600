"""Records as files: a safetensors file each, for any program to read and for another machine to take in."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path

from ragkv.errors import RecordError
from ragkv.store.layout import Payload
from ragkv.store.maintenance import load, opened
from ragkv.store.record import Record, checksum
from ragkv.store.terms import Terms

logger = logging.getLogger("ragkv.store")


def export(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Writes every record as a safetensors file ``<key>.safetensors``, readable by any program; how many.

    What is damaged or expired is left out.
    """
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with opened(path) as tier:
        for key in tier.stored():
            try:
                record, payload, _ = load(tier, key)
            except RecordError as error:
                logger.warning("%s is not exported: %s", key.hex(), error)
                continue
            temporary = folder / f".{key.hex()}.part"
            with open(temporary, "wb") as file:
                file.write(record.safetensors_header())
                file.write(payload.data.numpy().data)
            os.replace(temporary, folder / f"{key.hex()}.safetensors")
            written += 1
    return written


def import_records(path: str | os.PathLike[str], source: str | os.PathLike[str], *, disk_bytes: int) -> int:
    """Stores every ``<key>.safetensors`` of a folder that :func:`export` wrote; how many.

    Raises:
        RecordError: a file is damaged or not one of ours; those before it are stored.
    """
    stored = 0
    with opened(path, disk_bytes) as tier:
        for file in sorted(Path(source).glob("*.safetensors")):
            record, payload = _parse(file)
            stored += tier.put(bytes.fromhex(file.stem), record, payload, Terms()) is not None
    return stored


def _parse(file: Path) -> tuple[Record, Payload]:
    data = file.read_bytes()
    try:
        (length,) = struct.unpack_from("<Q", data)
        record = Record.from_safetensors_header(data[: 8 + length])
        key = bytes.fromhex(file.stem)
    except (struct.error, ValueError) as error:
        raise RecordError(f"{file} is not a record: {error}") from error
    body = memoryview(data)[8 + length :]
    if len(key) != 32 or len(body) != record.payload_bytes:
        raise RecordError(f"{file} has {len(body)} bytes behind its header, it says {record.payload_bytes}")
    payload = Payload(record.payload_bytes)
    payload.data.numpy()[:] = body
    if tuple(checksum(payload.data[start:stop]) for start, stop in record.spans) != record.checksums:
        raise RecordError(f"{file} is damaged: a checksum differs")
    return record, payload
