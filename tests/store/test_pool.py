"""The block pool and the GPU tier, on whatever device there is."""

from __future__ import annotations

import random

import pytest
import torch

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import TieredStore
from ragkv.store.codecs import Raw
from ragkv.store.encode import encode
from ragkv.store.pool import BlockPool, Pooled

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def record(kv):
    return encode(kv, codec=Raw())[0]


def pooled(pool, kv):
    return Pooled(pool, record(kv), pool.bring(kv))


def test_chunks_come_and_go_without_a_hole(kv, device):
    """After any order of puts and releases every block is usable, whatever the sizes were."""
    pool = BlockPool(record(kv(0)), 40 * 16 * 2 * 8 * 4 * 6, device)
    assert pool.count == 40
    chance, held = random.Random(1), {}
    for step in range(200):
        number = chance.randrange(30)
        tokens = chance.choice((1, 15, 16, 17, 100))
        held.pop(chance.choice(list(held)), None) if held and chance.random() < 0.5 else None
        if pool.blocks_for(tokens) <= pool.free_blocks:
            held[step] = pooled(pool, kv(number, tokens=tokens)), kv(number, tokens=tokens)
        for chunk, want in held.values():
            keys, values = chunk.layer(2)
            assert torch.equal(keys.cpu(), want.keys[2])
            assert torch.equal(values.cpu(), want.values[2])
    assert pool.free_blocks == 40 - sum(pool.blocks_for(chunk.tokens) for chunk, _ in held.values())
    del chunk
    held.clear()
    assert pool.free_blocks == 40
    assert pooled(pool, kv(1, tokens=640)).tokens == 640


def test_a_pool_that_was_made_in_inference_mode_is_filled_outside(kv, device):
    with torch.inference_mode():
        pool = BlockPool(record(kv(0)), 40 * 16 * 2 * 8 * 4 * 6, device)
    assert torch.equal(pooled(pool, kv(1, tokens=20)).layer(0)[0].cpu(), kv(1, tokens=20).keys[0])


def test_a_pool_that_is_full_takes_nothing(kv, device):
    pool = BlockPool(record(kv(0)), 4 * 16 * 2 * 8 * 4 * 6, device)
    with pytest.raises(StoreFullError):
        pool.allocate(5)
    assert pool.free_blocks == 4
    with pytest.raises(StoreFullError):
        BlockPool(record(kv(0)), 1000, device)
    with pytest.raises(StoreError, match="other layers"):
        pool.bring(kv(1, heads=4))


def test_second_read_comes_from_the_device(folder, kv, key, device):
    with TieredStore(folder, gpu_bytes=1 << 22, cpu_bytes=0, device=device) as store:
        store.put(key(1), kv(1))
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["gpu"]
            assert batch.layer(0, 0)[0].device.type == device
    with TieredStore(folder, gpu_bytes=1 << 22, cpu_bytes=1 << 22, device=device) as store:
        store.prefetch([key(1)]).result(30)
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["gpu"]
            keys, _ = batch.layer(0, 2)
        assert torch.equal(keys.cpu(), kv(1).keys[2])
        store.remove(key(1))
        assert store.get(key(1)) is None


def test_chunks_of_other_shapes_stay_below(folder, kv, key, same, device):
    with TieredStore(folder, gpu_bytes=1 << 22, device=device) as store:
        store.put(key(1), kv(1))
        store.put(key(2), kv(2, heads=4))
        with store.read([key(1), key(2)]) as batch:
            assert batch.tiers == ["gpu", "cpu"]
        same(store.get(key(2)), kv(2, heads=4))


def test_no_gpu_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(StoreError, match="gpu_bytes"):
            TieredStore(gpu_bytes=1 << 20)


def test_a_chunk_that_cannot_be_copied_leaves_no_block_taken(kv, device, monkeypatch):
    pool = BlockPool(record(kv(0)), 4 * 16 * 2 * 8 * 4 * 6, device)

    def fail(slots, brought):
        raise torch.OutOfMemoryError("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pooled(pool, kv(0, tokens=20))
    assert pool.free_blocks == 4
