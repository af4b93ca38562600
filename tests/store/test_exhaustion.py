"""A disk, a map and reader slots that run out, and a folder that is deleted: a named error, and what was there stays."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess

import pytest
import torch

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import TieredStore


def full_disk(folder, kv, key, limit):
    """Puts until the disk is full; then everything that was stored is there, and with room a put succeeds."""
    with TieredStore(folder, cpu_bytes=0) as store:
        stored = []
        with limit(), pytest.raises(StoreFullError, match="full"):
            for number in range(10_000):
                store.put(key(number), kv(number, tokens=100))
                stored.append(number)
        assert stored
        for number in stored:
            assert torch.equal(store.get(key(number)).keys[0], kv(number, tokens=100).keys[0])
        assert not store.contains(key(len(stored)))
        room(store, key)
        store.put(key(77_777), kv(1))
        assert store.get(key(77_777)) is not None
    with TieredStore(folder, cpu_bytes=0) as store:
        assert all(store.contains(key(number)) for number in stored[2:])
    return "ok"


def room(store, key):
    store.remove(key(0))
    store.remove(key(1))


class FileSizeLimit:
    """No file of this process may grow beyond 1 MB: the kernel refuses, as on a full disk."""

    def __enter__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, self._before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_disk_full(folder, kv, key, forked):
    assert forked(lambda: full_disk(folder, kv, key, FileSizeLimit)) == "ok"


def test_disk_full_on_a_small_file_system(tmp_path, kv, key, forked):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")

    class Nothing:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    try:
        assert forked(lambda: full_disk(place / "kv", kv, key, Nothing)) == "ok"
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_too_many_readers(folder, kv, key, monkeypatch):
    monkeypatch.setattr("ragkv.folder.connection.MAX_READERS", 3)
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        with (
            store.read([key(1)]),
            store.read([key(1)]),
            store.read([key(1)]),
            pytest.raises(StoreError, match="batches"),
        ):
            store.read([key(1)])
        assert store.get(key(1)) is not None


def test_a_folder_stays_where_it_is_whatever_folder_the_process_works_in(folder, kv, key, same, monkeypatch):
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with TieredStore("kv", cpu_bytes=0) as store:
        monkeypatch.chdir("/")
        store.put(key(1), kv(1))
        same(store.get(key(1)), kv(1))
        assert store.path == folder / "kv" and store.stats().file_bytes


def test_deleted_folder_under_a_running_process(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
        shutil.rmtree(folder)
        with pytest.raises(StoreError, match="deleted"):
            store.put(key(2), kv(2))
        same(store.get(key(1)), kv(1))
    with TieredStore(folder, cpu_bytes=0) as store:
        assert len(store) == 0
        store.put(key(2), kv(2))
        same(store.get(key(2)), kv(2))
