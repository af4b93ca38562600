"""A transaction by name of database, and the seals of what is kept."""

from __future__ import annotations

import pytest

from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment, seal, unseal

DATABASES = {b"plain": {}, b"several": {"dupsort": True}}
SEALED = "ba234f9cc3075d178b6efa01ffafe7fc77686174206973206b657074"


@pytest.fixture
def environment(tmp_path):
    environment = Environment.open(tmp_path, DATABASES)
    yield environment
    environment.close()


def test_keys_and_values(environment):
    with environment.transaction(write=True) as txn:
        for key in (b"b1", b"a", b"b2", b"c", b"b"):
            txn.put("plain", key, key.upper())
        txn.put("plain", b"c", b"another")
        assert txn.delete("plain", b"a") and not txn.delete("plain", b"a")
    with environment.transaction() as txn:
        assert txn.get("plain", b"b1") == b"B1" and txn.get("plain", b"a") is None
        assert dict(txn.items("plain")) == {b"b": b"B", b"b1": b"B1", b"b2": b"B2", b"c": b"another"}
        assert list(txn.items("plain", b"b")) == [(b"b", b"B"), (b"b1", b"B1"), (b"b2", b"B2")]
        assert list(txn.keys("plain", b"b")) == [b"b", b"b1", b"b2"] and list(txn.keys("plain", b"z")) == []
        assert list(txn.keys("plain")) == [b"b", b"b1", b"b2", b"c"]
        assert list(txn.items("plain", b"b", b"1x")) == [(b"b2", b"B2")], "from there on, not beyond the prefix"
        assert txn.has("plain", b"b1") and not txn.has("plain", b"a")
        assert bytes(txn.view("plain", b"b1")) == b"B1" and txn.view("plain", b"a") is None
        assert txn.count("plain") == 4 and txn.count("several") == 0
    with environment.transaction(write=True) as txn:
        txn.clear("plain")
    with environment.transaction() as txn:
        assert list(txn.keys("plain")) == [] and txn.get("plain", b"c") is None


def test_several_values_under_a_key(environment):
    with environment.transaction(write=True) as txn:
        for value in (b"2", b"1", b"3", b"2"):
            txn.put("several", b"k", value)
        txn.put("several", b"l", b"1")
        assert txn.get("several", b"k") == b"1" and list(txn.values("several", b"k")) == [b"1", b"2", b"3"]
        assert txn.delete("several", b"k", b"2") and not txn.delete("several", b"k", b"2")
        assert list(txn.values("several", b"k")) == [b"1", b"3"] and list(txn.values("several", b"m")) == []
        assert list(txn.keys("several")) == [b"k", b"k", b"l"] and txn.count("several") == 3
        assert txn.delete("several", b"k") and list(txn.values("several", b"k")) == []


def test_it_is_kept_whole_or_not_at_all(environment):
    with pytest.raises(KeyError), environment.transaction(write=True) as txn:
        txn.put("plain", b"a", b"1")
        raise KeyError
    with environment.transaction() as before:
        with environment.transaction(write=True) as txn:
            txn.put("plain", b"b", b"2")
        assert before.get("plain", b"b") is None and before.get("plain", b"a") is None
    with environment.transaction() as after:
        assert list(after.items("plain")) == [(b"b", b"2")]
    for over in (before, after, txn):
        with pytest.raises(StoreError, match="is over"):
            over.get("plain", b"b")


def test_a_seal_binds_bytes_to_their_key():
    sealed = seal(b"key", b"what is kept")
    assert unseal(b"key", sealed) == b"what is kept"
    # 16 bytes of XXH3 over key and data, high half first, then the data.
    assert sealed.hex() == SEALED and seal(b"", b"") == bytes.fromhex("99aa06d3014798d86001c324468d497f")
    for key, record in ((b"other", sealed), (b"key", sealed[:-1]), (b"key", sealed[:15]), (b"key", b"")):
        with pytest.raises(RecordError, match="the row is damaged"):
            unseal(key, record, "the row")
    for place in range(len(sealed)):
        with pytest.raises(RecordError):
            unseal(b"key", sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
