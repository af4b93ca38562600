"""Chunks that come too slowly: asked for from the back, given up one by one, and still there afterwards."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from threading import Event, Thread, Timer
from time import monotonic
from weakref import ref

import pytest

from ragkv.errors import RecordError
from ragkv.store import Loading
from ragkv.store.metrics import StoreCollector
from ragkv.store.remote.pool import PoolError
from ragkv.store.remote.records import key_of, name_of
from ragkv.store.source import Asking


@pytest.fixture
def stalled(machine, kv, key, monkeypatch, soon):
    """A machine whose requests for more than a header are answered by hand: the store, and what it asked for."""
    url = "memory://stalled"
    one = machine(url)
    one.put_many([(key(number), kv(number, tokens=2000, layers=6), 0.0) for number in range(3)])
    one.flush()
    two, asked = machine(url, range_bytes=100_000), []
    pool = two._tiers.behind[0]._pool
    begin = pool.begin

    def by_hand(name, start, stop):
        if not start:
            return begin(name, start, stop)
        asked.append((key_of(name), start, stop, Future()))
        return asked[-1][-1]

    def answer(which):
        for name, start, stop, future in asked:
            if name == which and not future.done():
                future.set_result(begin(f"{name.hex()[:2]}/{name.hex()}", start, stop).result())

    monkeypatch.setattr(pool, "begin", by_hand)
    yield two, asked, answer
    one.remove_many([key(number) for number in range(3)])
    one.flush()


def test_from_the_back_one_chunk_after_the_other(stalled, key, kv, same):
    store, asked, answer = stalled
    with store.read([key(0), key(1), key(2)]) as batch:
        assert all(batch.away(index) for index in range(3)) and not asked
        batch.begin()
        order = [name for name, *_ in asked]
        assert order == sorted(order, key=[key(2), key(1), key(0)].index) and len(order) > 6
        starts = [start for name, start, *_ in asked if name == key(2)]
        assert starts == sorted(starts)
        assert not batch.here(2, 0.01) and batch.progress(0)[1:] == (0, sum(e - s for _, s, e, _ in asked), None)
        answer(key(2))
        assert batch.here(2, 0) and not batch.here(1, 0)
        same(batch.kv(2), kv(2, tokens=2000, layers=6))
        size = sum(stop - start for name, start, stop, _ in asked if name == key(2))
        assert batch.progress(0).came == size and batch.progress(0).since_s > 0
        answer(key(0)), answer(key(1))
        same(batch.kv(0), kv(0, tokens=2000, layers=6))


def test_given_up_it_is_counted_and_cancelled_and_stays_in_the_pool(stalled, key, kv, same):
    store, asked, answer = stalled
    with store.read([key(0), key(1), key(2)]) as batch:
        batch.begin()
        batch.give_up(0)
        assert {name for name, *_, future in asked if future.cancelled()} == {key(0)}
        assert batch.progress(1)[1:3] == (0, sum(stop - start for name, start, stop, _ in asked if name != key(0)))
        answer(key(1)), answer(key(2))
        same(batch.kv(1), kv(1, tokens=2000, layers=6))
    stats = store.stats()
    pool = stats.pools["remote"]
    assert (pool.late, pool.unanswered, pool.down) == (1, 0, False) and not stats.evictions["remote"]
    late = {s.labels["tier"]: s.value for m in StoreCollector(store).collect() for s in m.samples if "late" in s.name}
    assert 1.0 in late.values()
    seen = store.loading()["remote"]
    assert isinstance(seen, Loading) and seen.beside and 0 < seen.bytes_per_s < 1e12
    asked.clear()
    with store.read([key(0)]) as batch:
        batch.begin()
        answer(key(0))
        same(batch.kv(0), kv(0, tokens=2000, layers=6))


def test_what_others_read_too_is_not_cancelled(stalled, key, kv, same):
    store, asked, answer = stalled
    with store.read([key(0)]) as one, store.read([key(0)]) as other:
        one.begin()
        one.give_up(0)
        assert not any(future.cancelled() for *_, future in asked)
        answer(key(0))
        same(other.kv(0), kv(0, tokens=2000, layers=6))


def test_one_that_failed_is_not_waited_for(stalled, key):
    store, asked, _ = stalled
    with store.read([key(0), key(1)]) as batch:
        batch.begin()
        next(future for name, *_, future in asked if name == key(0)).set_exception(PoolError("no answer"))
        assert batch.here(0, 0) and not batch.here(1, 0)
        with pytest.raises(RecordError, match="no answer"):
            batch.kv(0)


def test_on_time_it_is_no_slower_than_it_was(stalled, key):
    """What is computed meanwhile because that is faster anyway says nothing about the pool."""
    store, _, _ = stalled
    speed = store._tiers.behind[0]._speed
    speed.sized("", 768.0), speed.saw(1, 1e3)  # an hour for what is asked for
    known = store.loading()["remote"]
    with store.read([key(0), key(1)]) as batch:
        batch.begin()
        batch.give_up(0)
    assert store.loading()["remote"]._replace(start_s=0.0) == known


@pytest.fixture
def heads(stalled, monkeypatch):
    """As if every header was on its way for long: the store, and what answers those that were asked for."""
    store, _, _ = stalled
    pool, held = store._tiers.behind[0]._pool, []
    begin = pool.begin

    def hold(name, start, stop):
        held.append((Future(), begin(name, start, stop)))
        return held[-1][0]

    def answer(error=None):
        asked, held[:] = list(held), []
        for future, answered in asked:
            future.set_exception(error) if error else future.set_result(answered.result())

    monkeypatch.setattr(pool, "begin", hold)
    return store, held, answer


def test_whoever_has_no_time_does_not_wait_for_headers_and_misses_nothing(heads, key):
    store, _, answer = heads
    tier, asking, noted = store.remote, Asking(0.02), []
    speed, note = tier._speed, tier._manifest.note
    tier._manifest.note = lambda keys, there: noted.extend(keys) or note(keys, there)
    with store.read([key(0), key(1), b"?" * 32], asking=asking) as batch:
        assert batch.tiers == [None] * 3 and asking.late == {key(0), key(1), b"?" * 32} and not noted
    assert store.stats().pools["remote"].late == 3 and not speed.start_s
    answer()
    assert 0.02 < speed.start_s < 5, "how long it took is known, though nobody waited for it"
    speed.started(1e3)
    asking = Asking(0.02)
    Timer(0.1, answer).start()
    with store.read([key(0), b"?" * 32], asking=asking) as batch:
        assert batch.tiers == ["remote", None] and not asking.late, "it waits as long as that took lately"
    assert speed.start_s < 1e3 and store.stats().pools["remote"].late == 3


def test_what_came_of_headers_says_nothing_of_those_that_did_not(heads, key):
    store, held, answer = heads
    breaker = store.remote._heads.breaker
    breaker.failed()
    breaker._until = 0.0
    with store.read([key(0), key(1)], asking=Asking(0.02)):
        assert breaker.broken, "nobody has answered"
    first, got = held.pop(0)
    answer(PoolError("no answer"))
    first.set_result(got.result())
    assert not breaker.broken
    asked = len(held)
    Timer(0.05, lambda: held[asked][0].set_result(held[asked][1].result())).start()
    asking = Asking(0.5)
    store.remote._speed._start = None
    with store.read([key(0), key(1)], asking=asking) as batch:
        assert batch.tiers == ["remote", None] and asking.late == {key(1)} and not store.remote._speed.start_s
    held.pop(0)
    answer()


def test_a_level_that_is_late_is_not_asked_for_in_another_way(heads, key):
    store, held, answer = heads
    asking = Asking(0.02, levels={key(0): "fine"})
    with store.read([key(0)], asking=asking) as batch:
        assert batch.tiers == [None] and asking.late == {key(0)} and len(held) == 1
    answer()


def test_the_rest_of_a_header_is_given_no_more_time(machine, kv, key, monkeypatch):
    url, rests = "memory://rests", Event()
    one, two = machine(url), machine(url)
    one.put_many([(key(number), kv(number, tokens=200), 0.0) for number in range(2)])
    one.flush()
    records, pool = two.remote._records, two.remote._pool
    records._head_bytes, begin = 100, pool.begin

    def late(name, start, stop):
        asked, got = Future(), begin(name, start, stop)
        Thread(target=lambda: (start and rests.wait(1), asked.set_result(got.result()))).start()
        return asked

    monkeypatch.setattr(pool, "begin", late)
    asking, started = Asking(0.05), monotonic()
    with two.read([key(0), key(1)], asking=asking) as batch:
        assert batch.tiers == [None] * 2 and asking.late == {key(0), key(1)}
    assert monotonic() - started < 0.9
    rests.set()
    asking = Asking(2)
    with two.read([key(0), key(1)], asking=asking) as batch:
        assert batch.tiers == ["remote"] * 2 and not asking.late
    assert two.missing([key(0)]) == []


def test_headers_that_nobody_waits_for_any_more_may_fail(heads, key):
    store, held, answer = heads
    with store.read([key(0)], asking=Asking(0.01)):
        pass
    assert not store.stats().pools["remote"].down
    answer(PoolError("no answer"))
    pool = store.stats().pools["remote"]
    assert pool.down and (pool.unanswered, pool.late) == (1, 1)
    with store.read([key(0)], asking=Asking(0.01)) as batch:
        assert batch.tiers == [None] and not held, "it is left alone"


def test_no_more_is_read_of_a_header_than_it_takes(machine, kv, key, same, monkeypatch):
    """By what was seen last; and small objects whole, in one request."""
    url = "memory://sizes"
    one, two = machine(url), machine(url)
    one.put_many([(key(0), kv(0, tokens=2000, layers=6), 0.0), (key(1), kv(1, tokens=4), 0.0)])
    one.flush()
    pool, asked = two._tiers.behind[0]._pool, []
    begin = pool.begin
    monkeypatch.setattr(
        pool, "begin", lambda name, start, stop: asked.append((start, stop)) or begin(name, start, stop)
    )
    for number, size in ((0, 16 << 10), (0, 4 << 10), (1, 4 << 10), (1, 64 << 10)):
        asked.clear()
        two.read([key(number)]).close()
        assert asked == [(0, size)]
    same(two.get(key(1)), kv(1, tokens=4))
    assert asked == [(0, 64 << 10)] * 2
    for number in range(5_000):
        two._tiers.behind[0]._heads.lost(b"%032d" % number, PoolError("no answer"))
    two.read([key(0)]).close()
    assert len(two._tiers.behind[0]._manifest._avoided) == 4096
    one.remove_many([key(0), key(1)])
    one.flush()


def test_whoever_has_no_time_takes_it_to_be_there(stalled, key, monkeypatch, soon):
    store, _, _ = stalled
    tier, more = store.remote, Event()
    which = tier._pool.which
    monkeypatch.setattr(tier._pool, "which", lambda names: more.wait(5) and which(names))
    assert set(store.where([key(0), key(9)], 0.02)) == {key(0), key(9)}
    more.set()
    assert store.where([key(0), key(9)], 5.0) == {key(0): "remote"}
    more.clear()
    tier._speed.started(1e3)
    Timer(0.1, more.set).start()
    assert store.where([key(0), key(9)], 0.02) == {key(0): "remote"}, "it waits as long as an answer took lately"
    monkeypatch.setattr(tier._pool, "which", lambda names: more.wait(5) and fails())
    more.clear()
    tier._speed.started(0.0)
    assert store.where([key(0)], 0.02) and not store.stats().pools["remote"].down
    more.set()
    soon(lambda: store.stats().pools["remote"].down)
    assert store.where([key(0)], 5.0) == {}, "it is left alone"


def fails():
    raise PoolError("no answer")


@pytest.mark.parametrize("limit_s", [float("inf"), 60.0])
def test_what_came_is_not_kept_until_the_collector_comes(url, machine, kv, key, soon, limit_s):
    """Nor beside the KV that were made of it: a request is gone once it is read, and others with their batch."""
    one, two, asked = machine(url), machine(url, range_bytes=10_000), list[tuple[str, ref]]()
    one.put_many([(key(number), kv(number, tokens=900), 0.0) for number in range(3)])
    one.flush()
    pool, begin = two.remote._pool, two.remote._pool.begin

    def noted(*args):
        future = begin(*args)
        asked.append((args[0], ref(future)))
        return future

    pool.begin = noted
    gc.collect()
    gc.disable()
    try:
        with two.read([key(number) for number in range(3)], asking=Asking(limit_s)) as batch:
            batch.kv(0)
            soon(lambda: not any(future() for name, future in asked if name == name_of(key(0))))
            for number in range(3):
                batch.layer(number, 2)
        del batch
        soon(lambda: len(asked) >= 3 and not any(future() for _, future in asked))
    finally:
        gc.enable()
