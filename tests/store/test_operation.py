"""Prefetching, statistics and metrics."""

from __future__ import annotations

import pytest
import torch

from ragkv.errors import StoreError
from ragkv.store import TieredStore
from ragkv.store.metrics import StoreCollector


def test_prefetched_chunks_are_read_from_memory(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=300))
    with TieredStore(folder) as store:
        before = store._disk.row(key(0)).usage.frequency
        assert store.prefetch([key(0), key(1), key(9), key(0)]).result(30) == 2 * kv(0, tokens=300).nbytes
        with store.read([key(0), key(1), key(2)]) as batch:
            assert batch.tiers == ["cpu", "cpu", "disk"]
            assert torch.equal(batch.layer(1, 2)[0], kv(1, tokens=300).keys[2])
        store.flush()
        assert store._disk.row(key(0)).usage.frequency == before + 1
        assert store.stats().hits == {"gpu": 0, "cpu": 2, "disk": 1}


def test_prefetch_drops_what_is_damaged(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1, tokens=300))
        env = store._disk.environment
        with env.write() as txn:
            data = bytearray(txn.get(key(1) + bytes(4), db=env.db(b"segments")))
            data[5] ^= 1
            txn.put(key(1) + bytes(4), bytes(data), db=env.db(b"segments"))
    with TieredStore(folder) as store:
        store.prefetch([key(1)]).result(30)
        assert store.get(key(1)) is None
        assert not store.contains(key(1))


def test_store_is_closed_while_it_prefetches(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(20):
            store.put(key(number), kv(number, tokens=300))
    with TieredStore(folder) as store:
        for _ in range(5):
            store.prefetch([key(number) for number in range(20)])
    with pytest.raises(StoreError, match="closed"):
        store.prefetch([key(0)])


def test_stats(folder, kv, key):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1, tokens=300))
        with store.read([key(1), key(2)]):
            pass
        stats = store.stats()
        assert stats.entries == {"gpu": 0, "cpu": 1, "disk": 1}
        assert stats.bytes["cpu"] == stats.bytes_written == kv(1, tokens=300).nbytes
        assert stats.bytes["disk"] <= stats.file_bytes
        assert (stats.hits["cpu"], stats.misses, stats.tokens_hit, stats.puts) == (1, 1, 300, 1)
        assert {"encode", "write", "find"} <= set(stats.seconds)


def test_metrics(folder, kv, key):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    with TieredStore(folder) as store:
        StoreCollector(store, registry)
        store.put(key(1), kv(1))
        store.get(key(1))
        assert registry.get_sample_value("ragkv_store_hits_total", {"tier": "cpu"}) == 1
        assert registry.get_sample_value("ragkv_store_entries", {"tier": "disk"}) == 1
        assert registry.get_sample_value("ragkv_store_puts_total") == 1
