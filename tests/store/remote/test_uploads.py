"""What is put goes to the pool in the background, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from ragkv.errors import StoreError, UploadError
from ragkv.store import RemoteTier, TieredStore
from ragkv.store.keys import path_key
from ragkv.store.notes import DELETE, SEND, FolderNotes, MemoryNotes
from ragkv.store.remote.keyvalue import RedisPool
from ragkv.store.remote.pool import PoolError
from ragkv.store.remote.records import name_of
from ragkv.store.terms import Terms
from ragkv.store.tier import Offer

AWAY = "redis://127.0.0.1:1"  # nobody listens there


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/pool"


@pytest.fixture
def objects(tmp_path):
    return lambda: {path.name for path in (tmp_path / "pool").glob("*/*")}


def test_what_a_killed_process_did_not_send_the_next_one_does(url, folder, kv, key, same, forked, objects):
    def killed():
        store = TieredStore(folder, cpu_bytes=0, remote=RemoteTier(AWAY, limit_s=0.1))
        for number in range(5):
            store.put(key(number), kv(number))
        store.remove(key(4))
        os.kill(os.getpid(), signal.SIGKILL)

    assert "signal 9" in forked(killed)
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:
        store.flush()
        assert objects() == {key(number).hex() for number in range(4)}
        assert store.stats().pools["remote"].deleted == 1, "a removal was forgotten"
    with TieredStore(folder.parent / "other", cpu_bytes=0, remote=url) as other:
        same(other.get(key(3)), kv(3))


def test_a_process_killed_while_it_sends(valkey_server, folder, kv, key, forked, monkeypatch):
    """Whatever had come there is not sent again, and nothing is left out."""
    url = f"redis://127.0.0.1:{valkey_server.port}/0?prefix=killed while sending:"
    with TieredStore(folder, cpu_bytes=0, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        store.put_many([(key(number), kv(number, tokens=30), 0.0) for number in range(50)])
    write, written = RedisPool.write, []

    def killed_after(*args):
        write(*args)
        written.append(args)
        if len(written) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def sends():
        monkeypatch.setattr(RedisPool, "write", killed_after)
        with TieredStore(folder, cpu_bytes=0, remote=RemoteTier(url, uploads=1)) as store:
            store.flush()
        return "all was sent before it was killed"

    assert "signal 9" in forked(sends)
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:
        store.flush()
        done = store.stats().pools["remote"]
        there = {name for name, _ in store._tiers.behind[0]._pool.names()}
    assert there == {name_of(key(number)) for number in range(50)}
    assert (done.sent, done.pending) == (50 - 7, 0) and 1 <= done.skipped <= 7


def test_what_was_not_sent_is_when_the_folder_is_opened(url, folder, kv, key, objects, soon):
    with TieredStore(folder, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        store.put(key(1), kv(1))
    with TieredStore(folder, remote=url):
        soon(lambda: objects() == {key(1).hex()})


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_what_is_noted_while_something_is_done_is_not_struck_out(kind, folder, key):
    """A chunk that is removed while it is sent is deleted in the pool afterwards."""
    with TieredStore(folder) as store:
        notes = FolderNotes(store._disk.environment) if kind == "folder" else MemoryNotes()
        notes.add({key(1): SEND, key(2): SEND})
        notes.take([key(1), key(2)])
        notes.add({key(1): DELETE})
        notes.strike({key(1): SEND, key(2): SEND})
        assert list(notes.each()) == [(key(1), DELETE)]


def test_what_comes_from_a_pool_is_left_where_it_is_stored_or_to_be_deleted(folder, kv, key):
    """Asked in the transaction that stores it: another process may have removed it just now."""
    with TieredStore(folder, cpu_bytes=0, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        store.put(key(1), kv(1))
        source = store._disk.find([key(1)])[key(1)]
        source.load()
        offers = [Offer(key(number), *source.whole, Terms()) for number in (1, 2, 3)]
        source.release()
        store.remove(key(2))
        assert store._disk.admit(offers, still=lambda key: True) == [False, False, True]
        assert dict(store._disk.notes.each()) == {key(1): SEND, key(2): DELETE}, "what came is not to be sent"


def test_several_processes_on_one_folder_send_all_of_it(url, folder, kv, key, forked, objects):
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:

        def child():
            store.put(key(2), kv(2))
            store.remove(key(3))
            return store.get(key(9)) is None and not store.stats().pools["remote"].unanswered and "put"

        for number in (1, 3):
            store.put(key(number), kv(number))
        store.flush()
        assert forked(child) == "put"
        store.flush()
        assert objects() == {key(1).hex(), key(2).hex()}, "what a child removed is deleted by its parent, too"


def test_what_was_evicted_or_damaged_before_its_turn_is_not_sent(url, folder, kv, key, objects):
    with TieredStore(folder, cpu_bytes=0, disk_bytes=100_000, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        for number in range(9):
            store.put(key(number), kv(number, tokens=60))
        entries = len(store)
        assert entries < 9 and store.stats().pools["remote"].pending == entries
        gone = [key(number) for number in range(9) if not store._disk.row(key(number)).usage.size_bytes]
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:
        store.flush()
        assert len(objects()) == entries and not objects() & {name.hex() for name in gone}


def test_what_was_stored_before_there_was_a_pool_can_be_shared(url, folder, kv, key, objects):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        store.put(path_key("space", [1], b""), kv(1))
        assert store.share() == 0
    with TieredStore(folder, remote=url) as store:
        store.put(key(2), kv(2))
        store.flush()
        assert objects() == {key(2).hex()}
        assert store.share() == 2
        store.flush()
        assert objects() == {key(1).hex(), key(2).hex()}
        pool = store.stats().pools["remote"]
        assert (pool.sent, pool.skipped) == (2, 1)


def test_nothing_goes_on_where_nothing_is_to_be_sent(url, folder, kv, key, monkeypatch):
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:
        store.put(key(1), kv(1))
        store.flush()
        notes, looks = store._tiers.behind[0]._notes, []
        each = notes.each
        monkeypatch.setattr(notes, "each", lambda *start: (looks.append(1), each(*start))[1])
        time.sleep(0.2)
        assert len(looks) <= 8, "threads that have nothing to do look again and again"


def test_flush_says_what_is_left_and_how_long_it_waited(folder, kv, key):
    with TieredStore(folder, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        store.flush(0.0)
        store.put(key(1), kv(1))
        with pytest.raises(UploadError, match=r"after 0.05 s 1 chunks"):
            store.flush(0.05)
        assert isinstance(UploadError(""), TimeoutError)
        assert store.get(key(1)) is not None


def test_a_pool_that_is_away_is_not_tried_with_every_chunk(url, folder, kv, key, monkeypatch):
    def fails(names, size):
        raise PoolError("away")

    with TieredStore(folder, remote=url) as store:
        monkeypatch.setattr(store._tiers.behind[0]._pool, "heads", fails)
        store.put_many([(key(number), kv(number), 0.0) for number in range(40)])
        with pytest.raises(UploadError):
            store.flush(0.2)
        assert 1 <= store.stats().pools["remote"].failed <= 8


def test_what_is_replaced_or_put_again_is_sent_as_it_is_last(url, folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0, remote=RemoteTier(AWAY, limit_s=0.1)) as store:
        store.put(key(1), kv(1))
        store.remove(key(1))
        store.put(key(1), kv(3))
        assert store.stats().pools["remote"].pending == 1
    with TieredStore(folder, cpu_bytes=0, remote=url) as store:
        store.flush()
    with TieredStore(cpu_bytes=1 << 20, remote=url) as other:
        same(other.get(key(1)), kv(3))


def test_what_failed_and_is_noted_no_more_is_forgotten(tmp_path, folder, kv, key, soon):
    """Another process did it, or it was evicted: nobody goes on looking for it, a thousand times a second."""
    with TieredStore(folder, remote=RemoteTier(f"file://{tmp_path}/pool")) as store:
        tier = store.remote
        heads, tier._pool.heads = tier._pool.heads, lambda *_: (_ for _ in ()).throw(PoolError("down"))
        store.put(key(1), kv(1))
        soon(lambda: tier._uploads._slow)
        tier._notes.strike({key(1): SEND})
        looked, each = [], tier._notes.each
        tier._notes.each = lambda *start: looked.append(start) or each(*start)
        soon(lambda: not tier._uploads._slow)
        time.sleep(0.1)
        looked.clear()
        time.sleep(0.2)
        assert len(looked) < 5
        tier._pool.heads = heads


def test_a_folder_that_is_gone_is_given_back_by_closing(tmp_path, folder, kv, key, caplog, soon):
    """And can be opened anew by the same process."""
    store = TieredStore(folder, remote=f"file://{tmp_path}/pool")
    notes, strike = store.remote._notes, store.remote._notes.strike

    def not_yet(done):
        if done:
            raise StoreError("not yet")

    notes.strike = not_yet
    store.put(key(1), kv(1))
    soon(lambda: store.remote._uploads._done)
    notes.strike = strike
    os.rename(folder, folder.parent / "moved")
    close = store.remote._pool.close
    store.remote._pool.close = lambda: close() or (_ for _ in ()).throw(PoolError("it is gone, too"))
    store.close()
    assert "could not be struck out" in caplog.text
    for path, count in ((folder.parent / "moved", 1), (folder, 0)):
        with TieredStore(path) as again:
            assert len(again) == count
            again.put(key(2), kv(2))


def test_what_one_process_removes_while_another_sends_it_does_not_stay(url, folder, kv, key, objects):
    """The other's removal is done before the chunk arrives."""
    with TieredStore(folder, cpu_bytes=0, remote=RemoteTier(url, levels=("int8",))) as one:
        write, pool = one.remote._pool.write, one.remote._pool

        def late(*args):
            if one.contains(key(1)):
                with TieredStore(folder, cpu_bytes=0, remote=url) as other:
                    other.remove(key(1))
                    other.flush()
                assert not objects()
            write(*args)
            time.sleep(0.2)  # nothing is noted any more, and a flush waits all the same

        pool.write = late
        one.put(key(1), kv(1))
        one.flush()
        assert not objects() and one.stats().pools["remote"].pending == 0
        pool.write = write
        one.put(key(1), kv(1))
        one.flush()
        assert len(objects()) == 2


@pytest.mark.parametrize("home", ["folder", "memory"])
def test_what_is_removed_and_put_again_while_it_is_sent_comes_there(url, folder, kv, key, objects, home):
    """The note of the second time is not struck out because the first one is done."""
    with TieredStore(folder if home == "folder" else None, remote=url) as store:
        uploads, other = store.remote._uploads, kv(2)
        work, first = uploads._work, [True]

        def slow(held, what):
            if first and what == SEND:
                first.clear()
                store.remove(key(1))  # which another process has seen to
                done = work(held, what)
                assert done.value == "dropped"
                store.put(key(1), other)
                return done
            return work(held, what)

        uploads._work = slow
        store.put(key(1), kv(1))
        store.flush()
        assert not first and objects() == {key(1).hex()} and store.stats().pools["remote"].sent == 1
