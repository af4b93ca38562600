"""Objects that are damaged, forged, of another version or encrypted otherwise: misses, counted, and deleted or left by rule."""

from __future__ import annotations

import random

import pytest
import torch
import xxhash

from ragkv.chunk import ChunkKV
from ragkv.errors import ArgumentError, ArgumentTypeError, MissingPackageError, RecordError, StoreError, UploadError
from ragkv.store import RemoteTier, TieredStore
from ragkv.store.remote.envelope import Envelope

SECRET = bytes(range(32))


@pytest.fixture(params=[{}, {"encryption_key": SECRET}], ids=["plain", "encrypted"])
def options(request):
    return request.param


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/pool"


@pytest.fixture
def object_of(tmp_path):
    return lambda key: tmp_path / "pool" / key.hex()[:2] / key.hex()


@pytest.fixture
def sent(url, machine, options, kv, key, object_of):
    """A chunk in the pool: its file, and the store that sent it."""
    store = machine(url, **options)
    store.put(key(1), kv(1, tokens=900))
    store.flush()
    return object_of(key(1)), store


DAMAGE = {
    "a bit of the head": lambda data: flipped(data, 30),
    "a bit of the header": lambda data: flipped(data, 200),
    "a bit of a segment": lambda data: flipped(data, len(data) - 9),
    "cut in the head": lambda data: data[:20],
    "cut in the header": lambda data: data[:300],
    "cut in a segment": lambda data: data[:-1],
    "nothing": lambda data: b"",
    "what somebody else put there": lambda data: b"no object" * 99,
    "another chunk's": None,
}


def flipped(data, at, bit=1):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def test_damage_is_a_miss_and_goes(url, machine, options, kv, key, object_of, same):
    keys = {what: key(number) for number, what in enumerate(DAMAGE)}
    one = machine(url, **options)
    one.put_many([(name, kv(number, tokens=900), 0.0) for number, name in enumerate(keys.values())])
    one.flush()
    other = object_of(key(0)).read_bytes()
    for what, damage in DAMAGE.items():
        file = object_of(keys[what])
        file.write_bytes(damage(file.read_bytes()) if damage else other)
    two = machine(url, **options)
    for what, name in keys.items():
        assert two.get(name) is None, f"served in spite of damage: {what}"
    assert two.stats().evictions["remote"] == {"damaged": len(keys)} and not two.stats().pools["remote"].unanswered
    two.flush()
    assert not [what for what, name in keys.items() if object_of(name).exists()]
    assert two.missing(list(keys.values())) == list(keys.values())
    two.put(key(0), kv(0, tokens=900))
    two.flush()
    same(machine(url, **options).get(key(0)), kv(0, tokens=900))


def test_bits_flipped_anywhere_give_no_wrong_number(sent, url, machine, options, kv, key, same):
    file, _ = sent
    data, chance = file.read_bytes(), random.Random(5)
    store = machine(url, **options)
    for _ in range(20):
        at = chance.choice([chance.randrange(len(data)), chance.randrange(3000)])
        file.write_bytes(flipped(data, at, 1 << chance.randrange(8)))
        assert store.get(key(1)) is None, at
        store.flush()
    file.write_bytes(data)
    same(store.get(key(1)), kv(1, tokens=900))


def test_what_damaged_it_was_replaced_meanwhile_stays(sent, url, machine, options, key, same, kv):
    file, sender = sent
    store = machine(url, range_bytes=1000, **options)
    with store.read([key(1)]) as batch:
        sender.remove(key(1))
        sender.flush()
        sender.put(key(1), kv(2, tokens=900))
        sender.flush()
        with pytest.raises(RecordError):
            batch.kv(0)
    store.flush()
    assert file.exists(), "a whole object was deleted for one that it replaced"
    same(store.get(key(1)), kv(2, tokens=900))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"encryption_key": SECRET}, {}),
        ({}, {"encryption_key": SECRET}),
        ({"encryption_key": SECRET}, {"encryption_key": SECRET[::-1]}),
    ],
    ids=["no key", "not encrypted", "another key"],
)
def test_what_is_encrypted_otherwise_is_left(url, machine, written, read, kv, key, object_of):
    one, two = machine(url, **written), machine(url, **read)
    one.put(key(1), kv(1))
    one.flush()
    data = object_of(key(1)).read_bytes()
    assert two.get(key(1)) is None
    two.put(key(1), kv(1))
    two.flush()
    pool = two.stats().pools["remote"]
    assert (pool.foreign, pool.sent, pool.skipped) == (1, 0, 1)
    assert object_of(key(1)).read_bytes() == data and not two.stats().evictions.get("remote")


def test_an_object_of_another_version_is_left(sent, url, machine, options, key, monkeypatch):
    file, _ = sent
    monkeypatch.setattr("ragkv.store.remote.envelope.VERSION", 9)
    store = machine(url, **options)
    assert store.get(key(1)) is None and store.stats().pools["remote"].foreign == 1
    store.flush()
    assert file.exists()


def test_nothing_of_a_chunk_stands_in_an_encrypted_object(url, machine, kv, key, object_of):
    store = machine(url, encryption_key=SECRET)
    chunk = kv(1, tokens=60)
    store.put(key(1), chunk, label="who it is of", space="which model")
    store.flush()
    data = object_of(key(1)).read_bytes()
    for plain in (b"who it is of", b"which model", chunk.keys[0].numpy().tobytes()[:64], SECRET):
        assert plain not in data
    assert repr(Envelope(SECRET)) == "Envelope(encryption_key=...)"


def test_without_the_key_nobody_forges_a_chunk(url, machine, kv, key):
    """Whoever may write a pool that is not encrypted may write wrong KV, as into a folder."""
    forger = machine(url, encryption_key=bytes(32))
    forger.put(key(1), kv(66))
    forger.flush()
    store = machine(url, encryption_key=SECRET)
    assert store.get(key(1)) is None and store.stats().pools["remote"].foreign == 1


def test_an_encrypted_object_is_bound_to_its_chunk(url, machine, kv, key, object_of):
    """Also where whoever copied it wrote the checksum anew, which needs no key."""
    store = machine(url, encryption_key=SECRET)
    store.put(key(1), kv(1))
    store.flush()
    data = object_of(key(1)).read_bytes()
    head, segments = data[:28], 36 + int.from_bytes(data[24:28], "little")
    checksum = xxhash.xxh3_64_intdigest(key(2) + head + data[36:segments]).to_bytes(8, "little")
    object_of(key(2)).parent.mkdir(exist_ok=True)
    object_of(key(2)).write_bytes(head + checksum + data[36:])
    assert store._tiers.behind[0].find([key(2)]) == {} and store.stats().pools["remote"].foreign == 1


def test_no_two_pieces_are_encrypted_alike(url, machine, key, object_of):
    """Equal segments, of one object and of two of the same chunk: else they could be told, and AES-GCM would be broken."""
    store, pieces = machine(url, encryption_key=SECRET), []
    for _ in range(2):
        store.put(key(1), ChunkKV([torch.zeros(2, 900, 8)] * 9, [torch.zeros(2, 900, 8)] * 9, 0))
        store.flush()
        data = object_of(key(1)).read_bytes()
        opened = Envelope(SECRET).open(key(1), data)
        places = map(opened.place, range(len(opened.record.spans)))
        pieces += [data[start : start + 64] for start, _ in places]
        store.remove(key(1))
        store.flush()
    assert len(pieces) >= 4 and len(set(pieces)) == len(pieces)


@pytest.mark.parametrize("secret", [b"short", "x" * 32, bytes(33)])
def test_keys_that_are_none(secret):
    with pytest.raises(StoreError, match="32 bytes"):
        RemoteTier("memory://none", encryption_key=secret)


@pytest.mark.parametrize(
    "url",
    [
        *("bucket", "ftp://host/x", "s3://", "http://host/x", "redis://host:port/x"),
        # The root of the file system.
        *("file://", "file:///"),
        # The client would take the database 0, or fail when it is used.
        *("redis://host/team", "redis://host/0?wrong=1"),
        # Or leave out what is behind.
        *("file:///tmp/team#1", "file:///tmp/team?1", "s3://bucket/team#1", "s3://bucket/team?x=1", "redis://host/0#1"),
    ],
)
def test_urls_that_are_none(url):
    with pytest.raises(StoreError):
        RemoteTier(url)


@pytest.mark.parametrize("letter", "#?/")
def test_a_password_with_a_letter_that_parts_urls_is_not_told(letter):
    with pytest.raises(StoreError) as wrong:
        RemoteTier(f"redis://:hunter2{letter}more@host:6379/0")
    assert "hunter2" not in str(wrong.value) and "more" not in str(wrong.value)


@pytest.mark.parametrize("option", ["limit_s", "requests", "uploads", "range_bytes", "refresh_s"])
def test_settings_that_are_none(option):
    with pytest.raises(ArgumentError, match=option):
        RemoteTier("memory://none", **{option: 0})
    with pytest.raises(ArgumentTypeError, match=option):
        RemoteTier("memory://none", **{option: "1"})


@pytest.mark.parametrize("option", [{"limit_s": float("inf")}, {"readonly": "no"}, {"name": 5}, {"levels": 5}], ids=str)
def test_settings_that_no_client_takes(option):
    (name,) = option
    with pytest.raises((ArgumentError, ArgumentTypeError), match=name):
        RemoteTier("s3://bucket/prefix", **option)
    if name == "readonly":
        with pytest.raises(ArgumentTypeError, match=name):
            TieredStore(**option)


@pytest.mark.parametrize("remote", [5, b"s3://bucket", ["s3://bucket"]])
def test_pools_that_are_none(remote):
    with pytest.raises(ArgumentTypeError, match="URL"):
        TieredStore(remote=remote)
    with pytest.raises(ArgumentTypeError, match="URL"):
        RemoteTier(remote)


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("obstore", "s3://b/p", "remote"),
        ("redis", "redis://h", "redis"),
        ("mooncake.store", "mooncake://h", "mooncake"),
        ("cryptography.hazmat.primitives", "", "encryption"),
    ],
)
def test_what_is_not_installed_is_named(monkeypatch, module, url, extra):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingPackageError, match=rf"ragkv\[{extra}\]"):
        RemoteTier(url) if url else Envelope(SECRET)


def test_no_secret_is_told_or_kept(tmp_path, kv, key, caplog, machine):
    store = machine("redis://user:hunter2@127.0.0.1:1/0", limit_s=0.2)
    store.put(key(1), kv(1))
    with pytest.raises(UploadError) as late:
        store.flush(0.1)
    with pytest.raises(StoreError) as wrong:
        RemoteTier("redis://user:hunter2@127.0.0.1:port/0?password=hunter2")
    assert store.get(key(2)) is None
    said = f"{late.value} {wrong.value} {wrong.value.__cause__} {store.stats()} {caplog.text}"
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "redis://127.0.0.1:1" in said and "hunter2" not in said and b"hunter2" not in files


def test_what_proves_damaged_long_after_it_was_found_is_not_deleted_unseen(sent, url, machine, options, kv, key, same):
    """Another object may have come in its place; which one it was is known of the last few thousand alone."""
    file, _ = sent
    whole = file.read_bytes()
    file.write_bytes(flipped(whole, len(whole) - 9))
    store = machine(url, **options)
    with store.read([key(1)]) as batch:
        store.remote._heads.seen.clear()
        with pytest.raises(RecordError):
            batch.kv(0)
        file.write_bytes(whole)
    store.flush()
    assert store.get(key(1)) is None, "it is left alone"
    same(machine(url, **options).get(key(1)), kv(1, tokens=900))
