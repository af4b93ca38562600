"""Pins, lifetimes, quotas, admission, and clocks that jump: the same for memory and disk."""

from __future__ import annotations

import math

import pytest

from ragkv.chunk import digest
from ragkv.errors import StoreError, StoreFullError
from ragkv.store import TieredStore, chunk_key

BUDGET = 200_000


class Clock:
    def __init__(self, now: float = 1e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "disk", "both"])
def make(request, folder):
    """Makes a store of one kind whose clocks, wall and steady, are ours."""

    def build(budget=BUDGET, **options):
        if request.param == "memory":
            store = TieredStore(cpu_bytes=budget, **options)
        else:
            memory = 0 if request.param == "disk" else budget
            store = TieredStore(folder, cpu_bytes=memory, disk_bytes=budget, **options)
        store.wall, store.steady = Clock(), Clock(50.0)
        for tier in store._tiers.tiers:
            tier.now = store.wall if tier.name == "disk" else store.steady
        return store

    return build


def pass_time(store, seconds):
    store.wall.now += seconds
    store.steady.now += seconds


def fill(store, kv, key, numbers, **terms):
    for number in numbers:
        store.put(key(number), kv(number, tokens=60), **terms)


def test_pinned_is_kept_until_it_is_unpinned(make, kv, key, same):
    with make() as store:
        store.put(key(0), kv(0, tokens=60))
        assert store.pin(key(0))
        assert not store.pin(key(1000)) and store.pin_many([key(0), key(1000), key(0)]) == 2
        fill(store, kv, key, range(1, 60), cost_s=1e6)
        same(store.get(key(0)), kv(0, tokens=60))
        assert store.unpin(key(0))
        fill(store, kv, key, range(60, 200), cost_s=1e6)
        assert store.get(key(0)) is None and not store.pin(key(0)), "what was evicted is remembered, and not stored"


@pytest.mark.parametrize("tokens", [60, 90])
def test_what_is_pinned_stays_so_when_it_is_put_again(make, kv, key, tokens):
    with make() as store:
        store.put(key(0), kv(0, tokens=60))
        store.pin(key(0), 10.0)
        store.put(key(0), kv(0, tokens=tokens))
        fill(store, kv, key, range(1, 60), cost_s=1e6)
        assert store.pinned([key(0)]) == [key(0)]
        pass_time(store, 11)
        fill(store, kv, key, range(60, 200), cost_s=1e6)
        assert not store.contains(key(0))


def test_what_is_pinned_is_put_again_whatever_it_is_worth(make, kv, key):
    with make(selective=True) as store:
        store.put(key(0), kv(0, tokens=60))
        store.pin(key(0))
        fill(store, kv, key, range(1, 6), cost_s=1e6)
        assert store.put(key(0), kv(0, tokens=240)) and store.pinned([key(0)]) == [key(0)]


def test_pin_with_a_lifetime_ends(make, kv, key):
    with make() as store:
        store.put(key(0), kv(0, tokens=60))
        store.pin(key(0), 10.0)
        pass_time(store, 9)
        fill(store, kv, key, range(1, 60), cost_s=1e6)
        assert store.contains(key(0))
        pass_time(store, 2)
        fill(store, kv, key, range(60, 200), cost_s=1e6)
        assert not store.contains(key(0))


def test_what_is_pinned_counts_before_anything_is_evicted(make, kv, key):
    with make() as store:
        fill(store, kv, key, range(100))
        there = [number for number in range(100) if store.contains(key(number))]
        for number in there:
            store.pin(key(number))
        with pytest.raises(StoreFullError):
            store.put(key(1000), kv(1000, tokens=60))
        assert all(store.contains(key(number)) for number in there)


def test_lifetime(make, kv, key, same):
    with make() as store:
        store.put(key(1), kv(1), lifetime_s=10.0)
        store.put(key(2), kv(2))
        pass_time(store, 9.9)
        same(store.get(key(1)), kv(1))
        pass_time(store, 0.2)
        assert not store.pin(key(1)) and not store.contains(key(1))
        assert store.get(key(1)) is None
        pass_time(store, 1e6)
        same(store.get(key(2)), kv(2))
        store.put(key(3), kv(3))
        assert len(store) == 2
        assert sum(reasons.get("expired", 0) for reasons in store.stats().evictions.values()) >= 1
        store.put(key(1), kv(1))
        pass_time(store, 1e6)
        same(store.get(key(1)), kv(1))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_lifetime_is_a_time(make, kv, key, bad):
    with make() as store:
        with pytest.raises(StoreError):
            store.put(key(1), kv(1), lifetime_s=bad)
        with pytest.raises(StoreError):
            store.pin(key(1), bad)
        with pytest.raises(StoreError):
            store.put(key(1), kv(1), cost_s=-1.0)


def test_wall_clock_that_jumps(make, kv, key, same):
    """Costs entries at most; what has no lifetime does not care, and no pin or entry lives for ever."""
    with make() as store:
        store.put(key(1), kv(1, tokens=60), lifetime_s=10.0)
        store.put(key(2), kv(2, tokens=60))
        store.put(key(3), kv(3, tokens=60))
        store.pin(key(3), 10.0)
        store.wall.now -= 1e8  # to a time before all of it
        store.steady.now += 20.0
        assert store.get(key(1)) is None
        same(store.get(key(2)), kv(2, tokens=60))
        fill(store, kv, key, range(10, 200), cost_s=1e6)
        assert not store.contains(key(3))
        store.wall.now += 1e9
        store.put(key(1), kv(1), lifetime_s=10.0)
        same(store.get(key(1)), kv(1))


def test_namespaces_have_different_keys():
    keys = {chunk_key("space", [1], b"", namespace) for namespace in ("", "a", "b")}
    assert len(keys) == 3
    assert chunk_key("s", [1, 2], b"c", "n") == digest("ragkv chunk 1", "s", "n", [1, 2], b"c")
    assert (
        chunk_key("space", [1, 2, 3], digest(b"", [7]), "tenant").hex()
        == "fd7489ffd21036d48117f755132395c612f6e4bc2f59abc35ad890bf97f768a5"
    )


def test_quota(make, kv, key, same):
    """A namespace evicts its own, and only its own, when it is at its quota. What is above may have copies of more."""

    def stored(numbers):
        return [number for number in numbers if not store._tiers.home.missing([key(number)])]

    with make() as store:
        store.set_quota("a", 60_000)
        store.put(key(0), kv(0, tokens=60))
        fill(store, kv, key, range(1, 30), namespace="a")
        mine = stored(range(1, 30))
        assert 1 <= len(mine) <= 6
        assert 29 in mine
        same(store.get(key(0)), kv(0, tokens=60))
        with pytest.raises(StoreFullError):
            store.put(key(99), kv(99, tokens=600), namespace="a")
        assert stored(range(1, 30)) == mine
        store.put(key(99), kv(99, tokens=300), namespace="b")
        store.set_quota("a", None)
        fill(store, kv, key, range(1, 12), namespace="a")
        assert len(stored(range(1, 12))) > len(mine)
        with pytest.raises(StoreError):
            store.set_quota("", 5)


def test_quota_survives(folder, kv, key):
    with TieredStore(folder) as store:
        store.set_quota("a", 30_000)
    with TieredStore(folder) as store:
        fill(store, kv, key, range(10), namespace="a")
        assert len(store) <= 3


def test_selective_store_is_not_flushed_by_what_is_asked_for_once(make, kv, key):
    with make(selective=True) as store:
        hot = range(8 if store._disk is None else 6)  # as many as fit
        for number in hot:
            assert store.put(key(number), kv(number, tokens=60), cost_s=1.0)
        for _ in range(20):
            for number in hot:
                assert store.get(key(number)) is not None
        kept = [store.put(key(number), kv(number, tokens=60), cost_s=1.0) for number in range(100, 110)]
        assert not all(kept)
        assert store.stats().refused == kept.count(False)
        assert all(store.contains(key(number)) for number in hot)
        for _ in range(60):
            store.put(key(1000), kv(1000, tokens=60), cost_s=1.0)
        assert store.contains(key(1000)), "what is asked for often is let in"


@pytest.mark.parametrize("bad", [b"", bytes(495), "text", 5])
def test_a_key_is_some_bytes(make, kv, key, bad):
    store = make()
    with pytest.raises(StoreError, match="1 to 494 bytes"):
        store.put_many([(key(1), kv(1), 0.0), (bad, kv(2), 0.0)])
    assert not store.contains(key(1))
    store.put(bytes(494), kv(1), namespace="of somebody", lifetime_s=60)
    store.pin(bytes(494), 5.0)
    assert store.contains(bytes(494))


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf])
def test_a_quota_is_a_number_of_bytes(make, bad):
    store = make()
    with pytest.raises(StoreError, match="a quota"):
        store.set_quota("of somebody", bad)
    store.set_quota("of somebody", 1e9)


def test_what_was_evicted_is_not_the_worst_of_what_is_stored(make, kv, key):
    with make(policy="lru") as store:
        fill(store, kv, key, range(40))
        gone = [number for number in range(40) if store._tiers.home.missing([key(number)])]
        assert gone and store.worst([key(number) for number in gone]) is None
        assert store.worst([key(gone[0]), key(38), key(39)]) == key(38)
