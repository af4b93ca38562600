"""Tiers of one's own, behind memory and disk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ragkv.errors import RecordError, StoreError
from ragkv.store import TieredStore
from ragkv.store.payload import Payload
from ragkv.store.policy import Usage
from ragkv.store.record import Record
from ragkv.store.rows import Row
from ragkv.store.source import InMemory
from ragkv.store.tier import Tier


class FolderTier(Tier):
    """A pool of safetensors files, as a remote one would be: a tier is this much."""

    name = "pool"

    def __init__(self, folder):
        super().__init__()
        self.folder, self.budget_bytes = folder, 1 << 40
        folder.mkdir()

    def find(self, keys):
        found = {}
        for key in keys:
            if self._file(key).is_file():
                data = self._file(key).read_bytes()
                size = 8 + int.from_bytes(data[:8], "little")
                record, payload = Record.from_safetensors_header(data[:size]), Payload(len(data) - size)
                payload.data[:] = torch.frombuffer(bytearray(data[size:]), dtype=torch.uint8)
                found[key] = InMemory(record, payload, self.name)
        return found

    def missing(self, keys):
        return [key for key in keys if not self._file(key).is_file()]

    def row(self, key):
        return Row(Usage(1)) if self._file(key).is_file() else None

    def admit(self, entries):
        for entry in entries:
            self._file(entry.key).write_bytes(entry.record.safetensors_header() + entry.payload.data.numpy().tobytes())
        return [True] * len(entries)

    def remove(self, keys, reason=None):
        gone = [key for key in keys if self._file(key).is_file()]
        for key in gone:
            self._file(key).unlink()
        return gone

    def counts(self):
        files = list(self.folder.iterdir())
        return len(files), sum(file.stat().st_size for file in files)

    def _file(self, key):
        return self.folder / key.hex()


@pytest.fixture(params=["behind memory", "behind disk"])
def pooled(request, folder, tmp_path):
    """A store of little room with a pool behind it."""
    path = folder if request.param == "behind disk" else None
    tiers = [FolderTier(tmp_path / "pool")]
    with TieredStore(path, cpu_bytes=100_000, disk_bytes=100_000, tiers=tiers) as store:
        yield store


def test_a_tier_of_ones_own_behind_the_others(pooled, kv, key, same):
    for number in range(30):
        pooled.put(key(number), kv(number, tokens=60))
    assert pooled.stats().entries["pool"] == 30 > len(pooled)
    with pooled.read([key(0), key(29), key(99)]) as batch:
        assert (batch.tiers[0], batch.tiers[2]) == ("pool", None) and batch.tiers[1] in ("cpu", "disk")
        assert torch.equal(batch.layer(0, 1)[0], kv(0, tokens=60).keys[1])
    for number in range(30):
        same(pooled.get(key(number)), kv(number, tokens=60))
    assert pooled.missing([key(0), key(99), key(5), key(99)]) == [key(99)]
    hits = pooled.stats().hits
    assert hits["pool"] > 0 and sum(hits.values()) == 32
    assert pooled.remove_many([key(0), key(29), key(99)]) == 2
    assert pooled.get(key(0)) is None and pooled.stats().entries["pool"] == 28


def test_what_a_tier_behind_has_comes_to_memory(pooled, kv, key, same):
    for number in range(30):
        pooled.put(key(number), kv(number, tokens=60))
    assert pooled.contains(key(0))
    for _ in range(40):
        same(pooled.get(key(0)), kv(0, tokens=60))
    with pooled.read([key(0)]) as batch:
        assert batch.tiers == ["cpu"]


def test_names_of_tiers_differ(tmp_path):
    with pytest.raises(StoreError, match="names"):
        TieredStore(tiers=[FolderTier(tmp_path / name) for name in "ab"])


@pytest.mark.parametrize("error", [StoreError("the network is down"), ConnectionError("the network is down")])
def test_a_tier_behind_that_is_not_there_is_a_miss(pooled, kv, key, same, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    pooled.put(key(1), kv(1))
    for name in ("find", "missing", "touch", "admit", "damaged", "counts"):
        monkeypatch.setattr(pooled._tiers.behind[0], name, fail)
    assert pooled.put(key(2), kv(2))
    with pooled.read([key(1), key(2), key(3)]) as batch:
        assert batch.tiers[2] is None
        same(batch.kv(1), kv(2))
    assert pooled.missing([key(1), key(3)]) == [key(3)]
    assert pooled.stats().entries["pool"] == 0
    pooled._tiers.drop_damaged(key(1), SimpleNamespace(tier="pool", key=b""), RecordError("damaged"))
    assert "network is down" in caplog.text


def test_what_a_tier_behind_cannot_remove_is_removed_elsewhere(pooled, kv, key, monkeypatch):
    def fail(*_):
        raise StoreError("the network is down")

    pooled.put(key(1), kv(1))
    monkeypatch.setattr(pooled._tiers.behind[0], "remove", fail)
    with pytest.raises(StoreError, match="network"):
        pooled.remove(key(1))
    with pooled.read([key(1)]) as batch:
        assert batch.tiers == ["pool"]


@pytest.mark.parametrize("call", ["find", "missing"])
def test_what_home_cannot_read_is_said_and_no_miss(folder, kv, key, monkeypatch, call):
    """Only a tier behind may fail without an error: home is where a chunk is, or is not."""

    def fails(*_):
        raise StoreError("every reader slot is taken")

    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        with monkeypatch.context() as patch:
            patch.setattr(store._disk, call, fails)
            with pytest.raises(StoreError, match="reader slot"):
                store.get(key(1)) if call == "find" else store.missing([key(1)])
        assert store.get(key(1)) is not None
