"""Prefetching, statistics and metrics."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from ragkv.errors import RecordError, StoreError
from ragkv.store import TieredStore
from ragkv.store.maintenance import history
from ragkv.store.metrics import StoreCollector
from ragkv.store.record import Record
from ragkv.store.stats import Latency, Tally


def test_prefetched_chunks_are_read_from_memory(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=300))
    with TieredStore(folder) as store:
        before = store._disk.row(key(0)).usage.frequency
        moved, size = {}, kv(0, tokens=300).nbytes
        assert store.prefetch([key(0), key(1), key(9), key(0)], moved).result(30) == 2 * size
        assert moved == {key(0): ("disk", size), key(1): ("disk", size)}
        assert store.prefetch([key(0)], moved).result(30) == 0 and len(moved) == 2
        with store.read([key(0), key(1), key(2)], moved) as batch:
            assert batch.tiers == ["cpu", "cpu", "disk"]
            assert torch.equal(batch.layer(1, 2)[0], kv(1, tokens=300).keys[2])
        store.flush()
        assert store._disk.row(key(0)).usage.frequency == before + 1
        assert store.stats().hits == {"gpu": 0, "cpu": 0, "disk": 3}, "they were moved for this batch"
        with store.read([key(0), key(1)]):
            assert store.stats().hits == {"gpu": 0, "cpu": 2, "disk": 3}


def test_prefetch_drops_what_is_damaged(folder, kv, key, damage):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1, tokens=300))
        damage(store, key(1) + bytes(4), 5)
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
        assert {"encode", "write", "find"} <= set(stats.latency)


def test_latency_quantiles_and_sums():
    one, two = Latency(), Latency()
    for number in range(1, 101):
        (one if number % 2 else two).add(number / 1000)
    one.merge(two)
    assert (one.count, one.total_s) == (100, pytest.approx(5.05))
    assert one.median_s == pytest.approx(0.050, rel=0.06)
    assert one.p95_s == pytest.approx(0.095, rel=0.06)
    assert one.quantile(1.0) == pytest.approx(0.100, rel=0.06)
    assert one.below(1.0) == 100 and 9 <= one.below(0.0101) <= 11
    assert (Latency().median_s, Latency().p95_s) == (0.0, 0.0)


def test_history_adds_up_over_processes_and_survives_damage(folder, kv, key, forked):
    def use():
        with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
            for number in range(60):
                store.put(key(number), kv(number, tokens=60))
            store.get(key(59)), store.get(key(404))
            done = store.stats()
        return done.evictions["disk"]["budget"]

    evicted = [int(forked(use)) for _ in range(3)]
    with TieredStore(folder, cpu_bytes=0) as store:
        assert store.stats().puts == 0, "in this process"
    done = history(folder)
    assert (done.puts, done.hits["disk"], done.misses) == (180, 3, 3)
    assert done.evictions["disk"]["budget"] == sum(evicted) > 0
    assert done.latency["write"].count == 180 and done.latency["load"].count == 3
    assert done.bytes_written == 180 * kv(0, tokens=60).nbytes
    with TieredStore(folder, cpu_bytes=0) as store:
        env = store._disk.environment
        with env.transaction(write=True) as txn:
            txn.put("state", b"history", b"{}" + bytes(8))
        store.get(key(59))
    assert history(folder).hits["disk"] == 1, "numbers that are lost begin anew"


def test_a_forked_child_does_not_count_what_its_parent_did(folder, kv, key, forked):
    with TieredStore(folder, disk_bytes=100_000) as store:
        for number in range(40):
            store.put(key(number), kv(number, tokens=60))
        evicted = store.stats().evictions["disk"]["budget"]

        def child():
            with store:
                store.get(key(404))

        assert "raised" not in forked(child)
    done = history(folder)
    assert (done.puts, done.misses, done.evictions["disk"]["budget"]) == (40, 1, evicted)


def test_every_closing_leaves_a_sample(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.stats()
    assert history(folder).samples == [], "nothing was done"
    for number in range(3):
        with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
            store._disk.now = lambda number=number: 1000.0 + number
            for entry in range(12 * number, 12 * number + 12):
                store.put(key(entry), kv(entry, tokens=60))
            store.get(key(12 * number + 11)), store.get(key(404))
            held = store.stats()
    first, *samples = history(folder).samples
    assert (first.hits, first.misses, first.evictions) == ({"gpu": 0, "cpu": 0, "disk": 0}, 0, {})
    assert [(sample.at_s, sample.hits["disk"], sample.misses) for sample in samples] == [
        (1000.0, 1, 1),
        (1001.0, 2, 2),
        (1002.0, 3, 3),
    ]
    assert (samples[-1].entries, samples[-1].bytes) == (held.entries["disk"], held.bytes["disk"])
    assert samples[-1].evictions == {"disk": 36 - samples[-1].entries}


def test_a_history_of_an_earlier_version_has_no_samples_and_gets_some():
    done = Tally(misses=5)
    facts = json.loads(done.to_bytes())
    del facts["samples"]
    earlier = Tally.from_bytes(json.dumps(facts).encode())
    assert (earlier.misses, earlier.samples) == (5, [])
    earlier.add_closing(done, 7.0, 3, 4096)
    assert [(sample.misses, sample.entries) for sample in earlier.samples] == [(5, 3), (10, 3)]
    assert Tally.from_bytes(earlier.to_bytes()).samples == earlier.samples


def test_samples_stay_few_and_the_first_and_the_last_ones_stay():
    tally = Tally()
    for number in range(2000):
        tally.add_closing(Tally(misses=1), float(number), number, number)
    assert len(tally.samples) <= 400 and len(tally.to_bytes()) < 50_000
    assert tally.samples[0].misses == 0
    assert [sample.misses for sample in tally.samples[-200:]] == list(range(1801, 2001))
    times = [sample.at_s for sample in tally.samples]
    assert times == sorted(times)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"hits": 3}',
        Tally().to_bytes().replace(b"0", b'"x"', 1),
        Tally().to_bytes().replace(b'"samples":[]', b'"samples":[[1]]'),
    ],
)
def test_numbers_that_cannot_be_read(data):
    with pytest.raises(RecordError):
        Tally.from_bytes(data)


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
        assert registry.get_sample_value("ragkv_store_seconds_count", {"stage": "write"}) == 1
        assert registry.get_sample_value("ragkv_store_seconds_bucket", {"stage": "write", "le": "+Inf"}) == 1
        assert registry.get_sample_value("ragkv_store_seconds_bucket", {"stage": "write", "le": "1e-05"}) == 0
        assert registry.get_sample_value("ragkv_store_seconds_sum", {"stage": "write"}) > 0


def test_what_threads_write_at_once_is_counted(folder, kv, key, monkeypatch):
    """Another thread's put ends between the reading of the sum and the writing of it."""
    size, others = Record.payload_bytes.fget, []
    with TieredStore(folder, cpu_bytes=0) as store:

        def meanwhile(record):
            if not others:
                others.append(threading.Thread(target=store.put, args=(key(2), kv(2))))
                others[0].start()
                others[0].join()
            return size(record)

        store.put(key(0), kv(0))
        one = store.stats().bytes_written
        with monkeypatch.context() as patch:
            patch.setattr(Record, "payload_bytes", property(meanwhile))
            store.put(key(1), kv(1))
        assert others and store.stats().bytes_written == 3 * one
