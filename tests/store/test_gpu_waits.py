"""What the store does beside a GPU and does not wait for, counted on one that is none."""

from __future__ import annotations

import threading

import pytest
import torch

from ragkv.kernels import Rotation
from ragkv.store import Target, TieredStore
from ragkv.store.codecs import Int8, get_codec
from ragkv.store.encode import encode
from ragkv.store.record import Record

CODECS = ["raw", "int8", "fp8", "lossless"]


def held(store, key, want):
    """The numbers of a chunk in the GPU tier, which are as wanted."""
    with store.read([key]) as batch:
        assert (batch.tiers, batch.codecs, batch.unrotated) == (["gpu"], ["raw"], [False])
        pairs = [batch.layer(0, layer) for layer in range(len(want.keys))]
    for layer, pair in enumerate(pairs):
        for got, expected in zip(pair, (want.keys[layer], want.values[layer]), strict=True):
            assert got.is_cuda and torch.equal(got.numbers, expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("disk", [False, True])
def test_the_gpu_tier_is_filled_without_waiting(gpu, folder, kv, key, same, disk, codec):
    """From the CPU tier, from disk, and from a GPU where the numbers are already."""
    kvs = [kv(number, tokens=40) for number in range(2)]
    with gpu, TieredStore(folder if disk else None, codec=codec, gpu_bytes=1 << 20, cpu_bytes=1 << 20) as store:
        store.put(key(0), kvs[0])
        assert gpu.waits == []
        store._gpu.remove([key(0)])
        store.get(key(0))
        want = get_codec(codec)
        want = [record.decode(payload) for record, payload in (encode(each, codec=want) for each in kvs)]
        held(store, key(0), want[0])
        assert gpu.waits == []
        store.put(key(1), gpu.put(kvs[1]))
        assert gpu.waits == ["event"], "for what is stored below"
        held(store, key(1), want[1])
    if disk:
        with gpu, TieredStore(folder, codec=codec, gpu_bytes=1 << 20, cpu_bytes=1 << 20) as store:
            gpu.waits.clear()
            store._prefetch.load([key(0)], {})
            held(store, key(0), want[0])
            assert gpu.waits == []


def test_a_chunk_is_written_by_few_launches(gpu, kv, key):
    """However many layers it has."""
    with gpu, TieredStore(gpu_bytes=1 << 22, cpu_bytes=1 << 22) as store:
        store.put(key(0), kv(0, layers=2))
        gpu.done.clear()
        store.put(key(1), kv(1, layers=2))
        few = [name for name in gpu.done if name != "copy_"]
    with gpu, TieredStore(gpu_bytes=1 << 22, cpu_bytes=1 << 22) as store:
        store.put(key(0), kv(0, layers=12))
        gpu.done.clear()
        store.put(key(1), kv(1, layers=12))
        assert [name for name in gpu.done if name != "copy_"] == few and gpu.done.count("copy_") == 24


@pytest.mark.parametrize("name", CODECS)
def test_a_chunk_comes_from_the_gpu_with_one_wait(gpu, kv, name):
    kv = kv(1, tokens=70)
    record, payload = encode(kv, codec=get_codec(name))
    with gpu:
        again, same = encode(gpu.put(kv), codec=get_codec(name))
    assert gpu.waits == ["event"]
    assert again.pack(b"key") == record.pack(b"key") and torch.equal(same.data, payload.data)
    assert len(gpu.pinned) == (1 if name == "raw" else 2)


def test_several_codecs_take_it_from_there_once(gpu, folder, kv, key):
    with gpu, TieredStore(folder, codec="int8", cpu_codec=Int8(8)) as store:
        store.put(key(1), gpu.put(kv(1, tokens=70)))
        assert gpu.waits == ["event"]


def test_rotations_that_layers_share_come_from_there_once(gpu, on_gpu, folder, kv, key):
    turns = Rotation(on_gpu(torch.ones(4)), False)
    with gpu, TieredStore(folder) as store:
        store.put(key(1), kv(1, layers=12), rotations=[turns, None] * 6)
        assert len(gpu.waits) == 1


@pytest.mark.parametrize("cpu_bytes", [0, 1 << 22])
def test_what_is_copied_into_a_prompt_there_is_not_waited_for(gpu, on_gpu, folder, kv, key, cpu_bytes):
    with gpu, TieredStore(folder, cpu_bytes=cpu_bytes) as store:
        store.put(key(1), kv(1))
        room = torch.zeros(2, 2, 9, 8)
        with store.read([key(1)]) as batch:
            batch.place(0, range(2, 3), [Target(on_gpu(room[0]), on_gpu(room[1]))], 3)
    assert (
        gpu.waits == []
        and torch.equal(room[0, :, 3:8], kv(1).keys[2])
        and torch.equal(room[1, :, 3:8], kv(1).values[2])
    )


@pytest.fixture
def free(monkeypatch):
    """Notes of everything that is decoded whether another thread could have had the lock of the tiers in memory meanwhile."""
    seen, decode = [], Record.decode

    def watch(store):
        def decoded(record, payload):
            taken = []

            def other():
                taken.append(store._tiers.lock.acquire(timeout=0.2))
                if taken[0]:
                    store._tiers.lock.release()

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            seen.extend(taken)
            return decode(record, payload)

        monkeypatch.setattr(Record, "decode", decoded)
        return seen

    return watch


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_what_a_full_tier_does_not_want_is_not_decoded(kv, key, codec, free):
    """It is asked with the size alone, in every prompt; what it wants is decoded where nobody waits for the lock."""
    with TieredStore(gpu_bytes=4 * kv(0, tokens=64).nbytes, cpu_bytes=1 << 22, cpu_codec=codec, device="cpu") as store:
        for number in range(4):
            store.put(key(number), kv(number, tokens=64), cost_s=1e3)
        seen = free(store)
        store.put(key(9), kv(9, tokens=64), cost_s=1e-3)
        for _ in range(5):
            store.read([key(9)]).close()
        assert seen == [] and store.stats().entries["gpu"] == 4
        store.put(key(10), kv(10, tokens=64), cost_s=1e6)
        assert seen == [True] * (codec != "raw") and not store._gpu.missing([key(10)])


def test_what_memory_does_not_want_is_not_decoded(folder, kv, key, free):
    """Memory above a disk whose codec is another."""
    with TieredStore(folder, cpu_bytes=4 * kv(0, tokens=64).nbytes, codec="int8") as store:
        for number in range(4):
            store.put(key(number), kv(number, tokens=64), cost_s=1e3)
        seen = free(store)
        store.put(key(9), kv(9, tokens=64), cost_s=1e-3)
        for _ in range(5):
            assert store._prefetch.load([key(9)], {}) > 0
        assert seen == [] and store.stats().entries["cpu"] == 4
