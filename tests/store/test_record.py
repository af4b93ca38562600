"""The record's bytes: frozen, refused where they are of another version, and harmless where they are hostile."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors

from ragkv.chunk import ChunkKV
from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment
from ragkv.store import TieredStore
from ragkv.store.codecs import get_codec
from ragkv.store.encode import encode
from ragkv.store.payload import Part, Payload
from ragkv.store.record import Record

KEY = bytes(range(32))
FROZEN_HEADER = (
    "5241474b560100006e02dc76e56fcb05c8010000000000007b225f5f6d657461646174615f5f223a7b22666f726d6174223a227261676b"
    "762d31222c227370616365223a2273222c22636f646563223a22726177222c2262617365223a223131222c22746f6b656e73223a223222"
    "2c226c6179657273223a225b5b312c5c22424631365c222c312c322c312c315d2c5b312c5c224631365c222c322c312c312c325d5d222c"
    "227365676d656e745f6279746573223a223136222c22787868335f3634223a223166373563663037653439656332663163663462396232"
    "336434643064383061227d2c226b2e30223a7b226474797065223a2242463136222c227368617065223a5b312c322c325d2c2264617461"
    "5f6f666673657473223a5b302c385d7d2c22762e30223a7b226474797065223a2242463136222c227368617065223a5b312c322c315d2c"
    "22646174615f6f666673657473223a5b382c31325d7d2c226b2e31223a7b226474797065223a22463136222c227368617065223a5b322c"
    "322c315d2c22646174615f6f666673657473223a5b31322c32305d7d2c22762e31223a7b226474797065223a22463136222c2273686170"
    "65223a5b312c322c325d2c22646174615f6f666673657473223a5b32302c32385d7d7d2020202020"
)
FROZEN_PAYLOAD = "0000803f004040400000803f00440045004600470048804800498049"


def small() -> ChunkKV:
    numbers = torch.arange(12, dtype=torch.float32)
    keys = [numbers[:4].view(1, 2, 2).bfloat16(), numbers[4:8].view(2, 2, 1).half()]
    values = [numbers[:2].view(1, 2, 1).bfloat16(), numbers[8:12].view(1, 2, 2).half()]
    return ChunkKV(keys, values, 11)


def record_of(kv, codec="raw", **options):
    return encode(kv, codec=get_codec(codec), **options)


def test_bytes_are_frozen():
    """Whoever changes these bytes writes records that installed versions cannot read: count the version up."""
    record, payload = record_of(small(), space="s", segment_bytes=16)
    assert record.pack(KEY).hex() == FROZEN_HEADER
    assert bytes(payload.data.numpy()).hex() == FROZEN_PAYLOAD


def test_sensitivity_travels_in_the_header():
    kv = small()
    kv.sensitivity = torch.tensor([0.5, 1.25])
    record, payload = record_of(kv)
    packed = record.pack(KEY)
    again = Record.unpack(KEY, packed)
    assert again.sensitivity.tolist() == [0.5, 1.25]
    assert again.decode(payload).sensitivity.tolist() == [0.5, 1.25]
    assert Record.unpack(KEY, record_of(small())[0].pack(KEY)).sensitivity is None
    with pytest.raises(StoreError, match=r"\[T\] with T = 2, got \(3,\)"):
        record_of(ChunkKV(kv.keys, kv.values, 11, torch.zeros(3)))
    header = record.safetensors_header()
    short = header.replace(b"ADgAPQ==", b"ADg=    ")
    assert short != header
    with pytest.raises(RecordError, match="cannot be read"):
        Record.from_safetensors_header(short)


def test_rows_travel_in_the_header():
    kv = small()
    kv.rows = torch.tensor([3, 17])
    record, payload = record_of(kv)
    again = Record.unpack(KEY, record.pack(KEY))
    assert again.rows.tolist() == again.decode(payload).rows.tolist() == [3, 17]
    assert kv.first(1).rows.tolist() == [3]
    assert Record.unpack(KEY, record_of(small())[0].pack(KEY)).rows is None
    with pytest.raises(StoreError, match=r"rows must be \[T\] with T = 2, got \(3,\)"):
        record_of(ChunkKV(kv.keys, kv.values, 11, rows=torch.arange(3)))
    header = record.safetensors_header()
    for wrong in (
        b"[17,3]",
        b"[-1,2]",
        b"[3.5,7]",
        b"[3]",
        b"[3,[17]]",
        b"3",
        b"[3,99999999999999999999]",
        b"[false,true]",
        b"x",
    ):
        other = header.replace(b"[3,17]", wrong)
        other = struct.pack("<Q", len(other) - 8) + other[8:]
        with pytest.raises(RecordError, match="cannot be read"):
            Record.from_safetensors_header(other)


def test_frozen_bytes_are_read(same):
    record = Record.unpack(KEY, bytes.fromhex(FROZEN_HEADER))
    payload = Payload(record.payload_bytes)
    payload.data.copy_(torch.frombuffer(bytearray.fromhex(FROZEN_PAYLOAD), dtype=torch.uint8))
    assert (record.base, record.tokens, record.space, record.codec, len(record.checksums)) == (11, 2, "s", "raw", 2)
    same(record.decode(payload), small())


def test_header_and_segments_are_a_safetensors_file():
    kv = small()
    record, payload = record_of(kv)
    tensors = load_safetensors(record.safetensors_header() + bytes(payload.data.numpy()))
    assert torch.equal(tensors["k.1"], kv.keys[1])
    assert torch.equal(tensors["v.0"], kv.values[0])


def sealed(header: bytes, *, magic=b"RAGKV", version=1, key=KEY) -> bytes:
    return struct.pack("<5sBHQ", magic, version, 0, xxhash.xxh3_64_intdigest(key + header)) + header


def table(**changes) -> bytes:
    record, _ = record_of(small())
    facts = json.loads(record.safetensors_header()[8:])
    for name, value in changes.items():
        facts["__metadata__"][name] = value
    text = json.dumps(facts, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text


def test_whole_header_is_read():
    assert Record.unpack(KEY, sealed(table())).base == 11


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least"),
        (sealed(table(), magic=b"RAGKW"), "begins with"),
        (sealed(table(), version=0), "version 1, got 0"),
        (sealed(table(), version=2), "version 1, got 2"),
        (sealed(table(), key=bytes(32)), "checksum"),
        (sealed(table())[:-1], "checksum"),
        (sealed(table()[:-1]), "cannot be read"),
        (sealed(struct.pack("<Q", 1 << 63) + b"{}"), "cannot be read"),
        (sealed(struct.pack("<Q", 2) + b"{}"), "cannot be read"),
        (sealed(struct.pack("<Q", 20_000) + b"[" * 20_000), "cannot be read"),
        (sealed(table(base="-1")), "base -1"),
        (sealed(table(segment_bytes="0")), "segments of 0"),
        (sealed(table(layers="[[99999999999,\"F32\",1,1,1,1]]")), "layers"),
        (sealed(table(layers="[[1,\"F32\",1,1,1,1]]")), "1 layers"),
        (sealed(table(xxh3_64="")), "checksums"),
        (sealed(table(tokens="x")), "cannot be read"),
    ],
    ids=range(16),
)  # fmt: skip
def test_bad_headers_are_named(data, message):
    with pytest.raises(RecordError, match=message):
        Record.unpack(KEY, data)


def test_parts_that_overlap_or_lie_outside_are_refused():
    whole = json.loads(record_of(small())[0].safetensors_header()[8:])
    for place in ([0, 4], [1, 9], [-8, 0], [0, 1 << 62], ["a", "b"]):
        facts = json.loads(json.dumps(whole))
        facts["k.0"]["data_offsets"] = place
        text = json.dumps(facts, separators=(",", ":")).encode()
        with pytest.raises(RecordError):
            Record.unpack(KEY, sealed(struct.pack("<Q", len(text)) + text))


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_any_sealed_bytes_are_a_record_or_a_record_error(data):
    for header in (data, sealed(data), sealed(struct.pack("<Q", len(data)) + data)):
        with pytest.raises(RecordError):
            Record.unpack(KEY, header)


def test_record_of_an_unknown_codec_is_a_record_error(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        env = store._disk.environment
        record, _ = record_of(kv(1))
        header = sealed(record.safetensors_header().replace(b'"codec":"raw"', b'"codec":"rar"'), key=key(1))
        with env.transaction(write=True) as txn:
            txn.put("entries", key(1), header)
        assert store.get(key(1)) is None


@pytest.mark.parametrize("version", [0, 3, 1 << 40])
def test_folder_of_another_version_is_named(folder, version):
    with TieredStore(folder, cpu_bytes=0) as store:
        env = store._disk.environment
        with env.transaction(write=True) as txn:
            txn.put("state", b"format", struct.pack("<Q", version))
    with pytest.raises(RecordError, match="format"):
        TieredStore(folder)


def test_a_folder_of_the_version_before_is_emptied(folder, caplog):
    """Nobody could ask for its KV by their old keys; what they were made from is not in it."""
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(KEY, small())
        with store._disk.environment.transaction(write=True) as txn:
            txn.put("state", b"format", struct.pack("<Q", 1))
    with pytest.raises(RecordError, match="format"):
        TieredStore(folder, readonly=True)
    with TieredStore(folder, cpu_bytes=0) as store:
        assert len(store) == 0 and store.stats().bytes["disk"] == 0 and "made by the version before" in caplog.text


def test_folder_of_another_byte_order_is_named(tmp_path):
    """The magic number of LMDB's meta pages as a big-endian machine writes it."""
    with TieredStore(tmp_path / "kv", cpu_bytes=0):
        pass
    data = tmp_path / "kv" / "data.mdb"
    raw = bytearray(data.read_bytes())
    for page in (0, 4096):
        raw[page + 16 : page + 20] = bytes(reversed(raw[page + 16 : page + 20]))
    data.write_bytes(raw)
    with pytest.raises(RecordError):
        TieredStore(tmp_path / "kv")


def test_unaligned_parts_are_read():
    payload = Payload(11)
    part = Part(torch.float32, (2,), 3)
    payload.fill(part, torch.tensor([1.5, -2.0]))
    assert payload.view(part).tolist() == [1.5, -2.0]


def test_what_another_process_stored_since_it_emptied_the_folder_stays(folder, monkeypatch, forked):
    with TieredStore(folder, cpu_bytes=0) as store, store._disk.environment.transaction(write=True) as txn:
        txn.put("state", b"format", struct.pack("<Q", 1))

    def other():
        with TieredStore(folder, cpu_bytes=0) as mine:
            return mine.put(KEY, small())

    change = Environment.transaction

    def late(environment, **flags):
        monkeypatch.undo()
        assert forked(other) == "True"
        return change(environment, **flags)

    monkeypatch.setattr(Environment, "transaction", late)
    with TieredStore(folder, cpu_bytes=0) as store:
        assert store.contains(KEY)


def test_a_header_that_claims_what_cannot_be_is_refused_before_it_is_cut(monkeypatch):
    """In segments of a byte a terabyte would be a trillion of them."""
    record, _ = record_of(small())
    table = {
        f"{side}.0": {"dtype": "U8", "shape": [1 << 39], "data_offsets": [start, start + (1 << 39)]}
        for side, start in (("k", 0), ("v", 1 << 39))
    }
    facts = record._metadata() | {"layers": '[[1,"F32",1,1,1,1]]', "segment_bytes": "1"}
    text = f'{{"__metadata__":{json.dumps(facts)},{json.dumps(table)[1:]}'.encode()
    monkeypatch.setattr("ragkv.store.payload.Segments.cut", lambda *_: pytest.fail("it is cut"))
    with pytest.raises(RecordError, match="1 checksums for 1099511627776 bytes"):
        Record.from_safetensors_header(struct.pack("<Q", len(text)) + text)
