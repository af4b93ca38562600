"""Policies by algebra, against a model that does nothing clever, and on streams where the answer is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.errors import RecordError, StoreError
from ragkv.folder import seal, unseal
from ragkv.store import TieredStore
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import GDSF, LFU, LRFU, LRU, PGDSF, Policy, Usage, get_policy
from ragkv.store.profile import CostProfile
from ragkv.store.terms import Terms


def name(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_priorities():
    usage = Usage(size_bytes=4, frequency=3, tick=9)
    for seconds in (1.0, 3.0):
        usage.add_cost(seconds)
    assert (usage.cost_s, usage.computed) == (2.0, 2)
    assert PGDSF().priority(b"", usage, 10.0) == 10.0 + 3 * 2.0 / 4
    assert GDSF().priority(b"", usage, 10.0) == 10.0 + 3 / 4
    assert LRU().priority(b"", usage, 10.0) == 9
    assert 3 < LFU().priority(b"", usage, 10.0) < 4
    assert LRFU().priority(b"", replace(usage, heat=8.0), 10.0) == 10.0 + math.log2(8 * 2.0 / 4)


@pytest.mark.parametrize("policy", [PGDSF, LRFU, LRU, LFU, GDSF])
def test_to_ask_first_changes_nothing(policy):
    """What a tier keeps, its clock and its ghosts are those of one that is just given everything."""
    chance = random.Random(3)
    asked, given = Room(1000, policy()), Room(1000, policy())
    wanted = 0
    for _ in range(3000):
        key, size, cost = name(chance.randrange(60)), chance.randrange(20, 300), chance.choice((0.0, 0.1, 5.0))
        terms = Terms(cost_s=cost)
        if key in given.held_keys:
            for room in (asked, given):
                room.touch(key)
        else:
            usage = Usage(size, cost, 2.0, 1, 3, 17) if chance.random() < 0.3 else None
            want = asked.wants(key, size, terms, usage=usage)
            row = asked.admit(key, size, terms, usage=usage, selective=True) if want else None
            assert want == (row is not None) and row == given.admit(key, size, terms, usage=usage, selective=True)
            wanted += want
            if want:
                for room in (asked, given):
                    room.held_keys.add(key)
        assert asked.held_keys == given.held_keys and asked.books.counters == given.books.counters
        assert asked.books._rows == given.books._rows
    assert 100 < wanted < 2900 or policy in (LRU,)


def test_unknown_policy():
    with pytest.raises(StoreError, match="gdsf, lfu, lrfu, lru, pgdsf"):
        get_policy("arc")


class Room(Planner):
    """A tier without tensors."""

    def __init__(self, budget_bytes, policy):
        self.held_keys = set()
        super().__init__(MemoryBooks(), policy, budget_bytes, delete=self.lose)

    def lose(self, key):
        there = key in self.held_keys
        self.held_keys.discard(key)
        return there

    def use(self, key, row=None, times=1):
        row = row or self.books.row(key)
        if row is None or not row.usage.size_bytes:
            return False
        super().use(key, row, times)
        return True

    def admit(self, key, *args, **options):
        row = super().admit(key, *args, **options)
        if row is not None:
            self.held_keys.add(key)
        return row


def survivors(policy, stream, room=3):
    tier = Room(room * 10, policy)
    for number in stream:
        if not tier.use(name(number)):
            tier.admit(name(number), 10, Terms(cost_s=float(1 + number)))
    return {number for number in range(10) if name(number) in tier.held_keys}


def test_lru_evicts_what_was_used_longest_ago():
    assert survivors(LRU(), [1, 2, 3, 1, 4]) == {1, 3, 4}


def test_lfu_evicts_what_was_used_least():
    assert survivors(LFU(), [1, 1, 2, 2, 3, 4]) == {1, 2, 4}


def test_gdsf_ages():
    assert survivors(GDSF(), [1, 1, 2, 3, 4, 5]) == {1, 4, 5}
    assert 1 not in survivors(GDSF(), [1, 1, *(2, 3, 4, 5, 6, 7) * 5])


def test_pgdsf_keeps_what_is_costly():
    assert survivors(PGDSF(), [9, 1, 2, 3]) == {9, 2, 3}


@given(
    st.lists(st.tuples(st.sampled_from("pur"), st.integers(0, 9), st.integers(1, 60)), max_size=120),
    st.sampled_from([LRU, LFU, GDSF, PGDSF, LRFU]),
)
@settings(max_examples=80, deadline=None)
def test_memory_against_a_list(actions, kind):
    """The heap with its stale places evicts what a search through a list would."""
    policy, tier = kind(), Room(100, kind())
    model: dict[bytes, tuple[float, Usage]] = {}
    clock, tick, returns = 0.0, 0, 0.0
    ghosts: dict[bytes, Usage] = {}

    def used(key: bytes, usage: Usage) -> None:
        nonlocal clock, tick
        half_life = policy.half_life * max(len(model), 1) or math.inf
        tick += 1
        usage.heat = usage.heat * 2 ** ((usage.tick - tick) / half_life) + 1
        usage.frequency, usage.tick = usage.frequency + 1, tick
        clock += 1 / half_life
        priority, window = policy.priority(key, usage, clock), policy.window(returns)
        least = min((priority for other, (priority, _) in model.items() if other != key), default=-math.inf)
        model[key] = max(priority, least + window) if window else priority, usage

    for action, number, size in actions:
        key = name(number)
        if action == "r":
            assert tier.drop(key) == (model.pop(key, None) is not None)
            ghosts.pop(key, None)
        elif action == "u":
            assert tier.use(key) == (key in model)
            if key in model:
                used(key, model[key][1])
        else:
            tier.admit(key, size, Terms(cost_s=1.0))
            if key in ghosts:
                returns += ((tick - ghosts[key].tick < len(model)) - returns) / (20 + len(model))
            old = model.pop(key, None)
            usage = old[1] if old else ghosts.pop(key, Usage(0))
            while sum(entry.size_bytes for _, entry in model.values()) + size > 100:
                victim = min(model, key=lambda key: (model[key][0], key))
                if not policy.half_life:
                    clock = max(clock, model[victim][0])
                ghosts[victim] = model.pop(victim)[1]
            usage.add_cost(1.0)
            usage.size_bytes = size
            used(key, usage)
        assert tier.held_keys == set(model)
        assert tier.books.counters.used_bytes == sum(usage.size_bytes for _, usage in model.values()) <= 100


def test_uses_fade():
    """Half in six uses per entry; where nothing fades every use counts."""
    for kind, heat in ((LRFU, 1 + 2 * 2 ** (-6 / 18)), (PGDSF, 3)):
        tier = Room(30, kind())
        for number in (1, 2, 2, 3, 1):
            if not tier.use(name(number)):
                tier.admit(name(number), 10, Terms())
        row = tier.books.row(name(1))
        row.usage.heat, row.usage.tick = 2.0, tier.books.counters.tick  # as after two uses at once
        for _ in range(5):
            tier.use(name(2))
        tier.use(name(1))
        assert tier.books.row(name(1)).usage.heat == pytest.approx(heat)


def test_lrfu_gives_time_to_what_is_new():
    """Longer where what was evicted is asked for soon."""
    assert LRFU().window(0.3) > 4 * LRFU().window(0.05) > 0
    tier = Room(40, LRFU())
    for number in (1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4):
        if not tier.use(name(number)):
            tier.admit(name(number), 10, Terms())
    tier.admit(name(5), 10, Terms())
    assert name(5) in tier.held_keys, "it takes the place of another"
    tier.books.counters.returns = 0.5
    tier.admit(name(6), 10, Terms())
    tier.admit(name(7), 10, Terms())
    assert name(6) in tier.held_keys and name(7) in tier.held_keys, "neither of these evicts the other"


def test_a_copy_is_as_hot_as_the_original():
    """Ticks are a tier's own: what another tier has seen does not make a copy's uses fade."""
    tier = Room(100, LRFU())
    tier.admit(name(1), 10, Terms(), usage=Usage(10, heat=5.0, frequency=7, tick=10_000))
    usage = tier.books.row(name(1)).usage
    once_more = 1 + 5 * 2 ** (-1 / 6)  # a tier of one entry fades fast
    assert (usage.heat, usage.frequency, usage.tick) == (once_more, 8, 1)
    tier.books.counters.tick = 10_000
    tier.admit(name(2), 10, Terms(), usage=Usage(10, heat=5.0, frequency=7, tick=3))
    assert tier.books.row(name(2)).usage.heat == once_more
    tier.admit(name(3), 10, Terms(uses=5))
    assert tier.books.row(name(3)).usage.heat == 6, "what was used in another folder was used"


def test_disk_evicts_as_memory_does(folder, kv, key):
    """One stream, two tiers of equal room: the same entries remain."""
    chance = random.Random(4)
    stream = [min(int(chance.paretovariate(0.7)), 40) for _ in range(250)]
    costs = {number: chance.random() for number in stream}
    # On disk an entry takes whole pages; its header is one, and each half of its payload here.
    size_on_disk, size_in_memory = 8192, kv(1, layers=1, tokens=60, heads=1).nbytes
    with (
        TieredStore(folder, cpu_bytes=0, disk_bytes=8 * size_on_disk) as disk,
        TieredStore(cpu_bytes=8 * size_in_memory) as memory,
    ):
        for number in stream:
            for store in (disk, memory):
                if store.get(key(number)) is None:
                    store.put(key(number), kv(number, layers=1, tokens=60, heads=1), cost_s=costs[number])
            disk.flush()
        assert len(disk) == len(memory) == 8
        kept = [{number for number in stream if store.contains(key(number))} for store in (disk, memory)]
        assert len(kept[0] & kept[1]) >= 7


def test_frequencies_and_costs_survive_a_restart_and_an_eviction(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
        store.put(key(1), kv(1, tokens=60), cost_s=2.0)
        for _ in range(5):
            store.get(key(1))
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
        row = store._disk.row(key(1))
        assert (row.usage.frequency, row.usage.cost_s) == (6, 2.0)
        for number in range(10, 60):
            store.put(key(number), kv(number, tokens=60), cost_s=1e9)
        assert not store.contains(key(1))
        store.put(key(1), kv(1, tokens=60), cost_s=4.0)
        usage = store._disk.row(key(1)).usage
        assert (usage.frequency, usage.cost_s, usage.computed) == (7, 3.0, 2)


def test_what_lrfu_goes_by_survives_a_restart_and_an_eviction(folder, kv, key):
    def opened():
        return TieredStore(folder, cpu_bytes=0, disk_bytes=100_000, policy="lrfu")

    with opened() as store:
        for number in range(1, 4):
            store.put(key(number), kv(number, tokens=60), cost_s=1.0)
        for _ in range(6):
            store.get(key(1))
    with opened() as store:
        usage, counters = store._disk.row(key(1)).usage, store._disk.counters()
        assert 5 < usage.heat <= 7 and counters.clock > 0.3
        store.put(key(4), kv(4, tokens=60), cost_s=1.0)
        assert store._disk.counters().clock > counters.clock
        for number in range(10, 16):
            store.put(key(number), kv(number, tokens=60), cost_s=1.0)
        assert not store.contains(key(2))
        assert store.contains(key(1)), "six uses more are worth more than being new"
        store.put(key(2), kv(2, tokens=60), cost_s=1.0)
        assert 1 < store._disk.row(key(2)).usage.heat < 2


class Last(Policy):
    """With as little as one's own must have."""

    def priority(self, key, usage, clock):
        return clock + usage.tick


@pytest.mark.parametrize(("first", "then"), [("lru", "pgdsf"), ("lfu", "lrfu"), (Last(), "lfu")])
def test_a_folder_of_another_policy_is_put_in_order(folder, kv, key, first, then):
    """Else what is put evicts what was put before, for ever: priorities of two policies say nothing of each other."""
    with TieredStore(folder, cpu_bytes=0, policy=first) as store:
        store.put_many([(key(number), kv(number, layers=1), 0.01) for number in range(4)])
        store.pin_many([key(0), key(1)])
        size = store.stats().bytes["disk"] // 4
    with TieredStore(folder, cpu_bytes=0, disk_bytes=4 * size, policy=then) as store:
        store.unpin(key(0))
        for number in range(10, 18):
            store.put(key(number), kv(number, layers=1), cost_s=0.01)
            for _ in range(3):
                assert store.get(key(number)) is not None
        assert store.missing(map(key, range(4))) == [key(0), key(2), key(3)]


def test_counters_of_a_folder_from_before(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
        store.put(key(1), kv(1, tokens=60))
        before = store._disk.counters()
        with store._disk.environment.transaction(write=True) as txn:
            data = before.pack()
            short = seal(b"counters", unseal(b"counters", data)[:-8])
            txn.put("state", b"counters", short)
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
        assert replace(store._disk.counters(), written_s=before.written_s) == before
        assert store.contains(key(1))


def test_ghosts_are_bounded(folder, kv, key, monkeypatch):
    monkeypatch.setattr("ragkv.store.planner.LEAST_GHOSTS", 5)
    monkeypatch.setattr("ragkv.store.planner.GHOSTS_PER_ENTRY", 1)
    with TieredStore(folder, cpu_bytes=0, disk_bytes=60_000) as store:
        for number in range(60):
            store.put(key(number), kv(number, tokens=60))
        entries, counters = len(store), store._disk.counters()
        assert counters.ghosts <= max(5, entries)
        env = store._disk.environment
        with env.transaction() as txn:
            assert txn.count("usage") == entries + counters.ghosts


def test_cost_profile():
    grid = tuple(tuple(1.0 + 0.01 * cached * new for new in (10, 50)) for cached in (0, 100, 300))
    profile = CostProfile((0, 100, 300), (10, 50), grid)
    assert profile(0, 10) == 1.0
    assert profile(300, 50) == pytest.approx(151.0)
    assert profile(50, 30) == pytest.approx(1.0 + 0.01 * 50 * 30)
    assert profile(200, 90) == pytest.approx(1.0 + 0.01 * 200 * 90)
    assert CostProfile((0,), (1, 2), ((0.0, 1.0),))(5, 0) == 0.0
    assert CostProfile.from_bytes(profile.to_bytes()) == profile
    for bad in (
        b"",
        b"{}",
        b'{"cached": [1, 0], "new": [1], "seconds": [[1], [2]]}',
        b'{"cached": [1], "new": [1], "seconds": []}',
    ):
        with pytest.raises(RecordError):
            CostProfile.from_bytes(bad)
