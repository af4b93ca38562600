"""Export and import: one file there and back, and files that are damaged, cut short, or made by an enemy."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from typing import NamedTuple

import pytest
import torch
import xxhash
from safetensors import safe_open

from ragkv.errors import RecordError, StoreError
from ragkv.store import TieredStore
from ragkv.store.exchange import export, import_records
from ragkv.store.maintenance import entries

ROOM = 1 << 30


@pytest.fixture
def archive(folder, tmp_path, kv, key):
    """A file of three records."""
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=30), space="model", cost_s=0.5, label=f"passage {number}")
    file = tmp_path / "kv.tar"
    assert export(folder, file).records == 3
    return file


def stored(tmp_path):
    """The keys that were taken in."""
    place = tmp_path / "other"
    return {entry.key for entry in entries(place)} if place.exists() else set()


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_there_and_back(folder, tmp_path, kv, key, same, codec):
    with TieredStore(folder, cpu_bytes=0, codec=codec) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=3000, dtype=torch.bfloat16), space="model", cost_s=2.5)
        store.put(key(3), kv(3), lifetime_s=1e-6)
        want = [store.get(key(number)) for number in range(3)]
        store.get(key(1))
    seen = []
    assert export(folder, tmp_path / "kv.tar", progress=seen.append).records == 3
    assert seen == [1, 2, 3]
    assert import_records(tmp_path / "other", tmp_path / "kv.tar", disk_bytes=ROOM).records == 3
    with TieredStore(tmp_path / "other") as store:
        for number in range(3):
            same(store.get(key(number)), want[number])
    before = {entry.key: entry for entry in entries(folder)}
    for entry in entries(tmp_path / "other"):
        old = before[entry.key]
        assert (entry.space, entry.codec, entry.label) == (old.space, old.codec, old.label)
        assert (entry.cost_s, entry.frequency) == (old.cost_s, old.frequency + 1)  # the read above
    with tarfile.open(tmp_path / "kv.tar") as packed:
        packed.extractall(tmp_path / "files", filter="data")
    with safe_open(tmp_path / "files" / f"{key(1).hex()}.safetensors", "pt") as file:
        assert file.metadata()["space"] == "model"
        if codec == "raw":
            assert torch.equal(file.get_tensor("k.2"), want[1].keys[2])


def test_some_keys_lifetimes_and_quotas(folder, tmp_path, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1), lifetime_s=1e6, namespace="a")
        store.put(key(2), kv(2))
    assert export(folder, tmp_path / "kv.tar", wanted=lambda name: name == key(1)).records == 1
    with TieredStore(tmp_path / "other", cpu_bytes=0) as store:
        store.set_quota("a", 100_000)
    assert import_records(tmp_path / "other", tmp_path / "kv.tar", disk_bytes=ROOM).records == 1
    (entry,) = entries(tmp_path / "other")
    assert 9e5 < entry.expires_s - entry.created_s <= 1e6
    with TieredStore(tmp_path / "other", cpu_bytes=0) as store:
        for number in range(10, 30):
            store.put(key(number), kv(number, tokens=60), namespace="a", cost_s=1e6)
        assert not store.contains(key(1)), "it counts in its namespace's quota"


@pytest.mark.parametrize("name", [b"a", b"one's own", b"x" * 494], ids=len)
def test_a_key_of_ones_own_goes_with_its_record(folder, tmp_path, kv, same, name):
    with TieredStore(folder) as store:
        store.put(name, kv(1))
    assert export(folder, tmp_path / "kv.tar").records == 1
    assert import_records(tmp_path / "there", tmp_path / "kv.tar", disk_bytes=1 << 30).records == 1
    with TieredStore(tmp_path / "there") as store:
        same(store.get(name), kv(1))


def test_what_was_there_is_not_counted_as_new(archive, tmp_path, key, kv):
    with TieredStore(tmp_path / "other", cpu_bytes=0) as store:
        store.put(key(0), kv(0))
    seen = []
    done = import_records(tmp_path / "other", archive, disk_bytes=ROOM, progress=seen.append)
    assert (done.records, done.records_there, seen) == (2, 1, [1, 2, 3])


def test_damaged_records_are_named_and_expired_ones_are_not(archive, folder, tmp_path, key, kv, caplog, damage):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(3), kv(3), lifetime_s=1e-6)
        damage(store, key(1) + bytes(4), 17)
    done = export(folder, archive)
    assert (done.records, done.damaged) == (2, [key(1).hex()]) and f"{key(1).hex()} is not exported: " in caplog.text
    assert key(3).hex() not in caplog.text


def test_nothing_to_export_writes_nothing(archive, folder):
    before = archive.read_bytes()
    with pytest.raises(StoreError, match=r"there is nothing to export; .*kv.tar was not written"):
        export(folder, archive, wanted=lambda key: False)
    assert archive.read_bytes() == before and len(list(archive.parent.glob("*kv.tar*"))) == 1


def test_a_place_where_no_file_can_be(archive, folder, tmp_path):
    with pytest.raises(StoreError, match=r"there is no folder .*none to write kv\.tar into"):
        export(folder, tmp_path / "none" / "kv.tar")
    with pytest.raises(StoreError, match="is a folder: name a file"):
        export(folder, tmp_path)


def test_an_old_file_stays_where_export_fails(archive, tmp_path, monkeypatch):
    before = archive.read_bytes()
    with pytest.raises(StoreError, match="not a folder"):
        export(tmp_path / "nothing", archive)
    assert archive.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".part")] == []


def test_cut_short_at_every_kind_of_place(archive, tmp_path):
    """What stands whole in front of the cut is taken in."""
    whole = archive.read_bytes()
    with tarfile.open(archive) as packed:
        members = packed.getmembers()

    def said(length, records):
        if length < 2:
            return f"kv.tar is no archive .* it is {'a text' if length else 'empty'}"
        return f"kv.tar was cut short; taken in: {records} records; not: "

    borders = [member.offset for member in members]
    for length in {0, 1, 511, 512, 700, len(whole) // 2, *borders, *(border + 512 for border in borders)} - {
        len(whole)
    }:
        archive.write_bytes(whole[:length])
        before = [member for member in members[:3] if member.offset_data + member.size <= length]
        with pytest.raises(RecordError, match=said(length, len(before))):
            import_records(tmp_path / "other", archive, disk_bytes=ROOM)
        assert stored(tmp_path) == {bytes.fromhex(member.name[:64]) for member in before}, f"cut at {length}"
        shutil.rmtree(tmp_path / "other", ignore_errors=True)


def test_flipped_bits(archive, tmp_path):
    """A record of which a byte is wrong is named and left out, the others are taken in; tar's own padding does not matter."""
    whole = archive.read_bytes()
    with tarfile.open(archive) as packed:
        spans = [(member.name, member.offset_data, member.size) for member in packed.getmembers()]
    keys = {bytes.fromhex(name[:64]) for name, _, _ in spans[:3]}
    for name, start, size in spans:
        for place in {start, start + 3, start + size // 3, start + size // 2, start + size - 1}:
            harmed = bytearray(whole)
            harmed[place] ^= 4
            archive.write_bytes(harmed)
            with pytest.raises(RecordError, match=name if name != "end.json" else "taken in: 3 records"):
                import_records(tmp_path / "other", archive, disk_bytes=ROOM)
            assert stored(tmp_path) == {key for key in keys if not name.startswith(key.hex())}
            shutil.rmtree(tmp_path / "other")


def test_a_damaged_header_ends_the_reading(archive, tmp_path):
    whole = bytearray(archive.read_bytes())
    with tarfile.open(archive) as packed:
        first, second = packed.getmembers()[:2]
    whole[second.offset + 150] ^= 1  # in the checksum of its extended header
    archive.write_bytes(whole)
    with pytest.raises(
        RecordError, match=r"kv.tar is damaged; taken in: 1 records; not: what stands behind 1 of its members"
    ):
        import_records(tmp_path / "other", archive, disk_bytes=ROOM)
    assert stored(tmp_path) == {bytes.fromhex(first.name[:64])}


class Link(NamedTuple):
    kind: bytes


def packed(*members, about=None):
    """An archive of names with their bytes, or of links."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                if about is not None and name != "end.json":
                    length = int.from_bytes(content[:8], "little")
                    checked = bytes.fromhex(name[:64]) + about.encode() + content[: 8 + length]
                    digest = xxhash.xxh3_64_hexdigest(checked)
                    member.pax_headers = {"RAGKV.terms": about, "RAGKV.xxh3_64": digest}
                file.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content.kind, "/etc/passwd"
                file.addfile(member)
    return data.getvalue()


def zipped():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("kv.safetensors", b"x")
    return data.getvalue()


def end(count):
    return ("end.json", json.dumps({"format": "ragkv-archive-1", "records": count}).encode())


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it is empty"),
        (b"Minutes of the meeting\nof May", r"it is a text that begins with 'Minutes of the meeting\\nof May'"),
        (("Größe " * 200).encode(), "it is a text that begins with 'Größe "),
        (zipped(), "it is a zip file"),
        (gzip.compress(b"x" * 2000), "it is compressed with gzip: unpack it first"),
        (bz2.compress(b"x" * 2000), "it is compressed with bzip2: unpack it first"),
        (lzma.compress(b"x" * 2000), "it is compressed with xz: unpack it first"),
        (b"%PDF-1.7 ...", "it is a PDF file"),
        (bytes(range(256)) * 4, "it is no tar file"),
        (packed(("notes/a.md", b"x")), "it holds 'notes/a.md', and only records and documents belong there"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_other_files_are_named(tmp_path, data, what):
    file = tmp_path / "other.file"
    file.write_bytes(data)
    with pytest.raises(RecordError) as refused:
        import_records(tmp_path / "other", file, disk_bytes=ROOM)
    said = str(refused.value)
    assert said.startswith(f"{file} is no archive that 'ragkv export' wrote: {what}".replace("\\\\", "\\"))
    assert said.endswith("; nothing was taken in") and not (tmp_path / "other").exists()
    with pytest.raises(StoreError, match="is a folder, no file"):
        import_records(tmp_path / "other", tmp_path, disk_bytes=ROOM)


TERMS = '{"cost_s": 1, "uses": 1, "lifetime_s": null, "namespace": ""}'
NAME = "ab" * 32 + ".safetensors"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no tar at all" * 100, "no archive"),
        (packed(), "it is no tar file"),
        (packed(end(1)), "it must end with"),
        (packed(("end.json", b"[" * 4000)), "behind 0 of its members: "),
        (packed(("end.json", b"{}" * 4000)), "more than there can be"),
        (packed(("../../etc/cron", b"x"), end(1)), "belong there"),
        (packed((NAME, Link(tarfile.SYMTYPE)), end(1)), "belong there"),
        (packed((NAME, Link(tarfile.LNKTYPE)), end(1)), "belong there"),
        (packed((NAME.upper(), b"x"), end(1)), "belong there"),
        (packed((NAME, b""), end(1)), f"taken in: 0 records; not: {NAME} is damaged"),
        (packed((NAME, b"\x02" + bytes(7) + b"{}"), end(1)), f"{NAME}: the checksum of its header differs"),
        (packed((NAME, b"\xff" * 100), end(1), about=TERMS), "cannot be read"),
        (packed((NAME, b"\x02" + bytes(7) + b"{}"), end(1), about=TERMS), "cannot be read"),
    ],
)
def test_hostile_files(tmp_path, data, reason):
    file = tmp_path / "hostile.tar"
    file.write_bytes(data)
    with pytest.raises(RecordError, match=reason):
        import_records(tmp_path / "other", file, disk_bytes=ROOM)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "about",
    [
        None,
        "nonsense",
        "[]",
        "{}",
        TERMS.replace('"cost_s": 1', '"cost_s": NaN'),
        TERMS.replace('"cost_s": 1', '"cost_s": -1'),
        TERMS.replace('"uses": 1', '"uses": -1'),
        TERMS.replace('"uses": 1', '"uses": 1e400'),
        TERMS.replace('"lifetime_s": null', '"lifetime_s": 0'),
        TERMS.replace('"namespace": ""', '"namespace": "abc"'),
        TERMS.replace('"namespace": ""', '"namespace": "abcd"'),
    ],
)
def test_terms_that_cannot_be(archive, tmp_path, about):
    with tarfile.open(archive) as file:
        member = file.getmembers()[0]
        content = file.extractfile(member).read()
    good, bad = packed((member.name, content), end(1), about=TERMS), packed((member.name, content), end(1), about=about)
    archive.write_bytes(bad)
    with pytest.raises(RecordError):
        import_records(tmp_path / "other", archive, disk_bytes=ROOM)
    archive.write_bytes(good)
    assert import_records(tmp_path / "other", archive, disk_bytes=ROOM).records == 1


def test_a_size_that_lies(archive, tmp_path):
    """A member that claims more bytes than the file has is refused before memory is asked for."""
    data = bytearray(packed((NAME, b"x" * 600), end(1)))
    data[124:136] = b"77777777777\0"
    checksum = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    archive.write_bytes(data)
    with pytest.raises(RecordError):
        import_records(tmp_path / "other", archive, disk_bytes=ROOM)


def test_layers_without_end_are_not_made(archive, tmp_path):
    """A header of a few KB that claims billions of layers."""
    with tarfile.open(archive) as file:
        member = file.getmembers()[0]
        content = file.extractfile(member).read()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    (run,) = json.loads(header["__metadata__"]["layers"])
    header["__metadata__"]["layers"] = json.dumps([[65_536, *run[1:]]] * 1000)
    text = json.dumps(header, separators=(",", ":")).encode()
    archive.write_bytes(
        packed((member.name, len(text).to_bytes(8, "little") + text + content[8 + length :]), end(1), about=TERMS)
    )
    with pytest.raises(RecordError, match="layers of one kind"):
        import_records(tmp_path / "other", archive, disk_bytes=ROOM)


def test_no_such_file(tmp_path):
    with pytest.raises(StoreError, match="no file"):
        import_records(tmp_path / "other", tmp_path / "nothing.tar", disk_bytes=ROOM)
