"""What every arrangement of tiers must do."""

from __future__ import annotations

import threading

import pytest
import torch

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, StoreFullError
from ragkv.store import Target, TieredStore

KINDS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "fp16-one-token": {"dtype": torch.float16, "tokens": 1},
    "odd": {"tokens": 13, "heads": 3, "dim": 5, "layers": 1},
    "many-segments": {"tokens": 700, "heads": 4, "dim": 64, "layers": 4},
}


class StoreContract:
    """Inherit, and say how a store of about ``budget`` bytes in its smallest tier is made."""

    @pytest.fixture
    def make(self, folder):
        raise NotImplementedError

    @pytest.fixture
    def store(self, make):
        with make() as store:
            yield store

    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_what_was_put_is_got(self, store, kv, key, same, kind):
        want = kv(1, **kind)
        store.put(key(1), want)
        assert store.contains(key(1))
        assert key(1) in store
        assert len(store) == 1
        same(store.get(key(1)), want)

    def test_layers_may_differ_in_heads_and_dim(self, store, kv, key, same):
        small, large = kv(1), kv(2, heads=4, dim=16)
        want = ChunkKV([*small.keys, *large.keys], [*large.values, *small.values], 3)
        store.put(key(1), want)
        same(store.get(key(1)), want)

    def test_views_and_gradients_may_be_put(self, store, kv, key, same):
        whole = kv(1, tokens=20)
        part = ChunkKV([k[:, 4:9] for k in whole.keys], [v[:, 4:9].requires_grad_() for v in whole.values], 4)
        store.put(key(1), part)
        same(store.get(key(1)), part)

    def test_what_is_put_is_copied_and_what_is_got_is_owned(self, store, kv, key, same):
        want, given = kv(1), kv(1)
        store.put(key(1), given)
        given.keys[0].zero_()
        got = store.get(key(1))
        assert got is not None
        got.values[0].zero_()
        same(store.get(key(1)), want)

    def test_unknown_key_is_a_miss(self, store, key):
        assert store.get(key(9)) is None
        assert not store.contains(key(9))
        assert not store.remove(key(9))
        with store.read([key(9)]) as batch:
            assert (batch.tiers, batch.bases, batch.lengths) == ([None], [None], [None])
            with pytest.raises(StoreError, match="miss"):
                batch.layer(0, 0)

    def test_put_again_replaces(self, store, kv, key, same):
        store.put(key(1), kv(1, tokens=9))
        store.put(key(1), kv(2))
        same(store.get(key(1)), kv(2))
        assert len(store) == 1

    def test_removed_is_gone(self, store, kv, key):
        store.put(key(1), kv(1))
        assert store.get(key(1)) is not None
        assert store.remove(key(1))
        assert store.get(key(1)) is None
        assert len(store) == 0
        assert set(store.stats().bytes.values()) == {0}

    def test_batch_reads_layers_in_any_order_with_holes_and_repeats(self, store, kv, key):
        for number in (1, 2):
            store.put(key(number), kv(number, tokens=4 + number, base=number))
        with store.read([key(2), key(9), key(1), key(2)]) as batch:
            assert batch.bases == [2, None, 1, 2]
            assert batch.lengths == [6, None, 5, 6]
            assert batch.tiers[1] is None
            for index, number in ((3, 2), (0, 2), (2, 1)):
                want = kv(number, tokens=4 + number)
                for layer in (2, 0, 1):
                    keys, values = batch.layer(index, layer)
                    assert torch.equal(keys, want.keys[layer])
                    assert torch.equal(values, want.values[layer])
        with pytest.raises(StoreError, match="closed"):
            batch.layer(0, 0)

    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_layers_are_placed_in_a_prompt(self, store, kv, key, kind):
        want, other = kv(1, **kind), kv(2, tokens=3, **{k: v for k, v in kind.items() if k != "tokens"})
        store.put(key(1), want)
        store.put(key(2), other)
        heads, tokens, dim = want.keys[0].shape
        for layer in range(len(want.keys)):
            prompt = torch.full((2, 1, heads, tokens + 9, dim), torch.nan, dtype=want.keys[0].dtype)
            with store.read([key(2), key(1), key(1)]) as batch:
                targets = [Target(prompt[0, 0], prompt[1, 0])]
                for index, start in enumerate((1, 4)):
                    batch.place(index, range(layer, layer + 1), targets, start)
                assert torch.equal(batch.layer(2, layer)[0], want.keys[layer])
                with pytest.raises(StoreError, match="needs"):
                    batch.place(0, range(layer, layer + 1), targets, tokens + 7)
            assert torch.equal(prompt[0, 0, :, 1 : 4 + tokens], torch.cat([other.keys[layer], want.keys[layer]], 1))
            assert torch.equal(prompt[1, 0, :, 1 : 4 + tokens], torch.cat([other.values[layer], want.values[layer]], 1))
            assert prompt[:, :, :, 0].isnan().all()
            assert prompt[:, :, :, 4 + tokens :].isnan().all()

    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
    def test_a_whole_chunk_is_placed_in_a_prompt(self, store, kv, key, kind):
        """All layers in one call, and some of them: into one prompt's K and V, or tokens that lie apart."""
        want = kv(1, **kind)
        store.put(key(1), want)
        heads, tokens, dim = want.keys[0].shape
        layers = range(len(want.keys))
        for apart in (1, 2):
            prompt = torch.full((2, len(layers), heads, apart * (tokens + 9), dim), torch.nan, dtype=want.keys[0].dtype)
            prompt = prompt[..., ::apart, :]
            targets = [Target(prompt[0, layer], prompt[1, layer]) for layer in layers]
            with store.read([key(1)]) as batch:
                batch.place(0, layers, targets, 4)
                count = batch.bytes_read
                batch.place(0, layers[1:], targets[1:], 4)
                assert batch.bytes_read == count in (0, want.nbytes)
                for start in (-1, 10):
                    with pytest.raises(StoreError, match="needs"):
                        batch.place(0, layers[:1], targets[:1], start)
            for layer in layers:
                assert torch.equal(prompt[0, layer, :, 4 : 4 + tokens], want.keys[layer])
                assert torch.equal(prompt[1, layer, :, 4 : 4 + tokens], want.values[layer])
            assert prompt[:, :, :, :4].isnan().all() and prompt[:, :, :, 4 + tokens :].isnan().all()

    def test_read_ahead_changes_nothing(self, store, kv, key):
        want = kv(1, tokens=700, heads=4, dim=64, layers=4)
        store.put(key(1), want)
        with store.read([key(1), key(9)]).read_ahead() as batch:
            for layer in range(4):
                assert torch.equal(batch.layer(0, layer)[1], want.values[layer])

    def test_several_are_put_at_once(self, make, kv, key, same):
        with make(200_000) as store:
            assert store.put_many([(key(number), kv(number), 0.5) for number in range(5)]) == [True] * 5
            for number in range(5):
                same(store.get(key(number)), kv(number))
            with pytest.raises(StoreFullError):
                store.put_many([(key(9), kv(9), 0.0), (key(10), kv(10, tokens=5_000), 0.0)])
            same(store.get(key(3)), kv(3))

    def test_budget_is_kept(self, make, kv, key):
        budget = 200_000
        with make(budget) as store:
            for number in range(60):
                store.put(key(number), kv(number, tokens=20 + number))
                assert max(store.stats().bytes.values()) <= budget
            assert 0 < len(store) < 60
            assert store.contains(key(59))

    def test_too_large_is_refused_before_anything_is_evicted(self, make, kv, key, same):
        with make(200_000) as store:
            store.put(key(1), kv(1))
            with pytest.raises(StoreFullError):
                store.put(key(2), kv(2, tokens=5_000))
            same(store.get(key(1)), kv(1))
            assert not store.contains(key(2))
            assert not any(sum(reasons.values()) for reasons in store.stats().evictions.values())

    def test_leased_is_not_evicted(self, make, kv, key):
        with make(200_000) as store:
            store.put(key(0), kv(0))
            with store.read([key(0)]) as batch:
                for number in range(1, 60):
                    store.put(key(number), kv(number, tokens=60))
                assert store.contains(key(0))
                assert torch.equal(batch.layer(0, 1)[0], kv(0).keys[1])
            for number in range(60, 200):
                store.put(key(number), kv(number, tokens=60), cost_s=1e9)
            assert not store.contains(key(0))

    def test_removed_while_leased_stays_readable_in_the_batch(self, store, kv, key):
        store.put(key(1), kv(1))
        with store.read([key(1)]) as batch:
            assert store.remove(key(1))
            assert torch.equal(batch.layer(0, 2)[1], kv(1).values[2])
        assert store.get(key(1)) is None

    @pytest.mark.parametrize(
        "bad",
        [
            ChunkKV([], [], 0),
            ChunkKV([torch.zeros(2, 3, 4)], [], 0),
            ChunkKV([torch.zeros(2, 3, 4)], [torch.zeros(2, 4, 4)], 0),
            ChunkKV([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 3, 4)], 0),
            ChunkKV([torch.zeros(2, 0, 4)], [torch.zeros(2, 0, 4)], 0),
            ChunkKV([torch.zeros(2, 3, 4, dtype=torch.int32)], [torch.zeros(2, 3, 4, dtype=torch.int32)], 0),
            ChunkKV([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)], -1),
        ],
        ids=["none", "no-values", "lengths", "4d", "empty", "int", "base"],
    )
    def test_no_kv_is_refused(self, store, key, bad):
        with pytest.raises(StoreError):
            store.put(key(1), bad)
        assert len(store) == 0

    def test_facts_are_kept(self, store):
        assert store.meta_get("model") is None
        store.meta_put("model", b"one")
        store.meta_put("model", b"two")
        assert store.meta_get("model") == b"two"

    @pytest.mark.parametrize("unknown", [b"", b"x" * 600])
    def test_a_key_that_nothing_can_have_is_unknown(self, store, kv, key, unknown):
        store.put(key(1), kv(1))
        with store.read([key(1), unknown]) as batch:
            assert batch.tiers[0] and batch.tiers[1] is None
        assert store.missing([key(1), unknown]) == [unknown] and store.where([unknown]) == {}
        assert not store.pin(unknown) and not store.remove(unknown) and store.sizes([unknown]) == {}
        assert store.meta_get("") is None

    @pytest.mark.parametrize("facts", [{"": b""}, {"n" * 600: b""}, {"\ud800": b""}, {"n": "text"}, {1: b""}])
    def test_a_fact_that_cannot_be_kept_is_refused_with_all_that_comes_with_it(self, store, kv, key, facts):
        with pytest.raises(StoreError, match="fact"):
            store.put_many([(key(1), kv(1), 0.0)], facts={"good": b"", **facts})
        assert store.meta_get("good") is None and not store.contains(key(1))

    def test_closed_is_refused(self, make, key):
        store = make()
        with store.read([]):
            pass
        store.close()
        store.close()
        with pytest.raises(StoreError, match="closed"):
            store.get(key(1))

    def test_threads(self, make, kv, key, same):
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(30):
                    number = (seed * 7 + step * 3) % 25
                    store.put(key(number), kv(number, tokens=30), cost_s=number)
                    with store.read([key(number), key((number + 5) % 25)]) as batch:
                        for index, tier in enumerate(batch.tiers):
                            if tier is not None:
                                want = kv((number, (number + 5) % 25)[index], tokens=30)
                                assert torch.equal(batch.layer(index, 1)[0], want.keys[1])
                    assert max(store.stats().bytes.values()) <= 400_000
                    if step % 7 == 0:
                        store.remove(key(number))
            except BaseException as error:
                failures.append(error)

        with make(400_000) as store:
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
        assert not failures, failures


class TestMemory(StoreContract):
    @pytest.fixture
    def make(self):
        return lambda budget=1 << 30: TieredStore(cpu_bytes=budget)


class TestDisk(StoreContract):
    @pytest.fixture
    def make(self, folder):
        return lambda budget=1 << 30: TieredStore(folder, cpu_bytes=0, disk_bytes=budget)


class TestMemoryAndDisk(StoreContract):
    @pytest.fixture
    def make(self, folder):
        return lambda budget=1 << 30: TieredStore(folder, cpu_bytes=budget // 2, disk_bytes=budget)


class TestGpuAndMemory(StoreContract):
    """The block pool, on the CPU: its code is the same on every device."""

    @pytest.fixture
    def make(self):
        return lambda budget=1 << 28: TieredStore(gpu_bytes=budget, cpu_bytes=budget, device="cpu")


class TestGpuAndDisk(StoreContract):
    @pytest.fixture
    def make(self, folder):
        return lambda budget=1 << 28: TieredStore(
            folder, gpu_bytes=budget // 2, cpu_bytes=0, disk_bytes=budget, device="cpu"
        )
