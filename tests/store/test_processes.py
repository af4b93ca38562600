"""Several processes and threads on one folder; places where a folder may not lie."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import pytest
import torch

from ragkv.errors import RagKVError, StoreError
from ragkv.store import TieredStore, payload
from ragkv.store.codecs import get_codec
from ragkv.store.encode import encode
from ragkv.store.snapshot import DiskSnapshot


def test_import_loads_no_lmdb_and_memory_works_without_it():
    code = (
        "import sys, ragkv.store\n"
        "assert not {'lmdb', 'zstandard', 'obstore', 'redis', 'cryptography'} & set(sys.modules)\n"
        "sys.modules['lmdb'] = None\n"
        "import torch; from ragkv.store import TieredStore; from ragkv.chunk import ChunkKV\n"
        "store = TieredStore(); store.put(b'k' * 32, ChunkKV([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 3)], 0))\n"
        "assert len(store.get(b'k' * 32)) == 2"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_second_store_in_one_process_shares_the_first(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as one:
        with TieredStore(folder.parent / "." / "kv") as two:
            one.put(key(1), kv(1))
            same(two.get(key(1)), kv(1))
        same(one.get(key(1)), kv(1))


def test_what_one_process_puts_and_removes_the_other_sees(folder, kv, key, same, forked):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))

        def other():
            with TieredStore(folder) as mine:
                same(mine.get(key(1)), kv(1))
                mine.put(key(2), kv(2))
                return mine.remove(key(1))

        assert forked(other) == "True"
        same(store.get(key(2)), kv(2))
        assert store.get(key(1)) is None, "memory still has what was removed elsewhere"
        assert not store.contains(key(1))


def test_fork_is_survived(folder, kv, key, same, forked):
    """The child uses the very store object of its parent, while the parent has batches open."""
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        batch = store.read([key(1)])

        def child():
            with pytest.raises(StoreError, match="forked"):
                batch.layer(0, 0)
            same(store.get(key(1)), kv(1))
            store.put(key(2), kv(2))
            batch.close()
            store.close()
            return "ok"

        assert forked(child) == "ok"
        for number in range(10, 40):
            store.put(key(number), kv(number))
            store.remove(key(number))
        assert torch.equal(batch.layer(0, 1)[0], kv(1).keys[1])
        batch.close()
        same(store.get(key(2)), kv(2))


def test_a_child_has_threads_of_its_own(folder, kv, key, same, forked):
    """What its parent's had begun is begun anew, and nothing that was taken to fork stays taken."""
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        store.prefetch([key(1)]).result()

        def child():
            store.prefetch([key(1)]).result(5)
            with ThreadPoolExecutor(1) as pool:
                same(pool.submit(store.get, key(1)).result(), kv(1))
            return "ok"

        assert forked(child, timeout_s=20) == "ok"


def test_a_child_closes_a_batch_that_a_thread_of_its_parent_reads(folder, kv, key, forked, monkeypatch):
    """The thread holds the chunk's lock, and is not in the child to let go of it."""
    inside, read = threading.Event(), DiskSnapshot.segment

    def slowly(*args):
        inside.set()
        time.sleep(0.3)
        return read(*args)

    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        monkeypatch.setattr(DiskSnapshot, "segment", slowly)

        def child():
            batch.close()
            return "ok"

        with store.read([key(1)]) as batch:
            batch.read_ahead()
            inside.wait(10)
            assert forked(child, timeout_s=5) == "ok"
            assert torch.equal(batch.layer(0, 1)[0], kv(1).keys[1])


def test_fork_while_a_thread_looks_where_a_tensor_lies(kv, forked_amid):
    """What is worked out once has no lock that a child would wait for."""

    def sizes():
        return encode(kv(1), codec=get_codec("raw"))[0].payload_bytes

    want = str(sizes())
    assert forked_amid(sizes, payload, "prod", sizes) == want


def test_fork_while_threads_read_and_write(folder, kv, key, same, forked):
    with TieredStore(folder) as store:
        store.put(key(1), kv(1))
        stop = threading.Event()

        def work(seed):
            number = seed
            while not stop.is_set():
                number += 10
                store.put(key(number), kv(number))
                store.get(key(1))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (100, 101)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert forked(lambda: (store.put(key(2), kv(2)), same(store.get(key(1)), kv(1)))) == "(True, None)"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        same(store.get(key(2)), kv(2))


def hammer(store, kv, key, seed, seconds, budget):
    """Puts, reads, pins, removes; every tensor is right and budgets are kept."""
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        number = chance.randrange(40)
        want = kv(number, tokens=20 + number, heads=4, dim=32)
        action = chance.random()
        if action < 0.4:
            store.put(key(number), want, cost_s=chance.random())
        elif action < 0.9:
            keys = [key(number), key((number + 1) % 40)]
            with store.read(keys) as batch:
                if batch.tiers[0] is not None:
                    assert batch.lengths[0] == 20 + number
                    for layer in range(3):
                        keys_, values = batch.layer(0, layer)
                        assert torch.equal(keys_, want.keys[layer])
                        assert torch.equal(values, want.values[layer])
        elif action < 0.95:
            store.remove(key(number))
        else:
            store.pin(key(number), 0.05)
        assert max(store.stats().bytes.values()) <= budget


def stress(folder, kv, key, forked_processes, threads, seconds):
    budget = 1_500_000

    def process(seed):
        failures = []

        def thread(number):
            try:
                hammer(store, kv, key, number, seconds, budget)
            except BaseException as error:
                failures.append(error)

        with TieredStore(folder, cpu_bytes=300_000, disk_bytes=budget) as store:
            workers = [threading.Thread(target=thread, args=(seed * 100 + number,)) for number in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(seconds + 60)
                assert not worker.is_alive(), "a deadlock"
            if failures:
                raise failures[0]
        return 0

    children = []
    for seed in range(forked_processes):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            code = 1
            try:
                code = process(seed)
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * forked_processes


def test_threads_and_processes(folder, kv, key):
    stress(folder, kv, key, forked_processes=3, threads=3, seconds=2)


@pytest.mark.long
def test_8_threads_in_4_processes_for_a_minute(folder, kv, key):
    stress(folder, kv, key, forked_processes=4, threads=8, seconds=60)


def test_readonly(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
    with TieredStore(folder, readonly=True) as store:
        same(store.get(key(1)), kv(1))
        for write in (lambda: store.put(key(2), kv(2)), lambda: store.remove(key(1)), lambda: store.meta_put("a", b"")):
            with pytest.raises(StoreError, match="reading only"):
                write()
        with pytest.raises(StoreError, match="reading only"):
            TieredStore(folder)
        store.flush()  # of what was read nothing is written down


def test_threads_fork_at_once(folder, kv, key, same, forked):
    """Nobody gives back what another took, and nothing stays taken."""
    assert forked(lambda: forks_of_threads(folder, kv, key, same), timeout_s=30) == "ok"


def forks_of_threads(folder, kv, key, same):
    def fork():
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0

    with TieredStore(folder, cpu_bytes=1 << 20) as store, ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(fork) for _ in range(3)]:
            done.result()
        threads.submit(store.put, key(1), kv(1)).result()
        same(store.get(key(1)), kv(1))
        return "ok"


def test_folder_that_may_not_be_written_opens_for_reading(folder, kv, key, same, forked):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
    (folder / "lock.mdb").unlink()
    for path in (folder, folder / "data.mdb"):
        path.chmod(0o555)
    for parent in takewhile(lambda parent: parent != Path(tempfile.gettempdir()), folder.parents):
        parent.chmod(0o755)

    def unprivileged():
        if os.geteuid() == 0:
            os.setuid(65534)
        with TieredStore(folder) as store:
            same(store.get(key(1)), kv(1))
            with pytest.raises(StoreError, match="reading only"):
                store.put(key(2), kv(2))
        return "ok"

    try:
        assert forked(unprivileged) == "ok"
    finally:
        folder.chmod(0o755)


def test_readonly_needs_a_store(tmp_path):
    with pytest.raises(StoreError, match="not a folder"):
        TieredStore(tmp_path / "nothing", readonly=True)
    assert not (tmp_path / "nothing").exists()


def test_another_kind_of_file_is_not_taken_for_a_store(folder):
    folder.mkdir(parents=True)
    (folder / "data.mdb").write_bytes(b"something else " * 1000)
    with pytest.raises(RagKVError):
        TieredStore(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cpu_bytes": 0},
        {"cpu_bytes": -1},
        {"policy": "fifo"},
        {"codec": "zip"},
        {"path": "x", "cpu_bytes": 0, "disk_bytes": 0},
    ],
    ids=["no-tier", "negative", "policy", "codec", "all-off"],
)
def test_bad_arguments(arguments):
    with pytest.raises(RagKVError):
        TieredStore(**arguments)


def test_a_fork_waits_for_changes_in_memory_and_counts_no_use_twice(folder, kv, key, forked):
    inside, changes = threading.Event(), []
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        store.get(key(1))

        def change():
            with store._tiers.lock:
                inside.set()
                time.sleep(0.3)
                changes.append(1)

        thread = threading.Thread(target=change)
        thread.start()
        inside.wait(10)
        assert forked(lambda: (len(changes), dict(store._disk._touched))) == "(1, {})"
        thread.join()
        assert forked(lambda: store._tiers.lock.acquire(blocking=False)) == "True"
        assert store._disk._touched == {key(1): 1}
