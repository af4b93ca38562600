"""A key for each namespace: whoever has one namespace's reads nothing of another's, and nothing is sent that none is there for."""

from __future__ import annotations

import pytest
import torch

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError
from ragkv.store.remote.ciphers import KEY_EACH, Ciphers
from ragkv.store.remote.envelope import Envelope, ForeignError
from ragkv.store.remote.publications import KEYS
from ragkv.store.remote.records import name_of
from ragkv.store.rows import namespace_id

A, B, NOBODYS = bytes(range(32)), bytes(range(1, 33)), bytes(32)
ALL = {"a": A, "b": B, "": NOBODYS}


@pytest.fixture
def filled(url, machine, kv, key):
    """A pool with a chunk of each namespace, and one of a namespace without a key."""
    store = machine(url, encryption_key=ALL)
    for number, namespace in enumerate(("a", "b", "", "c")):
        store.put(key(number), kv(number), namespace=namespace)
    store.flush()
    return store


def has(store, key):
    return [number for number in range(4) if store.get(key(number)) is not None]


def test_each_reads_its_own(filled, url, machine, kv, key, same, caplog):
    sent = filled.stats().pools["remote"]
    assert (sent.sent, sent.dropped) == (3, 1)
    assert "no key for its namespace" in "".join(said.getMessage() for said in caplog.get_records("setup"))
    assert filled.remote.lacking([key(number) for number in range(4)]) == [key(3)], "sent without a key"
    for keys, want in (
        (ALL, [0, 1, 2]),
        ({"a": A}, [0]),
        ({"b": B, "": NOBODYS}, [1, 2]),
        ({"a": B}, [1]),
        ({"c": A}, [0]),
    ):
        store = machine(url, encryption_key=keys)
        assert has(store, key) == want, "a name opens nothing, only a key does"
        assert store.stats().pools["remote"].foreign == 3 - len(want)
    same(machine(url, encryption_key={"a": A}).get(key(0)), kv(0))
    for other in (A, None):
        assert has(machine(url, encryption_key=other), key) == []


def test_what_is_added_to_the_keys_later_counts(filled, url, machine, key, kv):
    keys = {"a": A}
    store = machine(url, encryption_key=keys)
    assert has(store, key) == [0]
    keys["b"] = B
    assert has(store, key) == [0, 1]
    keys["new"] = bytes([9]) * 32
    store.put(key(8), kv(8), namespace="new")
    store.flush()
    assert machine(url, encryption_key={"new": bytes([9]) * 32}).contains(key(8))


def test_one_key_for_all_and_one_for_each_do_not_mix(url, machine, kv, key):
    one = machine(url, encryption_key=A)
    one.put(key(1), kv(1), namespace="a")
    one.flush()
    each = machine(url, encryption_key=ALL)
    assert each.get(key(1)) is None and each.stats().pools["remote"].foreign == 1
    each.put(key(1), kv(2), namespace="a")
    each.flush()
    assert machine(url, encryption_key=A).get(key(1)) is not None, "another's object was replaced"


def test_catalogues_are_of_their_namespaces(filled, url, machine, key):
    """Also where somebody who has a namespace's key puts his own under the name of another's."""
    mine, other = (machine(url, encryption_key=keys).remote.publications for keys in ({"a": A}, {"b": B}))
    publications = filled.remote.publications
    mine.put("a", "s", {"of": "a"}, {KEYS: key(0)})
    with pytest.raises(StoreError, match="no key for the namespace"):
        mine.put("b", "s", {}, {KEYS: b""})
    assert publications.get("a", "s").facts == {"of": "a"}
    with pytest.raises(ForeignError):
        other.get("a", "s")
    with pytest.raises(ForeignError):
        other.keys()
    assert publications.keys() == {key(0)}
    forger = machine(url, encryption_key={"b": A}).remote.publications
    forger.put("b", "s", {"of": "a"}, {KEYS: b""})
    with pytest.raises(ForeignError):
        publications.get("b", "s")
    with pytest.raises(ForeignError):
        publications.take("b", "s", lambda found: [KEYS])


def test_a_pool_of_many_keys_is_pruned_by_who_has_all(filled, url, machine, key):
    filled.remote.publications.put("a", "s", {}, {KEYS: key(0)})
    filled.remote.publications.put("b", "s", {}, {KEYS: b""})
    some = machine(url, encryption_key={"a": A, "": NOBODYS})
    with pytest.raises(ForeignError):
        some.remote.prune(0)
    assert some.remote.prune(older_than_s=0, dry_run=True).unreadable == 1
    assert filled.remote.prune(0).objects == 2
    assert {name for name, _ in filled.remote._pool.names() if "catalogues" not in name} == {name_of(key(0))}


def test_ids_tell_which_key_and_nothing_else():
    envelope = Ciphers(ALL)
    ids = {secret: [envelope.new_id(secret) for _ in range(20)] for secret in (A, B)}
    hints = {secret: {number[:4] for number in numbers} for secret, numbers in ids.items()}
    assert [len(found) for found in hints.values()] == [1, 1] and hints[A] != hints[B]
    assert len({number for numbers in ids.values() for number in numbers}) == 40
    assert all(len(number) == 16 for numbers in ids.values() for number in numbers)
    assert not any(secret[at : at + 4] in hints[secret] for secret in (A, B) for at in range(29))
    assert envelope.kind == KEY_EACH and "0102" not in repr(Envelope(ALL))


@pytest.mark.parametrize("keys", [{"a": b"short"}, {"a": A, "b": "x" * 32}, {3: A}, {"a": None}])
def test_keys_that_are_none(keys):
    with pytest.raises(StoreError, match="32 bytes"):
        Envelope(keys)


def test_two_namespaces_may_have_one_key(url, machine, key):
    store = machine(url, encryption_key={"a": A, "b": A})
    store.put(key(1), ChunkKV([torch.zeros(2, 9, 8)], [torch.zeros(2, 9, 8)], 0), namespace="b")
    store.flush()
    assert machine(url, encryption_key={"a": A}).get(key(1)) is not None
    assert store.remote._records._envelope.seals(namespace_id("b")) and not Envelope({}).seals(namespace_id("b"))


@pytest.mark.parametrize("count", [1, 30])
def test_what_cannot_be_read_with_this_key_is_missing(url, machine, kv, key, same, caplog, count):
    """So whoever adds with another key than the pool's reads what is there, once, and keeps it."""
    one, other = machine(url, encryption_key=A), machine(url, encryption_key=B)
    keys = [key(number) for number in range(count)]
    one.put_many([(each, kv(number), 0.0) for number, each in enumerate(keys)])
    one.flush()
    assert machine(url, encryption_key=A).missing(keys) == []
    caplog.clear()
    assert other.missing([key(99), *keys]) == [key(99), *keys] and other.remote.lacking(keys) == keys
    other.put_many([(each, kv(number), 0.0) for number, each in enumerate(keys)])
    other.flush()
    assert other.missing(keys) == [] and other.stats().pools["remote"].skipped == count
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and "is not read" in said[0] and "stays as it is" in said[1], (
        "once, whatever the number of chunks"
    )
    same(one.get(keys[-1]), kv(count - 1))
    same(machine(url, encryption_key=A).get(keys[-1]), kv(count - 1))


def test_of_two_keys_each_finds_its_own(url, machine, kv, key):
    for first, secret in ((0, A), (20, B)):
        store = machine(url, encryption_key=secret)
        store.put_many([(key(number), kv(number), 0.0) for number in range(first, first + 20)])
        store.flush()
    assert machine(url, encryption_key=A).missing([key(number) for number in range(40)]) == [
        key(number) for number in range(20, 40)
    ]


def test_what_has_expired_in_a_pool_is_missing(s3, machine, later, kv, key):
    """An object store keeps its bytes, and lists them."""
    one, two = machine(s3), machine(s3)
    one.put(key(1), kv(1), lifetime_s=600)
    one.flush()
    assert two.missing([key(1)]) == []
    assert later(two, 600).missing([key(1)]) == later(machine(s3), 600).missing([key(1)]) == [key(1)]
