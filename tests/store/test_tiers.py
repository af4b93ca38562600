"""What open batches hold, and what is removed: by whatever thread or process, and how fast."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from ragkv.errors import RecordError, StoreError, StoreFullError
from ragkv.store import Policy, Target, TieredStore
from ragkv.store.folder_books import LOGGED_REMOVALS
from ragkv.store.keys import ANY, label_of, path_key


class Same(Policy):
    """Repeats priorities: of an entry, and of all."""

    name = "same"

    def priority(self, key, usage, clock):
        return 1.0


@pytest.mark.parametrize("disk", [False, True])
def test_budget_is_kept_whatever_the_policy_repeats(folder, kv, key, disk):
    """An entry that was used again under the same priority is one victim and not two."""
    size = 8192 if disk else kv(0, layers=1, tokens=32, heads=1).nbytes
    room = {"path": folder, "cpu_bytes": 0, "disk_bytes": 3 * size} if disk else {"cpu_bytes": 2 * size}
    with TieredStore(policy=Same(), **room) as store:
        for number in (0, 1):
            store.put(key(number), kv(number, layers=1, tokens=32, heads=1))
            for _ in range(3):
                assert store.get(key(number)) is not None
        store.put(key(2), kv(2, layers=1, tokens=220 if disk else 64, heads=1))
        assert max(store.stats().bytes.values()) <= room.get("disk_bytes", 2 * size)
        assert store.contains(key(2))


@pytest.fixture(params=["memory", "disk", "both", "device"])
def store(request, folder):
    where = {
        "memory": {},
        "disk": {"path": folder, "cpu_bytes": 0},
        "both": {"path": folder},
        "device": {"gpu_bytes": 1 << 24, "device": "cpu"},
    }[request.param]
    with TieredStore(**where) as store:
        yield store


def test_facts_are_written_and_removed_with_the_entries(store, kv, key):
    store.put_many([(key(1), kv(1), 0.0)], facts={"a": b"1", "b": b"2"})
    store.put_many([], facts={"c": b"3"})
    assert [store.meta_get(name) for name in "abc"] == [b"1", b"2", b"3"]
    assert store.remove_many([key(1), key(2)], facts=["a", "c", "unknown"]) == 1
    assert [store.meta_get(name) for name in "abc"] == [None, b"2", None]
    assert store.remove_many([key(1)]) == 0
    with pytest.raises(StoreError):
        store.put_many([(key(1), kv(1), -1.0)], facts={"b": b"4"})
    assert store.meta_get("b") == b"2"


def test_facts_are_not_written_without_the_entries(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000) as store:
        with pytest.raises(StoreFullError):
            store.put_many([(key(1), kv(1, tokens=5_000), 0.0)], facts={"a": b"1"})
        assert store.meta_get("a") is None


def test_many_are_removed_in_one_transaction(folder, kv, key):
    with TieredStore(folder) as store:
        store.put_many([(key(number), kv(number), 0.0) for number in range(40)], facts={"a": b"1"})
        before = store._disk.environment._live.env.info()["last_txnid"]
        assert store.remove_many([key(number) for number in range(50)] * 2, facts=["a"]) == 40
        assert store._disk.environment._live.env.info()["last_txnid"] == before + 1
        assert store.remove_many([], facts=["a"]) == 0
        assert store._disk.environment._live.env.info()["last_txnid"] == before + 1, (
            "nothing to remove, nothing written"
        )
        assert len(store) == 0 and store.missing([key(1)]) == [key(1)]


def test_missing_counts_no_use(store, kv, key):
    store.put(key(1), kv(1))
    assert store.missing([key(2), key(1), key(3), key(2)]) == [key(2), key(3)]
    stats = store.stats()
    assert (sum(stats.hits.values()), stats.misses) == (0, 0)


def probes(store, monkeypatch):
    """Counts the keys that home is asked for."""
    asked, ask = [], store._tiers.home.known
    monkeypatch.setattr(store._tiers.home, "known", lambda key: asked.append(key) or ask(key))
    return asked


def test_a_removal_makes_no_probe_of_what_else_is_in_memory(folder, kv, key, monkeypatch, forked):
    with TieredStore(folder) as store:
        store.put_many([(key(number), kv(number, layers=1), 0.0) for number in range(300)])
        assert store.get(key(0)) is not None
        asked = probes(store, monkeypatch)
        store.remove(key(7))
        assert store.get(key(8)) is not None and asked == []

        def other():
            with TieredStore(folder) as mine:
                return mine.remove_many([key(number) for number in (9, 10)])

        assert forked(other) == "2"
        with store.read([key(9), key(8)]) as batch:
            assert batch.tiers == [None, "cpu"]
        assert sorted(asked) == sorted([key(9), key(10)])


@pytest.mark.parametrize("harm", ["behind", "log", "counters"])
def test_who_cannot_know_what_was_removed_looks_at_all(folder, kv, key, monkeypatch, forked, harm):
    monkeypatch.setattr("ragkv.store.folder_books.LOGGED_REMOVALS", 4)
    assert LOGGED_REMOVALS > 4
    with TieredStore(folder) as store:
        store.put_many([(key(number), kv(number, layers=1), 0.0) for number in range(30)])
        for number in (20, 21):  # the log is not at its beginning
            store.remove(key(number))
            store.get(key(0))
        env = store._disk.environment

        def other():
            with TieredStore(folder, cpu_bytes=0) as mine:
                gone = mine.remove_many([key(number) for number in range(10 if harm == "behind" else 2)])
                with env.transaction(write=True) as txn:
                    logged = list(txn.keys("state", b"removed"))
                    if harm == "log":
                        txn.put("state", logged[-1], b"x" * 40)
                    if harm == "counters":
                        txn.put("state", b"counters", b"x" * 40)
                if harm == "counters":
                    mine.remove(key(3))
                return gone, len(logged)

        gone, logged = eval(forked(other))
        assert gone == (10 if harm == "behind" else 2) and logged <= 4
        assert store.get(key(1)) is None and store.get(key(0)) is None
        assert store.get(key(29)) is not None
        if harm == "counters":
            assert store.get(key(3)) is None


def test_what_is_put_again_after_a_removal_stays_in_memory(folder, kv, key):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        store.remove(key(1))
        store.put(key(1), kv(2))
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["cpu"] and torch.equal(batch.layer(0, 0)[0], kv(2).keys[0])


@pytest.mark.parametrize("gpu_bytes", [0, 1 << 24])
def test_what_was_replaced_is_not_in_memory(folder, kv, key, same, gpu_bytes):
    """Be it by another process, after a removal, or while a batch has the former open that memory would rather keep."""
    old, new = kv(1), kv(2, tokens=500)
    room = {"cpu_bytes": 2 * old.nbytes, "gpu_bytes": gpu_bytes, "device": "cpu"}
    with TieredStore(folder, **room) as store, TieredStore(folder, cpu_bytes=0) as other:
        for between in (lambda: None, lambda: other.remove(key(1))):
            store.put(key(1), old)
            assert store.where([key(1)]) == {key(1): "gpu" if gpu_bytes else "cpu"}
            between()
            other.put(key(1), new)
            same(store.get(key(1)), new)
        other.put(key(1), old)
        with store.read([key(1)]) as batch:
            same(batch.kv(0), old)
            store.put(key(1), new)
        same(store.get(key(1)), new)


def disturb(store, kv, key):
    """All that may befall chunks 0 and 1."""
    store.remove_many([key(0)])
    store.put(key(1), kv(77, tokens=60))
    for number in range(100, 140):
        store.put(key(number), kv(number, tokens=60), cost_s=1e6)
    store.remove_many([key(1)])


def test_what_a_batch_holds_is_readable_until_it_is_done(store, kv, key, forked):
    """A chunk forgotten just after the batch was opened must not become a miss."""
    for number in range(2):
        store.put(key(number), kv(number, tokens=60))
    prompt = torch.zeros(2, 2, 200, 8)
    with store.read([key(0), key(1), key(0), key(9)]) as batch:
        thread = threading.Thread(target=disturb, args=(store, kv, key))
        thread.start()
        thread.join()
        if store.path is not None:
            assert "raised" not in forked(lambda: TieredStore(store.path, cpu_bytes=0).remove_many([key(0), key(1)]))
        for index, number in enumerate((0, 1, 0)):
            want = kv(number, tokens=60)
            for layer in range(3):
                batch.place(index, range(layer, layer + 1), [Target(prompt[0], prompt[1])], 60 * index)
                assert torch.equal(prompt[0, :, 60 * index : 60 * index + 60], want.keys[layer])
                assert torch.equal(batch.layer(index, layer)[1].cpu(), want.values[layer])
            batch.done(index)
            with pytest.raises(StoreError, match="done"):
                batch.layer(index, 0)
        batch.done(3)
        batch.done(0)
        assert batch.lengths == [60, 60, 60, None]
    assert store.missing([key(0), key(1)]) == [key(0), key(1)], "what was removed does not come back"


def test_a_done_chunk_gives_its_memory_back_and_may_be_kept_above(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=300))
    with TieredStore(folder, cpu_bytes=kv(0, tokens=300).nbytes) as store:
        with store.read([key(0), key(1), key(0)]) as batch:
            for index in range(3):
                for layer in range(3):
                    batch.layer(index, layer)
            batch.done(0)
            assert store.stats().entries["cpu"] == 0 and store._tiers.leases[key(0)] == 1
            batch.done(2)
            assert store.stats().entries["cpu"] == 1 and key(0) not in store._tiers.leases
            assert set(batch._sources) == {key(1)}
        assert store.stats().hits == {"gpu": 0, "cpu": 0, "disk": 3}


def test_a_batch_of_which_all_is_done_holds_no_pages(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(0), kv(0))
        readings = store._disk.environment._readings
        with store.read([key(0), key(0), key(5)]) as batch:
            batch.done(0)
            assert any(reading.txn is not None for reading in readings)
            batch.done(1)
            assert all(reading.txn is None for reading in readings)


def test_done_while_it_is_read_ahead(folder, kv, key):
    with TieredStore(folder) as store:
        for number in range(6):
            store.put(key(number), kv(number, tokens=700, heads=4, dim=64, layers=4))
    with TieredStore(folder, cpu_bytes=0) as store:
        for _ in range(10):
            with store.read([key(number) for number in range(6)]).read_ahead() as batch:
                for index in range(6):
                    batch.done(index)


def test_what_is_removed_while_it_is_prefetched_does_not_come_back(folder, kv, key, monkeypatch):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1, tokens=300))
    with TieredStore(folder) as store:
        finish = store._tiers.finish

        def late(name, source):
            store.remove(name)
            finish(name, source)

        monkeypatch.setattr(store._tiers, "finish", late)
        assert store.prefetch([key(1)]).result(30) > 0
        assert store.stats().entries["cpu"] == 0 and store.get(key(1)) is None


def test_prefetch_of_a_store_that_is_closed(folder, key):
    store = TieredStore(folder)
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.prefetch([key(1)])


def test_readers_writers_and_removers_together(store, kv, key):
    """Whatever a batch opened can be read, and is one version of the chunk."""
    failures, stop = [], threading.Event()

    def guarded(work):
        try:
            chance = random.Random(work.__name__)
            while not stop.is_set():
                work(chance)
        except BaseException as error:
            failures.append(error)

    def write(chance):
        number = chance.randrange(8)
        store.put(key(number), kv(number + 8 * chance.randrange(2), tokens=60))

    def remove(chance):
        store.remove_many([key(chance.randrange(8)), key(chance.randrange(8))])

    def ask(chance):
        numbers = [chance.randrange(8) for _ in range(3)]
        with store.read([key(number) for number in numbers]) as batch:
            for index, number in enumerate(numbers):
                if batch.tiers[index] is None:
                    continue
                try:
                    pairs = [batch.layer(index, layer) for layer in range(3)]
                except RecordError as error:
                    raise AssertionError(error) from error
                versions = [kv(number + offset, tokens=60) for offset in (0, 8)]
                assert any(
                    all(torch.equal(k.cpu(), version.keys[layer]) for layer, (k, _) in enumerate(pairs))
                    for version in versions
                )
                batch.done(index)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in (write, write, remove, ask, ask)]
    for thread in threads:
        thread.start()
    stop.wait(1.0)
    stop.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not failures, failures


def test_what_is_refused_is_not_served_from_memory(folder, kv, key):
    """A selective put drops what stood under its key, also above."""
    size = kv(0, tokens=200).nbytes
    with TieredStore(folder, disk_bytes=4 * size, selective=True) as store:
        store.put(key(0), kv(0, tokens=60), cost_s=1e-6)
        for number in (1, 2):
            store.put(key(number), kv(number, tokens=200), cost_s=1e6)
        assert store._tiers.above[0].missing([key(0)]) == []
        assert store.put(key(0), kv(7, tokens=500), cost_s=1e-6) is False
        assert not store.contains(key(0)) and store.get(key(0)) is None


def test_uses_of_a_write_that_failed_are_added_to_later_ones(folder, kv, key, monkeypatch):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        store.get(key(1))

        def fail(books, now):
            store._disk.touch([key(1)])
            raise StoreError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr("ragkv.store.folder_books.FolderBooks.close", fail)
            with pytest.raises(StoreError, match="full"):
                store.flush()
        assert store._disk._touched[key(1)] == 2


def test_keys_that_are_none_hold_nothing(folder, kv, key):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        for wrong in ([1], "text"):
            with pytest.raises(TypeError):
                store.read([key(1), wrong])


@pytest.mark.parametrize("gpu_bytes", [0, 1 << 20])
def test_what_was_computed_and_is_in_memory_alone_is_known_too(folder, kv, key, gpu_bytes):
    """It holds these chunks' text, and disk has evicted it: whoever forgets one of them forgets it, too."""
    computed = path_key("space", [1], b"path")
    with TieredStore(folder, disk_bytes=200_000, gpu_bytes=gpu_bytes, device="cpu", policy="lru") as store:
        store.put(computed, kv(1, tokens=60), label=label_of([key(1)]))
        for number in range(2, 12):
            store.put(key(number), kv(number, tokens=60))
        with store.read([computed]) as batch:
            assert batch.tiers == ["gpu" if gpu_bytes else "cpu"]
        assert store._disk.missing([computed])
        assert store.computed_of([key(1)]) == [computed] and store.computed_of([key(2)]) == []
        store.remove_many(store.computed_of([key(1)]))
        assert not store.contains(computed)


@pytest.mark.parametrize("gpu_bytes", [0, 1 << 20])
def test_what_one_forgets_another_has_not_in_memory_either(folder, kv, key, gpu_bytes):
    """Disk has evicted it, and what was computed of it, so that whoever forgets it finds neither."""
    computed = path_key("space", [1], b"path")
    with (
        TieredStore(folder, disk_bytes=200_000, gpu_bytes=gpu_bytes, device="cpu", policy="lru") as store,
        TieredStore(folder, disk_bytes=200_000, cpu_bytes=0) as other,
    ):
        store.put(key(0), kv(0, tokens=60))
        store.put(key(1), kv(1, tokens=60))
        store.put(computed, kv(1, tokens=60), label=label_of([key(1)]))
        for number in range(2, 12):
            store.put(key(number), kv(number, tokens=60))
        gone = [key(1), computed]
        assert store._disk.missing([key(0), *gone]) == [key(0), *gone] and store.missing([key(0), *gone]) == []
        assert other.computed_of([key(1)]) == [] and other.remove_many([key(1)]) == 0
        assert store.missing([key(0), *gone]) == gone


def test_of_nothing_and_of_what_was_computed_nothing_is_computed(folder, kv, key):
    """Not even what may be of any chunk: whoever forgets these leaves it alone, in memory too."""
    of_any, other = (path_key("space", [number], b"path") for number in (1, 2))
    with TieredStore(folder, disk_bytes=200_000, policy="lru") as store:
        store.put(of_any, kv(1, tokens=60), label=ANY)
        assert store.computed_of([]) == store.computed_of([other]) == [] and store.computed_of([key(1)]) == [of_any]
        for number in range(2, 12):
            store.put(key(number), kv(number, tokens=60))
        assert store._disk.missing([of_any])
        assert store.computed_of([]) == store.computed_of([other]) == [] and store.computed_of([key(1)]) == [of_any]
        store.remove(other)
        assert store.contains(of_any)


@pytest.mark.parametrize("harm", ["log", "counters"])
def test_a_damaged_log_is_met_once(folder, kv, key, harm):
    with TieredStore(folder) as store, TieredStore(folder, cpu_bytes=0) as other:
        store.put(key(0), kv(0))
        other.remove_many([key(1), key(2)])
        with other._disk.environment.transaction(write=True) as txn:
            names = list(txn.keys("state", b"removed")) if harm == "log" else [b"counters"]
            txn.put("state", names[0], b"x" * 40)
        if harm == "counters":
            other.put(key(3), kv(3))
        known = store._tiers.copies._known_removals
        assert store._disk.removed(known)[1] is None
        assert store.contains(key(0))
        known = store._tiers.copies._known_removals
        assert store._disk.removed(known)[1] == []


def test_what_only_reads_notes_neither_uses_nor_removals(folder, kv, key):
    """Nobody would ever write them down."""
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
    with TieredStore(folder, cpu_bytes=0, readonly=True) as store:
        assert store.get(key(1)) is not None and not store._disk._touched
        assert not store.remove(key(2))
        with pytest.raises(StoreError, match="reading only"):
            store.remove(key(1))
