"""Records that prove damaged, and copies and batches that fail: named, dropped, and nothing else lost."""

from __future__ import annotations

import os

import pytest
import torch

from ragkv.errors import RagKVError, RecordError, StoreError
from ragkv.store import Target, TieredStore
from ragkv.store.keys import label_of, path_key
from ragkv.store.pages import segment_key


def test_damaged_segment_is_named_dropped_and_put_again(folder, kv, key, same, caplog, damage):
    want = kv(1, tokens=2_000, heads=4, dim=64)
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), want)
        store.put(key(2), kv(2))
        snapshot = store._disk.snapshot()
        segment = segment_key(key(1), snapshot.find(key(1), None)[0].segments_of(2)[1])
        snapshot.close()
        damage(store, segment, 1000)
        with store.read([key(1), key(2)]) as batch:
            assert torch.equal(batch.layer(0, 0)[0], want.keys[0])
            with pytest.raises(RagKVError, match=key(1).hex()):
                batch.layer(0, 2)
            assert torch.equal(batch.layer(1, 2)[0], kv(2).keys[2])
        assert not store.contains(key(1))
        assert store.get(key(1)) is None
        assert store.stats().evictions["disk"]["damaged"] == 1
        assert key(1).hex() in caplog.text
        store.put(key(1), want)
        same(store.get(key(1)), want)


def test_record_under_another_key_is_never_served(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        store.put(key(2), kv(2))
        env = store._disk.environment
        with env.transaction(write=True) as txn:
            txn.put("entries", key(2), txn.get("entries", key(1)))
        assert store.get(key(2)) is None
        assert store.get(key(1)) is not None


def test_what_was_computed_of_nobody_knows_what_may_be_of_any_chunk(folder, kv, key, damage):
    """It holds these chunks' text: whoever forgets one forgets it, too."""
    computed = path_key("space", [1], b"path")
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(computed, kv(1), label=label_of([key(1)]))
        assert store.computed_of([key(1)]) == [computed] and store.computed_of([key(2)]) == []
        damage(store, computed, 90, "entries")
        assert store.computed_of([key(2)]) == [computed]


def test_a_segment_that_proves_damaged_while_it_is_placed(folder, kv, key, damage):
    """Copied straight from the file, and verified behind that: an error, and the next read is a miss."""
    want = kv(1, tokens=2_000, heads=4, dim=64)
    prompt = torch.zeros(2, 3, 4, 2_100, 64)
    targets = [Target(prompt[0, layer], prompt[1, layer]) for layer in range(3)]
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), want)
        with store._disk.environment.transaction() as txn:
            segments = txn.count("segments")
        damage(store, segment_key(key(1), segments - 1), -1)
        assert segments > 3
        with store.read([key(1)]) as batch:
            batch.place(0, range(2), targets[:2], 7)
            assert torch.equal(prompt[1, 1, :, 7:2_007], want.values[1])
            with pytest.raises(RecordError, match=key(1).hex()):
                batch.place(0, range(3), targets, 7)
        assert not store.contains(key(1))


@pytest.mark.parametrize("done", [False, True])
def test_a_copy_above_that_cannot_be_made_fails_no_question(folder, kv, key, forked, caplog, done):
    """The file is cut short after all was read: the batch and the store can be closed, and nothing is held."""

    def use():
        with TieredStore(folder, cpu_bytes=0) as store:
            for number in range(3):
                store.put(key(number), kv(number))
        store = TieredStore(folder)
        with store.read([key(number) for number in range(3)]) as batch:
            for index in range(3):
                batch.kv(index)
            os.truncate(folder / "data.mdb", 8192)
            for index in range(3 if done else 0):
                batch.done(index)
        assert "not kept in cpu" in caplog.text and not store._tiers.leases
        assert all(reading.txn is None for reading in store._disk.environment._readings)
        store.close()
        return "ok"

    assert forked(use) == "ok"


@pytest.mark.parametrize("done", [False, True])
def test_a_batch_that_cannot_be_finished_gives_back_all_it_holds(folder, kv, key, monkeypatch, done):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(3):
            store.put(key(number), kv(number))

        def fail(name, source):
            raise KeyboardInterrupt

        monkeypatch.setattr(store._tiers, "finish", fail)
        batch = store.read([key(number) for number in range(3)])
        for index in range(3 if done else 0):
            with pytest.raises(KeyboardInterrupt):
                batch.done(index)
        if not done:
            with pytest.raises(KeyboardInterrupt):
                batch.close()
        assert not store._tiers.leases
        assert all(reading.txn is None for reading in store._disk.environment._readings)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("no room"), StoreError("no")])
def test_a_put_that_memory_cannot_keep_is_stored_and_not_served_as_before(folder, kv, key, same, monkeypatch, error):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        with monkeypatch.context() as patch:
            patch.setattr(store._tiers.above[0], "prepare", lambda offer: (_ for _ in ()).throw(error))
            assert store.put(key(1), kv(2))
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["disk"]
        same(store.get(key(1)), kv(2))


def test_what_another_process_puts_again_is_no_longer_damaged(folder, kv, key, same, monkeypatch, forked, damage):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        damage(store, segment_key(key(1), 0), -1)

        def refuse(*_):
            raise StoreError("nothing can be written")

        with monkeypatch.context() as patch:
            patch.setattr(store._disk, "remove", refuse)
            assert store.get(key(1)) is None
        assert not store.contains(key(1)) and store.get(key(1)) is None

        def other():
            with TieredStore(folder, cpu_bytes=0) as mine:
                return mine.put(key(1), kv(1))

        assert forked(other) == "True"
        assert store.contains(key(1))
        same(store.get(key(1)), kv(1))
