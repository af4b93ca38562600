"""Records in one file, for another machine to take in: see :mod:`ragkv.folder.archive`.

Each member is one record; what the books say of it (cost, uses, lifetime, namespace) stands beside it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack

import xxhash

from ragkv.errors import RecordError, StoreError
from ragkv.folder.archive import RECORDS_FORMAT, UNREADABLE, Exchanged, Lost, Member, Writer, written
from ragkv.store.disk import DiskTier
from ragkv.store.keys import PATH
from ragkv.store.maintenance import load, opened
from ragkv.store.payload import Payload
from ragkv.store.record import Record, checksum
from ragkv.store.terms import Terms
from ragkv.store.tier import Offer

Progress = Callable[[int], None]


def export(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    wanted: Callable[[bytes], bool] = lambda key: True,
    progress: Progress = lambda done: None,
) -> Exchanged:
    """Writes records into one file, complete or not at all.

    Args:
        path: the folder of a store.
        target: the file; replaced where it is there.
        wanted: which keys; all by default. What has expired is left out, and what is damaged, with a warning.
        progress: called with the number of records done.

    Raises:
        StoreError: nothing is left to write.
    """
    with opened(path) as tier, written(target, RECORDS_FORMAT) as archive:
        add_records(archive, tier, wanted, progress)
    return archive.done


def add_records(archive: Writer, tier: DiskTier, wanted: Callable[[bytes], bool], progress: Progress) -> None:
    """Adds the wanted records of a folder to an archive; what prompts computed stays where it is."""
    for key in (key for key in tier.stored() if wanted(key) and not key.startswith(PATH)):
        try:
            member = _packed(tier, key)
        except RecordError as error:
            archive.pass_over(key.hex(), error)
            continue
        if member is not None:
            archive.add(member)
            progress(archive.counts["records"])


def import_records(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    disk_bytes: int,
    progress: Progress = lambda done: None,
) -> Exchanged:
    """Stores the records of a file that :func:`export` wrote. What is there already stays as it is.

    Every record is checked before it is stored. That finds accidents and nonsense, not forgeries: whoever made the file
    chose what KV stand under a key. Take in what you trust. Documents in the file are passed over.

    Args:
        path: the folder of a store, made if it is not there.
        source: the file.
        disk_bytes: what the folder's records may take; beyond that, those of least worth are evicted.
        progress: called with the number of records done.

    Raises:
        RecordError: the file is not one of ours; or it is damaged or cut short: what is whole in it is stored, the message names
            the rest.
        StoreFullError: a record does not fit; those before it are stored.
    """
    done, lost = Exchanged(), Lost(source)
    with ExitStack() as stack:
        tier = None
        for member in lost.until_broken():
            offer = lost.parsed(unpacked, member) if member.kind == "records" else None
            if offer is not None:
                tier = tier or stack.enter_context(opened(path, disk_bytes))
                take(tier, offer, done)
                progress(done.records + done.records_there)
    lost.refuse(f"{done.records} records")
    return done


def take(tier: DiskTier, offer: Offer, done: Exchanged) -> None:
    """Stores a record unless it is there."""
    if tier.missing([offer.key]):
        tier.admit([offer])
        done.records += 1
    else:
        done.records_there += 1


def unpacked(member: Member) -> Offer:
    """The record of a member.

    Raises:
        RecordError: it is damaged, or cannot be.
    """
    try:
        return _parsed(member)
    except (RecordError, StoreError) as error:
        raise RecordError(f"{member.name}: {error}") from error
    except UNREADABLE as error:
        raise RecordError(f"{member.name} is damaged: {error}") from error


def _packed(tier: DiskTier, key: bytes) -> Member | None:
    """A record as a member; ``None`` where it has expired, or another process has removed it."""
    loaded = load(tier, key, expired=True)
    if loaded is None or not loaded[2].alive(tier.now()):
        return None
    record, payload, row = loaded
    terms, header = row.terms(tier.now()), record.safetensors_header()
    namespace = terms.namespace if isinstance(terms.namespace, bytes) else b""
    about = json.dumps(
        {
            "cost_s": terms.cost_s,
            "uses": terms.uses,
            "lifetime_s": None if terms.lifetime_s == math.inf else terms.lifetime_s,
            "namespace": namespace.hex(),
        }
    )
    data = header + payload.data.numpy().tobytes()
    return Member(f"{key.hex()}.safetensors", data, about, _checksum(key, about, header))


def _parsed(member: Member) -> Offer:
    key, data = bytes.fromhex(member.name.partition(".")[0]), member.data
    (length,) = struct.unpack_from("<Q", data)
    header = data[: 8 + length]
    if member.checksum != _checksum(key, member.about, header):
        raise RecordError("the checksum of its header differs")
    record = Record.from_safetensors_header(header)
    body = memoryview(data)[8 + length :]
    if len(body) != record.payload_bytes:
        raise RecordError(f"{len(body)} bytes stand behind its header, which says {record.payload_bytes}")
    payload = Payload(record.payload_bytes)
    payload.data.numpy()[:] = body
    if tuple(checksum(payload.data[start:stop]) for start, stop in record.spans) != record.checksums:
        raise RecordError("a checksum differs")
    record.decode(payload)
    about = json.loads(member.about)
    namespace = bytes.fromhex(about["namespace"]) or bytes(8)
    if len(namespace) != 8 or not 0 <= about["uses"] < 1 << 62:
        raise RecordError(f"terms that cannot be: {about}")
    lifetime_s = math.inf if about["lifetime_s"] is None else float(about["lifetime_s"])
    return Offer(key, record, payload, Terms(namespace, lifetime_s, float(about["cost_s"]), int(about["uses"])))


def _checksum(key: bytes, about: str, header: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(key + about.encode() + header)
