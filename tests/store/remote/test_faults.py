"""A pool that is slow, broken or away: what is read is a miss, what is put waits, and no question fails."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragkv.errors import RecordError, UploadError
from ragkv.store import Asking
from ragkv.store.remote import RemoteTier
from ragkv.store.remote.arrivals import Arrivals
from ragkv.store.remote.objects import ObjectPool
from ragkv.store.remote.pool import Breaker, ClosedError, PoolError
from ragkv.store.remote.records import name_of


@pytest.fixture
def stored(relay, s3, machine, kv, key):
    """A chunk in a pool that can be made to fail."""
    store = machine(s3)
    store.put(key(1), kv(1, tokens=900))
    store.flush()
    return store


@pytest.mark.parametrize("fault", ["500", "cut", "stall"])
def test_a_pool_that_fails_is_a_miss_and_is_left_alone(stored, relay, s3, machine, key, kv, same, fault, caplog):
    store = machine(s3, limit_s=0.3)
    relay.fault = fault
    begin = time.monotonic()
    assert store.get(key(1)) is None
    assert time.monotonic() - begin < 3
    asked = len(relay.asked)
    begin = time.monotonic()
    assert store.get(key(1)) is None and store.missing([key(1)]) == [key(1)]
    assert len(relay.asked) == asked, "a question asked a pool that had just failed"
    pool = store.stats().pools["remote"]
    assert pool.down and pool.unanswered == 1 and not store.stats().evictions["remote"]
    assert "left alone" in caplog.text
    relay.fault = ""
    store._tiers.behind[0]._heads.breaker._until = 0.0  # a second later
    same(store.get(key(1)), kv(1, tokens=900))
    assert not store.stats().pools["remote"].down


def test_one_answer_that_fails_is_asked_for_again(stored, relay, s3, machine, key, kv, same):
    left = iter([True, True])
    relay.fault, relay.when = "500", lambda method, path: next(left, False)
    same(machine(s3).get(key(1)), kv(1, tokens=900))


@pytest.mark.parametrize("answer", ["501", "405", "400", "404"])
def test_a_store_that_does_not_delete_several_at_once(relay, s3, machine, kv, key, answer):
    """S3's DeleteObjects, by which its client deletes a single one, too, is not everywhere; 404 said that they were gone."""
    relay.fault, relay.when = answer, lambda method, path: method == "POST" and "delete" in path
    store = machine(s3)
    for number in range(3):
        store.put(key(number), kv(number))
    store.flush()
    for number in range(2):
        store.remove(key(number))
        store.flush()
    store.remote._pool.delete("what is not there")
    assert [name for name, _ in store.remote._pool.names()] == [name_of(key(2))]
    tried = [path for method, path in relay.asked if relay.when(method, path)]
    assert len(tried) == (3 if answer == "501" else 1), "it is asked again and again"


def test_a_server_that_fails_is_not_taken_for_one_that_cannot(relay, s3, machine):
    relay.fault, relay.when = "503", lambda method, path: method == "POST" and "delete" in path
    pool = machine(s3).remote._pool
    with pytest.raises(PoolError, match="503"):
        pool.delete("a", "b")
    relay.fault = ""
    pool.delete("a", "b")
    assert not [method for method, _ in relay.asked if method == "DELETE"]


def test_a_server_that_dies_in_the_middle_of_reading(stored, relay, s3, machine, key, kv, same):
    store = machine(s3, limit_s=0.3, range_bytes=100_000, requests=1)
    with store.read([key(1), key(1)]) as batch:
        assert batch.tiers == ["remote", "remote"]
        relay.end()
        with pytest.raises(RecordError, match="did not give it"):
            batch.kv(1)
    assert store.get(key(1)) is None, "the engine begins anew: now it is a miss"
    store.put(key(1), kv(1, tokens=900))
    same(store.get(key(1)), kv(1, tokens=900))
    relay.begin()
    assert stored.get(key(1)) is not None and not store.stats().evictions["remote"], (
        "a whole object was taken for damaged"
    )


def test_what_several_readers_were_not_given_is_not_damaged(stored, relay, s3, machine, key):
    store = machine(s3)
    tier = store._tiers.behind[0]
    with store.read([key(1)]), store.read([key(1)]):
        for _ in range(2):
            tier._heads.lost(key(1), PoolError("away"))
        for _ in range(2):
            tier.damaged(key(1))
    store.flush()
    assert not store.stats().evictions["remote"] and tier._records.which([key(1)]), "a whole object was deleted"


def test_what_is_put_while_the_pool_is_away_comes_there_later(relay, s3, machine, key, kv, same, soon):
    store = machine(s3, limit_s=0.3)
    relay.end()
    for number in range(4):
        store.put(key(number), kv(number))
    with pytest.raises(UploadError, match="4 chunks"):
        store.flush(0.05)
    soon(lambda: store.stats().pools["remote"].failed)
    pool = store.stats().pools["remote"]
    assert pool.pending == 4 and pool.down
    relay.begin()
    store.flush()
    pool = store.stats().pools["remote"]
    assert (pool.pending, pool.sent, pool.down) == (0, 4, False)
    same(machine(s3).get(key(3)), kv(3))


def test_a_server_that_dies_in_the_middle_of_writing(relay, s3, machine, key, kv, same):
    relay.fault = "cut"
    store = machine(s3, limit_s=0.3, uploads=1)
    relay.when = lambda method, path: method == "PUT" and (relay.end(), True)[1]
    store.put(key(1), kv(1))
    with pytest.raises(UploadError):
        store.flush(0.5)
    relay.when = lambda method, path: False
    relay.begin()
    store.flush()
    same(machine(s3).get(key(1)), kv(1))


def test_redis_that_is_killed_and_comes_back_empty(valkey_server, machine, key, kv, same):
    url = f"redis://127.0.0.1:{valkey_server.port}/0?prefix=killed:"
    one, two = machine(url), machine(url)
    one.put(key(1), kv(1))
    one.flush()
    valkey_server.end()
    assert two.get(key(1)) is None and two.stats().pools["remote"].unanswered == 1
    two.put(key(2), kv(2))
    valkey_server.begin()
    two.flush()
    same(machine(url).get(key(2)), kv(2))
    assert machine(url).get(key(1)) is None and one.get(key(1)) is not None


def test_a_batch_that_is_done_early_leaves_the_pool_in_good_repute(stored, relay, s3, machine, key, kv, same):
    """What is still on its way is given up, also while the read-ahead waits for it: that is no failure of the pool."""
    store = machine(s3, range_bytes=100_000)
    relay.fault, relay.when = "stall", lambda method, path: method == "GET" and len(relay.asked) > 4
    with store.read([key(1)]) as batch:
        batch.read_ahead()
        time.sleep(0.1)
        batch.done(0)
    relay.fault = ""
    pool = store.stats().pools["remote"]
    assert not (pool.down or pool.unanswered or store.stats().evictions["remote"])
    same(store.get(key(1)), kv(1, tokens=900))


def test_closing_does_not_wait_for_a_pool_that_hangs(relay, s3, machine, key, kv):
    store = machine(s3, limit_s=30)
    relay.fault = "stall"
    store.put(key(1), kv(1))
    time.sleep(0.1)
    begin = time.monotonic()
    store.close()
    assert time.monotonic() - begin < 1.4


def test_a_program_that_ends_while_it_sends_ends_at_once_and_quietly(relay, s3, folder):
    relay.fault = "stall"
    program = (
        "import time, torch; from ragkv.chunk import ChunkKV; from ragkv.store import TieredStore, RemoteTier\n"
        f"store = TieredStore({str(folder)!r}, remote=RemoteTier({s3!r}, limit_s=30))\n"
        "store.put(bytes(32), ChunkKV([torch.zeros(1, 2, 8)], [torch.zeros(1, 2, 8)], 0)); time.sleep(0.1)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_redis_that_says_nothing_is_a_miss_soon(machine, key):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = machine(f"redis://127.0.0.1:{silent.getsockname()[1]}", limit_s=0.2)
        begin = time.monotonic()
        assert store.get(key(1)) is None and time.monotonic() - begin < 2
        assert store.stats().pools["remote"].unanswered == 1


def test_readers_and_writers_at_once(tmp_path, machine, key, kv, same):
    """Two machines write the same chunks, and two remove some, while four threads read them: whatever is found is right."""
    url, until = f"file://{tmp_path}/pool", time.monotonic() + 0.8
    stores = [machine(url, cpu_bytes=100_000, range_bytes=3_000) for _ in range(2)]
    found = [0] * 4
    chunks = [kv(number, tokens=40 + number) for number in range(8)]

    def write(store, offset):
        while time.monotonic() < until:
            for number in range(offset, 8, 1):
                store.put(key(number), chunks[number])
            store.remove(key(offset))

    def read(reader):
        store = machine(url, cpu_bytes=100_000, range_bytes=3_000)
        while time.monotonic() < until:
            for number in range(8):
                got = store.get(key(number))
                if got is not None:
                    same(got, chunks[number])
                    found[reader] += 1
            store.remove_many([key(reader)])

    with ThreadPoolExecutor(6) as threads:
        work = [threads.submit(write, store, offset) for offset, store in enumerate(stores)]
        work += [threads.submit(read, reader) for reader in range(4)]
        for one in work:
            one.result()
    assert all(found)


def test_who_asks_again_and_when():
    now = [0.0]
    breaker = Breaker(lambda: now[0])
    waits = []
    for _ in range(9):
        assert breaker.allows()
        others = [threading.Thread(target=breaker.failed) for _ in range(3)]
        for other in others:
            other.start()
            other.join()
        assert not breaker.allows()
        waits.append(breaker.left_s)
        now[0] += breaker.left_s
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert breaker.allows() and not breaker.allows(), "one tries for all"
    breaker.succeeded()
    assert breaker.allows() and breaker.allows() and not breaker.left_s


def test_a_forked_child_asks_for_itself():
    """Whatever thread of the parent's had just found the pool away."""
    tier = RemoteTier("memory://forked")
    tier._heads.failed(PoolError("away"))
    with tier._heads.breaker._lock:
        tier.after_fork()
        assert not tier._heads.breaker._lock.locked() and tier._heads.breaker.allows()
    assert tier.pool().unanswered == 0
    tier.close()


def test_an_object_store_is_closed_in_a_child(tmp_path, forked):
    """The thread that asks it is its parent's: a request would wait for ever, or for as long as it may."""
    pool = ObjectPool.open(f"file://{tmp_path}", 60.0, 4)
    pool.write("one", b"bytes", math.inf)

    def child():
        pool.after_fork()
        with pytest.raises(ClosedError):
            list(pool.names())
        return "ok"

    assert forked(child, timeout_s=20) == "ok"
    assert [*pool.names()] == [("one", 5)]
    pool.close()


def test_one_object_that_is_refused_is_a_miss_of_that_alone(relay, s3, machine, kv, key, same):
    """As one that a rule of the bucket has moved to an archive."""
    one = machine(s3)
    for number in range(4):
        one.put(key(number), kv(number, tokens=900))
    one.flush()
    relay.fault, relay.when = "403", lambda method, path: method == "GET" and key(2).hex() in path
    for limit_s in (float("inf"), 60.0):
        store = machine(s3)
        with store.read([key(number) for number in range(4)], asking=Asking(limit_s)) as batch:
            assert batch.tiers == ["remote", "remote", None, "remote"]
            same(batch.kv(3), kv(3, tokens=900))
        pool = store.stats().pools["remote"]
        assert not (pool.down or pool.unanswered)
    assert machine(s3).missing([key(number) for number in range(4)]) == [key(2)]


def test_where_all_of_a_document_is_refused_it_is_read_anew_and_replaced(relay, s3, machine, kv, key, same):
    """A rule of the bucket goes by age: it moves a document's objects together."""
    one, keys = machine(s3), [key(number) for number in range(20)]
    one.put_many([(each, kv(number), 0.0) for number, each in enumerate(keys)])
    one.flush()
    moved = {f"/{name_of(each)}" for each in keys}
    relay.fault, relay.when = "403", lambda method, path: method == "GET" and any(map(path.endswith, moved))
    store = machine(s3)
    assert store.missing(keys) == keys and store.remote.lacking(keys) == keys
    assert not store.stats().pools["remote"].down
    store.put(key(3), kv(3))
    store.flush()
    moved.remove(f"/{name_of(key(3))}")
    same(machine(s3).get(key(3)), kv(3))


def test_who_may_read_nothing_is_told(relay, s3, machine, key, kv, caplog):
    one = machine(s3)
    one.put(key(1), kv(1))
    one.flush()
    relay.fault = "403"
    store = machine(s3)
    assert store.get(key(1)) is None and store.stats().pools["remote"].down and "left alone" in caplog.text


@pytest.mark.parametrize("process", ["this", "another", "another, and much else"])
def test_what_is_removed_while_it_comes_to_the_folder_does_not_come(machine, tmp_path, kv, key, monkeypatch, process):
    """It was read, waits to be kept, and is deleted in the pool before its turn."""
    goes_on, keep = threading.Event(), Arrivals._keep

    def slowly(arrivals, closing):
        goes_on.wait(10)
        keep(arrivals, closing)

    url = f"file://{tmp_path}/pool"
    one = machine(url)
    one.put(key(1), kv(1))
    one.put(key(2), kv(2))
    one.flush()
    two = machine(url)
    monkeypatch.setattr(Arrivals, "_keep", slowly)
    assert two.get(key(1)) is not None and two.get(key(2)) is not None
    remover = two if process == "this" else machine(url, two.path.name)
    if "much else" in process:
        monkeypatch.setattr("ragkv.store.folder_books.LOGGED_REMOVALS", 1)
        remover.remove_many([key(3), key(4)])
    remover.remove(key(1))
    remover.flush()
    goes_on.set()
    assert two.remote._arrivals._background.wait(10)
    kept = [] if "much else" in process else [key(2)]  # nobody knows
    assert two._disk.stored() == kept and not two.contains(key(1))


def test_what_is_removed_while_it_is_read_does_not_come_to_memory(machine, tmp_path, kv, key):
    """Another process removes it, and memory has caught up before the batch is done with it."""
    url = f"file://{tmp_path}/pool"
    one = machine(url)
    one.put(key(1), kv(1))
    one.flush()
    two = machine(url, cpu_bytes=1 << 20)
    two.put(key(2), kv(2))
    with two.read([key(1)]) as batch:
        batch.kv(0)
        remover = machine(url, two.path.name)
        remover.remove(key(1))
        remover.flush()
        assert two.contains(key(2))
    assert not two.contains(key(1)) and two.contains(key(2))
