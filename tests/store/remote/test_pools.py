"""A pool behind the store, of every kind: what one machine puts, another reads, exactly; what one removes is gone."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from concurrent.futures import wait

import pytest
import torch

from ragkv.errors import StoreError
from ragkv.folder import Environment
from ragkv.store import RemoteTier, TieredStore, chunk_key
from ragkv.store.keys import path_key
from ragkv.store.metrics import StoreCollector
from ragkv.store.remote.opening import open_pool
from ragkv.store.remote.pool import ClosedError
from ragkv.store.remote.records import name_of

SECRET = bytes(range(32))


@pytest.mark.parametrize("options", [{}, {"encryption_key": SECRET}], ids=["plain", "encrypted"])
def test_what_one_machine_puts_another_reads(url, machine, options, kv, key, same, kept):
    one, two = machine(url, **options), machine(url, range_bytes=50_000, **options)
    chunks = {number: kv(number, tokens=tokens, layers=9) for number, tokens in enumerate((5, 60, 700))}
    for number, chunk in chunks.items():
        assert one.put(key(number), chunk, space="here", cost_s=0.5, label=f"of {number}")
    one.flush()
    assert one.stats().pools["remote"].sent == 3

    assert two.missing([key(2), key(9), key(0)]) == [key(9)]
    assert two.where([key(0), key(9)]) == {key(0): "remote"}
    with two.read([key(1), key(9), key(2), key(0), key(1)]) as batch:
        assert batch.tiers == ["remote", None, "remote", "remote", "remote"]
        assert torch.equal(batch.layer(2, 4)[1], chunks[2].values[4])
        for index, number in ((0, 1), (2, 2), (3, 0)):
            same(batch.kv(index), chunks[number])
        assert batch.bytes_read == sum(2 * 9 * 2 * len(chunk) * 8 * 4 for chunk in chunks.values())
    stats = two.stats()
    assert (stats.hits["remote"], stats.misses, stats.pools["remote"].unanswered) == (4, 1, 0)
    kept(two, 3)
    with two.read([key(2)]) as batch:
        assert batch.tiers == ["disk"], "it did not come to the folder"
    assert two.stats().pools["remote"].pending == 0, "what came from the pool is not sent there"


def test_google_cloud_storage_by_its_own_client(gs, machine, kv, key, same):
    """All of this file is tried on it, and on Azure's emulator, where there is time (`-m long`)."""
    one, two = machine(gs), machine(gs)
    one.put(key(1), kv(1))
    one.flush()
    same(two.get(key(1)), kv(1))
    two.remove(key(1))
    two.flush()
    assert machine(gs).get(key(1)) is None


def test_of_many_chunks_each_is_asked_for(tmp_path, machine, kv, key):
    """A long document has more chunks than are asked for together."""
    one, two, many = machine(f"file://{tmp_path}/pool"), machine(f"file://{tmp_path}/pool"), 2100
    there = [3, 1023, 1024, many - 1]
    for number in there:
        one.put(key(number), kv(1))
    one.flush()
    missing = two.missing([key(number) for number in range(many)])
    assert len(missing) == many - len(there) and not {key(number) for number in there} & set(missing)


def test_what_is_removed_is_gone_for_all(url, machine, kv, key, same):
    one, two = machine(url), machine(url)
    for number in range(3):
        one.put(key(number), kv(number))
    one.flush()
    assert two.contains(key(1))
    two.remove_many([key(1), key(8)])
    assert not two.contains(key(1)) and two.get(key(1)) is None, "a miss at once"
    two.flush()
    three = machine(url)
    assert three.missing([key(0), key(1), key(2)]) == [key(1)]
    three.put(key(1), kv(5))
    three.flush()
    same(machine(url).get(key(1)), kv(5))


def test_lifetimes_end_in_the_pool_too(url, machine, later, kv, key):
    one = machine(url)
    one.put(key(1), kv(1), lifetime_s=600)
    one.put(key(2), kv(2))
    one.flush()
    two = machine(url)
    assert two.get(key(1)) is not None
    left_s = two.remote.row(key(1)).terms(time.time()).lifetime_s
    assert 0 < left_s <= 600, "in memory and in the folder it lives no longer than there"
    three = later(machine(url), 600)
    assert three.get(key(1)) is None and three.get(key(2)) is not None


@pytest.mark.parametrize("query", ["decode_responses=True", "max_connections=1"])
def test_redis_takes_whatever_its_client_is_told_and_lifetimes_without_an_end(valkey_server, machine, kv, key, query):
    """What is refused would be tried again for ever, and nothing be read; where there are few connections, they are waited for."""
    url = f"redis://127.0.0.1:{valkey_server.port}/0?prefix={query}:&{query}"
    store, other = machine(url), machine(url)
    for number in range(8):
        store.put(key(number), kv(number, tokens=300, heads=4, dim=64), lifetime_s=float(sys.maxsize))
    store.flush(10)
    assert other.missing(map(key, range(8))) == [] and other.get(key(7)) is not None
    assert (store.stats().pools["remote"].failed, other.stats().pools["remote"].unanswered) == (0, 0)


def test_redis_drops_what_has_expired_by_itself(valkey_server, machine, kv, key, soon):
    store = machine(f"redis://127.0.0.1:{valkey_server.port}/0?prefix=expired:")
    store.put(key(1), kv(1), lifetime_s=0.2)
    store.put(key(2), kv(2))
    store.flush()
    soon(lambda: {name for name, _ in store._tiers.behind[0]._pool.names()} == {name_of(key(2))})


def test_what_is_too_large_for_a_pool_does_not_come_there(machine, kv, key, tmp_path, monkeypatch, caplog):
    store = machine(f"file://{tmp_path}/pool")
    monkeypatch.setattr(store._tiers.behind[0]._pool, "most_bytes", 10)
    store.put(key(1), kv(1))
    store.flush()
    pool = store.stats().pools["remote"]
    assert (pool.sent, pool.dropped, pool.pending) == (0, 1, 0) and "too large" in caplog.text


def test_what_is_there_already_is_not_sent_again(url, machine, kv, key):
    one, two = machine(url), machine(url)
    one.put(key(1), kv(1))
    one.flush()
    two.put(key(1), kv(1))
    two.flush()
    pool = two.stats().pools["remote"]
    assert (pool.sent, pool.skipped, pool.pending) == (0, 1, 0)


def test_memory_alone_before_a_pool(url, kv, key, same):
    with TieredStore(cpu_bytes=1 << 20, remote=url) as one:
        one.put(key(1), kv(1), lifetime_s=100)
        one.flush()
    with TieredStore(cpu_bytes=1 << 20, remote=url) as two:
        same(two.get(key(1)), kv(1))
        with two.read([key(1)]) as batch:
            assert batch.tiers == ["cpu"]
        two.remove(key(1))
        two.flush()
        assert not two.contains(key(1))


def test_what_prompts_computed_is_not_for_others(machine, kv, key, tmp_path):
    url, computed = f"file://{tmp_path}/pool", path_key("space", [1], b"")
    for store in (machine(url), machine(url, "memory")):
        store.put(computed, kv(1))
        store.flush()
        assert store.stats().pools["remote"].sent == 0
    assert not machine(url).contains(computed)


def test_a_namespace_finds_nothing_of_another(machine, kv, kept, tmp_path):
    """The key holds the namespace, and an object is bound to its key: copied to another's name it is refused."""
    url = f"file://{tmp_path}/pool"
    mine, other = (chunk_key("space", [1, 2, 3], b"", namespace) for namespace in ("mine", "other"))
    one = machine(url)
    one.put(mine, kv(1), namespace="mine", cost_s=0.5)
    one.flush()
    two = machine(url)
    assert two.contains(mine) and not two.contains(other) and two.get(other) is None
    assert two.get(mine) is not None
    kept(two, 1)
    here, there = two._disk.row(mine), one._disk.row(mine)
    assert (here.namespace, here.usage.cost_s) == (there.namespace, 0.5), "its quota and worth are others in the folder"
    (mine_file,) = (tmp_path / "pool").glob(f"*/{mine.hex()}")
    other_file = tmp_path / "pool" / other.hex()[:2] / other.hex()
    other_file.parent.mkdir(exist_ok=True)
    other_file.write_bytes(mine_file.read_bytes())
    assert two.get(other) is None
    assert two.stats().evictions["remote"] == {"damaged": 1}


def test_a_folder_for_reading_reads_the_pool_and_writes_nothing(machine, kv, key, same, tmp_path):
    url = f"file://{tmp_path}/pool"
    machine(url, "one").put(key(1), kv(1))
    machine(url, "two").close()
    reader = machine(url, "two", readonly=True)
    with TieredStore(tmp_path / "one", remote=url) as one:
        one.flush()
    same(reader.get(key(1)), kv(1))
    reader.flush()
    assert len(reader) == 0


def test_a_pool_that_cannot_be_opened_leaves_the_folder_closed(folder):
    for wrong in ({"remote": "nowhere"}, {"remote": "memory://x", "tiers": [RemoteTier("memory://y")]}):
        with pytest.raises(StoreError):
            TieredStore(folder, **wrong)
        assert not Environment.is_open(folder)


def test_metrics_tell_of_the_pool(machine, tmp_path, kv, key):
    prometheus_client = pytest.importorskip("prometheus_client")
    store = machine(f"file://{tmp_path}/pool")
    store.put(key(1), kv(1))
    store.flush()
    registry = prometheus_client.CollectorRegistry()
    StoreCollector(store, registry)

    def value(name):
        return registry.get_sample_value(f"ragkv_store_pool_{name}", {"tier": "remote"})

    assert (value("sent_total"), value("pending"), value("down")) == (1, 0, 0) and value("sent_bytes_total") > 0


def test_a_store_that_cannot_be_made_leaves_nobody_at_work(machine, tmp_path, folder, kv, key):
    taken, away = RemoteTier(f"file://{tmp_path}/pool"), "redis://127.0.0.1:1"
    machine(taken)
    with TieredStore(folder, remote=away) as store:
        store.put(key(1), kv(1))
    first = RemoteTier(away, name="first")
    with pytest.raises(StoreError, match="one store"):
        TieredStore(folder, tiers=[first], remote=taken)
    assert not [thread for thread in first._uploads._threads if thread.is_alive()]
    assert not Environment.is_open(folder)


def test_a_closed_pool_leaves_nothing_open(url):
    """Whoever takes warnings for errors, as many tests do, would be told of it."""
    gc.collect()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pool = open_pool(url, 3.0, 16)
        pool.write("ab/1", b"1", 60.0)
        pool.close()
        del pool
        gc.collect()
    assert [str(warning.message) for warning in said] == []


def test_what_is_begun_together_is_asked_for_at_once_at_the_end(url):
    pool = open_pool(url, 3.0, 16)
    for number in range(3):
        pool.write(f"ab/{number}", bytes([number]) * 10, 60.0)
    with pool.together():
        begun = [pool.begin(f"ab/{number}", number, 9) for number in range(4)]
    assert [None if data is None else bytes(data) for data in pool.answers(begun)] == [
        b"\0" * 9, b"\1" * 8, b"\2" * 7, None,
    ]  # fmt: skip
    with pytest.raises(ClosedError):
        with pool.together():
            begun = pool.begin("ab/1", 0, 9)
            pool.close()
        pool.answer(begun)


def test_what_a_closed_pool_does_not_answer_is_done_for_who_waits_for_several(tmp_path, relay, s3):
    """As the placing of a prompt does, without a limit of time."""
    pools = [open_pool(f"file://{tmp_path}/pool", 3.0, 16), open_pool(s3, 3.0, 16)]
    relay.fault = "stall"
    asked = pools[1].begin("ab/1", 0, 9)
    with pools[0].together():
        begun = pools[0].begin("ab/1", 0, 9)
        pools[0].close()
    pools[1].close()
    for future in (begun, asked):
        assert wait([future], 1.0).done and future.cancelled()


def test_an_object_store_is_woken_once_for_all_chunks(tmp_path, machine, kv, key, monkeypatch):
    """A thread that wakes another one waits for it: once a chunk and range that took half of the time."""
    one, two = machine(f"file://{tmp_path}/pool"), machine(f"file://{tmp_path}/pool", range_bytes=50_000)
    for number in range(5):
        one.put(key(number), kv(number, tokens=700, layers=9))
    one.flush()
    loop, woken = two.remote._pool._loop, []
    wake = loop._wake
    monkeypatch.setattr(loop, "_wake", lambda begun: (woken.append(len(begun)), wake(begun))[1])
    with two.read([key(number) for number in range(5)]) as batch:
        for layer in range(9):
            for index in range(5):
                batch.layer(index, layer)
    assert len(woken) == 2 and woken[0] == 5 and woken[1] > 5


@pytest.mark.parametrize("odd", ["a%5Cb*:", "a%5Cb%5B1%5D:", "%C3%A4+?:"])
def test_what_redis_lists_is_below_the_prefix_alone(valkey_server, odd):
    """Whatever letters are in it."""
    pool = open_pool(f"redis://127.0.0.1:{valkey_server.port}/0?prefix={odd}", 5.0, 2)
    pool.write("ab/one", b"1", 60.0)
    assert list(pool.names()) == [("ab/one", 1)] and list(pool.names("x/")) == []
    pool.close()
