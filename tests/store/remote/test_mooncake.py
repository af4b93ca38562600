"""Mooncake's store as a pool: what is its own. What all pools must do, test_pools.py and its neighbours try on it, too."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ragkv.errors import StoreError
from ragkv.store import TieredStore
from ragkv.store.remote.membership import Member, Members
from ragkv.store.remote.mooncake import MooncakePool
from ragkv.store.remote.pool import ClosedError, PoolError

from .conftest import Mooncake


@pytest.fixture
def pools(mooncake_server):
    """Pools of one prefix, all closed."""
    url, opened = mooncake_server.url % time.monotonic_ns(), []

    def make(url: str = url, limit_s: float = 5.0) -> MooncakePool:
        opened.append(MooncakePool.open(url, limit_s, 16))
        return opened[-1]

    yield make
    for pool in opened:
        pool.close()


@pytest.fixture
def breaking(mooncake_server):
    """A store that may be broken."""
    server = Mooncake(mooncake_server.programs)
    yield server
    server.end()


@pytest.mark.parametrize(
    "url", ["?segment=much", "?admin=-", "?segment=-1", "?wrong=1", "?master=elsewhere", "?segment", ":port"]
)
def test_what_is_no_url_of_a_store_is_refused(url, monkeypatch):
    monkeypatch.setattr("ragkv.store.remote.mooncake.client_class", lambda: None)
    with pytest.raises(StoreError, match=r"mooncake://MASTER:PORT/PREFIX"):
        TieredStore(cpu_bytes=1, remote=f"mooncake://user:secret@host{url}")


def test_ranges_are_what_they_ask_for(pools):
    pool, data = pools(), bytes(range(256)) * 1000
    pool.write("ab/one", data, 1.0)
    pool.write("ab/two", data[:10], 1.0)
    spans = [
        ("ab/one", 5, 300),
        ("ab/two", 0, 65536),
        ("ab/none", 0, 9),
        ("ab/one", 100_000, 300_000),
        ("ab/one", 0, 7),
    ]
    answers = pool.answers([pool.begin(*span) for span in [*spans, ("ab/two", 10, 20)]])
    assert [None if answer is None else bytes(answer) for answer in answers] == [
        data[5:300], data[:10], None, data[100_000:], data[:7], b"",
    ]  # fmt: skip
    assert sorted(pool.names()) == [("ab/one", len(data)), ("ab/two", 10)] and list(pool.names("b/")) == []
    pool.delete("ab/one")
    pool.delete("ab/one")
    assert pool.which(["ab/one", "ab/two"]) == {"ab/two"}


def test_who_reads_what_is_replaced_finds_one_or_the_other(pools):
    """Or bytes of both, for the checksums: never that there is none."""
    reader, writer, done = pools(), pools(), threading.Event()
    values = [bytes([number]) * (1 << 20) for number in range(4)]
    writer.write("one", values[0], 1.0)

    def write() -> None:
        for _ in range(20):
            for value in values:
                writer.write("one", value, 1.0)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    found = []
    while not done.is_set():
        found.append(reader.read("one", 0, 1 << 20))
    thread.join()
    assert found and all(data is not None and len(data) == 1 << 20 for data in found)
    assert sum(bytes(data) in values for data in found) > len(found) / 2


def test_a_master_that_is_away_costs_time_alone(breaking, pools, soon):
    pool = pools(breaking.url % "one")
    pool.write("one", b"1", 1.0)
    breaking.master.kill()
    breaking.master.wait()
    try:
        for ask in (lambda: pool.read("one", 0, 1), lambda: pool.which(["one"]), lambda: list(pool.names())):
            with pytest.raises(PoolError):
                ask()
        with pytest.raises(PoolError):
            pools(breaking.url % "other" + "&protocol=tcp&host=127.0.0.1").which(["one"])
    finally:
        breaking.begin()

    def writes() -> bool:
        try:
            pool.write("one", b"1", 1.0)
        except PoolError:
            return False
        return True

    soon(writes, 20.0)
    assert bytes(pool.read("one", 0, 9)) == b"1"


def test_who_waits_has_waited_enough_before_the_client_has(pools, monkeypatch):
    """Its own limit is half a minute; a master that takes connections and says nothing holds it up as long."""
    pool, free = pools(limit_s=0.2), threading.Event()
    monkeypatch.setattr(pool, "_read", lambda ranges: free.wait(10) and [b"1"] * len(ranges))
    begin = time.monotonic()
    with pytest.raises(PoolError, match="no answer"):
        pool.read("one", 0, 1)
    assert 0.2 <= time.monotonic() - begin < 2
    free.set()
    assert pool.read("one", 0, 1) == b"1"


def test_a_closed_pool_and_a_forked_child_ask_for_nothing(pools):
    pool = pools()
    pool.write("one", b"1", 1.0)
    child = os.fork()
    if child == 0:
        pool.after_fork()
        try:
            pool.read("one", 0, 1)
        except ClosedError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    pool.close()
    with pytest.raises(ClosedError):
        pool.begin("one", 0, 1)


def test_what_a_process_lends_goes_with_it(breaking, pools):
    """Stored there where nobody else lends enough; without it, it is a miss, or an error until the master knows."""
    url, size = breaking.url % "lent", 150 << 20  # more than the server's own
    program = f"""
from ragkv.store.remote.mooncake import MooncakePool
pool = MooncakePool.open({url + "&segment=209715200"!r}, 5, 16)
pool.write("large", bytes({size}), 1.0)
print("written", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout.readline() == b"written\n"
        assert bytes(pools(url).read("large", size - 5, size + 5)) == bytes(5)
    finally:
        process.kill()
        process.communicate()
    try:
        assert pools(url).read("large", 0, 1 << 20) is None
    except PoolError:
        pass


def test_who_joins_a_slow_master_holds_up_nobody_else(monkeypatch):
    """Neither those whose master answers, nor those who are members already; and each is joined once."""
    slow, joined = threading.Event(), []

    class Client:
        def setup(self, *args):
            joined.append(args[1])
            return 0 if args[1] == "quick" else int(not slow.wait(10))

    monkeypatch.setattr("ragkv.store.remote.membership.client_class", lambda: Client)
    members = Members()
    with socket.create_server(("127.0.0.1", 0)) as master, ThreadPoolExecutor(4) as threads:
        stalls, quick = (Member(master.getsockname(), metadata=name) for name in ("slow", "quick"))
        waiting = [threads.submit(members.client, stalls, 5.0) for _ in range(3)]
        while not joined:
            time.sleep(0.01)
        asked = threads.submit(lambda: [members.client(quick, 5.0) for _ in range(2)])
        try:
            first, again = asked.result(2)
        finally:
            slow.set()
        assert first is again and len({one.result() for one in waiting}) == 1 and len(joined) == 2
