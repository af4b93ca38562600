"""A row of the books that proves damaged costs its own entry, and nothing that is summed up, ordered or due."""

from __future__ import annotations

import pytest

from ragkv.errors import StoreFullError
from ragkv.store import TieredStore


def forget(store, name):
    """A row is lost to damage, which the next write meets."""
    with store._disk.environment.transaction(write=True) as txn:
        row = bytearray(txn.get("usage", name))
        row[3] ^= 1
        txn.put("usage", name, row)


def test_what_is_put_again_is_counted_once(folder, kv, key):
    """Its old place in the order is still there: evicted at both, it would seem to free its bytes twice."""
    with TieredStore(folder, cpu_bytes=0, policy="lru") as store:
        store.put(key(3), kv(3, tokens=400))
        budget = store.stats().bytes["disk"]
        store.remove(key(3))
    with TieredStore(folder, cpu_bytes=0, disk_bytes=budget, policy="lru") as store:
        store.put(key(0), kv(0, tokens=100))
        store.put(key(1), kv(1, tokens=100))
        forget(store, key(0))
        store.put(key(0), kv(0, tokens=100))
        store.put(key(2), kv(2, tokens=100))
        store.put(key(3), kv(3, tokens=400))
        assert store._disk.stored() == [key(3)] and store._disk.counters().used_bytes == budget


def test_a_ghost_that_is_put_again_stays(folder, kv, key, monkeypatch):
    monkeypatch.setattr("ragkv.store.planner.LEAST_GHOSTS", 2)
    monkeypatch.setattr("ragkv.store.planner.GHOSTS_PER_ENTRY", 0)
    with TieredStore(folder, cpu_bytes=0, policy="lru") as store:
        store.put(key(0), kv(0))
        store._disk.remove([key(0)], "budget")  # a ghost now
        forget(store, key(0))
        store.put(key(0), kv(0))
        for number in range(1, 8):
            store.put(key(number), kv(number))
            store._disk.remove([key(number)], "budget")
        assert store.contains(key(0))
        assert store._disk.counters().ghosts == 2


def test_what_has_no_lifetime_any_more_does_not_expire(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(0), kv(0), lifetime_s=100.0)
        forget(store, key(0))
        store.put(key(0), kv(0))
        now = store._disk.now()
        store._disk.now = lambda: now + 200.0
        store.put(key(1), kv(1))
        assert store.contains(key(0))


def test_what_expires_goes_without_its_row(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, policy="lrfu") as store:
        store.put(key(0), kv(0), lifetime_s=100.0)
        store.put(key(1), kv(1))
        forget(store, key(0))
        store.put(key(2), kv(2))  # finds the row damaged
        now = store._disk.now()
        store._disk.now = lambda: now + 200.0
        store.put(key(3), kv(3))
        assert store._disk.stored() == sorted([key(1), key(2), key(3)])


def test_what_nobody_could_evict_any_more_goes(folder, kv, key):
    """With the write that finds the row damaged: without one nothing counts what lies there."""
    with TieredStore(folder, cpu_bytes=0, policy="lru") as store:
        store.put(key(0), kv(0))
        size = store.stats().bytes["disk"]
    with TieredStore(folder, cpu_bytes=0, disk_bytes=3 * size, policy="lru") as store:
        store.put(key(1), kv(1))
        store.put(key(2), kv(2))
        forget(store, key(0))
        store.put(key(3), kv(3))  # looks for the least
        stored = store._disk.stored()
        assert key(0) not in stored and store._disk.counters().used_bytes == len(stored) * size
        assert store.stats().evictions["disk"]["damaged"] == 1
        forget(store, key(3))
        store.put(key(3), kv(3))  # what is put again stays
        assert store._disk.stored() == stored and store.get(key(3)) is not None


def test_a_namespace_has_its_quota_again(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(0), kv(0, tokens=100), namespace="a")
        size = store.stats().bytes["disk"]
        store.put(key(1), kv(1, tokens=100), namespace="b")
        store.set_quota("a", 2 * size)
        forget(store, key(0))
        store.put(key(0), kv(0, tokens=100), namespace="a")
        store.put(key(2), kv(2, tokens=100), namespace="a")
        assert store.contains(key(0)) and store.contains(key(1)), "it has room for two"
        with pytest.raises(StoreFullError):
            store.put(key(3), kv(3, tokens=1000), namespace="a")


@pytest.mark.parametrize("damaged", ["a row", "the counters"])
def test_the_clock_goes_on(folder, kv, key, damage, damaged):
    """Else whatever is used from now on would be worth less than all that is there."""
    with TieredStore(folder, cpu_bytes=0, disk_bytes=200_000, policy="pgdsf") as store:
        for number in range(60):
            store.put(key(number), kv(number, tokens=60), cost_s=1.0)
        before = store._disk.counters()
        assert before.clock > 0
        name = store._disk.stored()[0]
        forget(store, name) if damaged == "a row" else damage(store, b"counters", 20, "state")
        store._disk.touch(store._disk.stored())
        store.flush()
        after = store._disk.counters()
        assert after.clock >= before.clock and after.tick > before.tick
        rows = [store._disk.row(each) for each in store._disk.stored() if damaged != "a row" or each != name]
        with store._disk.environment.transaction() as txn:
            known = list(txn.keys("usage"))
        assert after.ghosts == len(known) - len(rows) > 0
        assert after.used_bytes == sum(row.usage.size_bytes for row in rows)


def test_a_row_that_is_met_while_another_is_written_down_leaves_that_counted(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, policy="lrfu") as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=60))
        used = store._disk.counters().used_bytes
    with TieredStore(folder, cpu_bytes=0, disk_bytes=used, policy="lrfu") as store:
        forget(store, key(1))
        store.put(key(3), kv(3, tokens=60))  # in the place of the first: the second is the least then
        rows = [store._disk.row(key(number)) for number in range(4)]
        assert store._disk.counters().used_bytes == sum(row.usage.size_bytes for row in rows if row) == used * 2 // 3
