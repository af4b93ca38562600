"""Each tier in a codec of its own, K before rotation, and what is held shown as it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ragkv.chunk import ChunkKV
from ragkv.errors import RecordError, StoreError
from ragkv.kernels import Rotation, place, rotation_tables
from ragkv.store import Target, TieredStore
from ragkv.store.codecs import CODECS, Int8, get_codec
from ragkv.store.encode import encode
from ragkv.store.record import Record
from ragkv.store.rope import Rope, ropes_of

KEY = bytes(32)


def error(got, want):
    return float(sum((a.float() - b.float()).square().sum() for a, b in zip(got, want, strict=True)) ** 0.5)


def rotations(layers=3, dim=8, interleaved=False):
    freq = 10_000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    return [Rotation(freq, interleaved), None, Rotation(freq[: dim // 4] / 8, not interleaved)][:layers]


def turning_kv(tokens=200, base=1000):
    """Keys whose channels have a level and a scale of their own before rotation, turned to where they stand."""
    generator = torch.Generator().manual_seed(1)
    level = torch.tensor([5.0, -3.0, 0.1, 1.0, -8.0, 0.5, 2.0, -0.2])
    plain = [level * (1 + 0.2 * torch.randn(2, tokens, 8, generator=generator)) for _ in "abc"]
    positions, keys = torch.arange(base, base + tokens), []
    for key, rotation in zip(plain, rotations(), strict=True):
        keys.append(key.clone())
        if rotation is not None:
            cos, sin = rotation_tables(rotation, torch.zeros_like(positions), positions)
            place(keys[-1], key, cos, sin, interleaved=rotation.interleaved)
    return ChunkKV(keys, [torch.randn(2, tokens, 8, generator=generator) for _ in "abc"], base)


@pytest.mark.parametrize("interleaved", [False, True])
def test_turning_back_undoes_what_the_kernels_do(interleaved):
    keys, base = torch.randn(2, 50, 8), 70_000
    rotation = rotations(interleaved=interleaved)[0]
    positions = torch.arange(base, base + 50)
    cos, sin = rotation_tables(rotation, torch.zeros_like(positions), positions)
    turned = torch.empty_like(keys)
    place(turned, keys, cos, sin, interleaved=interleaved)
    rope = Rope.of(rotation)
    torch.testing.assert_close(rope.turned(keys, base), turned, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rope.turned(turned, base, back=True), keys, atol=1e-5, rtol=1e-5)
    assert keys.data_ptr() != rope.turned(keys, base).data_ptr()


@pytest.mark.parametrize("name", ["int8", "int4", "cachegen"])
def test_k_is_quantised_before_rotation_where_that_is_known(folder, key, name):
    want = turning_kv()
    with TieredStore(folder, cpu_bytes=0, codec=name) as store:
        store.put(key(1), want)
        store.put(key(2), want, rotations=rotations())
        as_given, before = store.get(key(1)), store.get(key(2))
    assert error(before.keys, want.keys) < 0.8 * error(as_given.keys, want.keys)
    assert error(before.values, want.values) == error(as_given.values, want.values)
    assert torch.equal(before.keys[1], as_given.keys[1]), "a layer without rotation"
    with TieredStore(folder, cpu_bytes=0) as store:
        assert torch.equal(store.get(key(2)).keys[0], before.keys[0]), "the record knows how its keys turn"


@pytest.mark.parametrize("name", ["raw", "lossless", "fp8"])
def test_other_codecs_take_k_as_it_is(name):
    want, ropes = turning_kv(tokens=20), ropes_of(rotations())
    given, payload = encode(want, codec=get_codec(name))
    known, same_payload = encode(want, codec=get_codec(name), ropes=ropes)
    assert torch.equal(payload.data, same_payload.data)
    assert (given.ropes, known.ropes, known.turned_back) == ((), ropes, False)
    assert Record.unpack(KEY, known.pack(KEY)).ropes == ropes
    assert b"rope" not in given.pack(KEY)


def test_rotations_of_another_model_are_refused(folder, key):
    with TieredStore(folder, codec="int8") as store:
        for wrong in (rotations(2), [Rotation(torch.ones(5), False)] * 3):
            with pytest.raises(StoreError, match="rotations"):
                store.put(key(1), turning_kv(tokens=4), rotations=wrong)
        store.put(key(1), turning_kv(tokens=4), rotations=[None] * 3)
        assert store.get(key(1)) is not None


@pytest.mark.parametrize(
    "text", ['[[3,false,\\"AAAAAA==\\"]', '[[2,false,\\"\\"]]', '[[-1,false,\\"\\"]]', '[[3,false,\\"AAA=\\"]]', "7"]
)
def test_a_rope_that_contradicts_the_layers_is_refused(text):
    record, _ = encode(turning_kv(tokens=4), codec=get_codec("int8"), ropes=ropes_of(rotations()))
    header = record.safetensors_header()
    start = header.index(b'"rope":"') + 8
    stop = header.index(b'","codec"', start)
    changed = header[8:start] + text.encode() + header[stop:]
    with pytest.raises(RecordError, match="cannot be read"):
        Record.from_safetensors_header(len(changed).to_bytes(8, "little") + changed)


def test_memory_may_be_better_than_disk(folder, kv, key, same):
    want = kv(1, tokens=70)
    with TieredStore(folder, codec="int4", cpu_codec="raw") as store:
        store.put(key(1), want)
        same(store.get(key(1)), want)
    with TieredStore(folder, codec="int4", cpu_codec="raw") as store:
        assert error(store.get(key(1)).keys, want.keys) > 0, "it was read from disk"
        with store.read([key(1)]) as batch:
            assert (batch.tiers, batch.codecs) == (["cpu"], ["raw"])


def test_memory_may_hold_more_than_disk_would_decode_to(folder, key):
    want = turning_kv()
    with TieredStore(folder, cpu_codec="int8") as store:
        store.put(key(1), want, rotations=rotations())
        sizes = store.stats().bytes
        assert sizes["cpu"] < 0.4 * want.nbytes < sizes["disk"]
        in_memory = store.get(key(1))
    with TieredStore(folder, cpu_codec="int8") as store:
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["disk"] and torch.equal(batch.layer(0, 0)[0], want.keys[0])
            for layer in range(3):
                batch.layer(0, layer)
        assert store.stats().bytes["cpu"] == sizes["cpu"]
        again = store.get(key(1))
    assert all(torch.equal(a, b) for a, b in zip(again.keys, in_memory.keys, strict=True))
    assert 0 < error(again.keys, want.keys) < 0.02 * error(want.keys, [torch.zeros(())] * 3)


def test_memory_alone_has_one_level(key):
    want = turning_kv()
    with TieredStore(cpu_codec="int8") as store:
        store.put(key(1), want, rotations=rotations())
        assert store.stats().bytes["cpu"] < 0.4 * want.nbytes
        prompt = torch.zeros(2, 2, 300, 8)
        with store.read([key(1)]) as batch:
            batch.place(0, range(1), [Target(prompt[0], prompt[1])], 50)
            assert torch.equal(prompt[0, :, 50:250], batch.layer(0, 0)[0])
            assert (batch.codecs, batch.unrotated) == (["int8"], [True])


def test_by_default_a_chunk_is_the_same_wherever_it_comes_from(folder, kv, key):
    with TieredStore(folder, codec="int4") as store:
        store.put(key(1), kv(1, tokens=70))
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["cpu"]
            above = batch.layer(0, 1)
    with TieredStore(folder, codec="int4") as store, store.read([key(1)]) as batch:
        assert batch.tiers == ["disk"]
        assert all(torch.equal(a, b) for a, b in zip(above, batch.layer(0, 1), strict=True))


@dataclass
class Writes:
    """What was written to a folder so far."""

    store: TieredStore

    def count(self) -> tuple[int, int]:
        with self.store._disk.environment.transaction() as txn:
            return self.store.stats().bytes_written, txn.count("segments")

    def transactions(self) -> int:
        return self.store._disk.environment._live.env.info()["last_txnid"]


def test_what_lies_below_is_not_written_again_when_it_is_evicted(folder, kv, key):
    """Swap-out-only-once, as in RAGCache: memory evicts by forgetting."""
    room = 3 * kv(1, tokens=60).nbytes
    with TieredStore(folder, cpu_bytes=room, policy="lru") as store:
        for number in range(6):
            store.put(key(number), kv(number, tokens=60))
        writes = Writes(store)
        before, transactions = writes.count(), writes.transactions()
        assert before[0] == 6 * kv(1, tokens=60).nbytes
        for number in [*range(6)] * 3:
            with store.read([key(number)]) as batch:
                for layer in range(3):
                    batch.layer(0, layer)
        assert store.stats().evictions["cpu"]["budget"] >= 15, "each read brought one up and put one out"
        assert (writes.count(), writes.transactions()) == (before, transactions)


def test_what_leaves_the_device_is_not_copied_to_memory_again(kv, key, monkeypatch):
    size = kv(1, tokens=64).nbytes
    with TieredStore(gpu_bytes=2 * size, cpu_bytes=100 * size, policy="lru", device="cpu") as store:
        for number in range(5):
            store.put(key(number), kv(number, tokens=64))
        memory, names = store._tiers.home, [key(number) for number in range(5)]
        held, puts = memory.find(names), []
        monkeypatch.setattr(memory, "admit", lambda *_: puts.append(1))
        for number in [*range(5)] * 3:
            assert store.get(key(number)) is not None
        assert store.stats().evictions["gpu"]["budget"] >= 8 and not puts
        assert all(memory.find(names)[name] is held[name] for name in names)


def test_parts_are_what_a_tier_holds(folder, kv, key):
    want = kv(1, tokens=70)
    with TieredStore(folder, cpu_bytes=0, codec="int8") as store:
        store.put(key(1), want)
        store.put(key(2), want, rotations=rotations())
        with store.read([key(1), key(2), key(3)]) as batch:
            assert (batch.codecs, batch.slots) == (["int8", "int8", None], [None] * 3)
            assert batch.unrotated == [False, True, False]
            for side, parts, got in zip("kv", batch.parts(0, 1), batch.layer(0, 1), strict=True):
                decoded = get_codec("int8").decode(parts, tuple(got.shape), got.dtype, side)
                assert torch.equal(decoded, got)
            assert batch.bytes_read > 0
            with pytest.raises(StoreError, match="miss"):
                batch.parts(2, 0)


def test_parts_in_a_pool_are_blocks(kv, key):
    want = kv(1, tokens=70)
    with TieredStore(gpu_bytes=1 << 20, cpu_bytes=1 << 20, device="cpu") as store:
        store.put_many([(key(1), want, 0.0), (key(2), want, 0.0)])
        store.get(key(1))
        with store.read([key(1), key(2)]) as batch:
            batch.kept(1)["of"] = "the chunk in memory"
        store.get(key(2))
        with store.read([key(1)]) as batch:
            batch.kept(0)["of"] = "the pool"
        with store.read([key(2), key(1)]) as batch:
            assert batch.tiers == ["gpu"] * 2 and [batch.kept(index) for index in (0, 1)] == [{"of": "the pool"}] * 2
        with store.read([key(1)]) as batch:
            assert (batch.tiers, batch.codecs) == (["gpu"], ["raw"])
            for parts, tensor in zip(batch.parts(0, 2), (want.keys[2], want.values[2]), strict=True):
                slots, page = batch.slots[0], parts[""].shape[2]
                assert torch.equal(parts[""][slots // page, :, slots % page].transpose(0, 1), tensor)


def test_a_record_whose_parts_have_another_shape_is_not_placed(folder, kv, key):
    """Whoever may write the folder can forge a checksum, but not make a prompt read past its numbers."""
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1, tokens=16))
        env = store._disk.environment
        with env.transaction(write=True) as txn:
            record = Record.unpack(key(1), txn.get("entries", key(1)))
            forged = Record(**{**vars(record), "shapes": tuple(((2, 8, 16), (2, 8, 16)) for _ in range(3))})
            txn.put("entries", key(1), forged.pack(key(1)))
        prompt = torch.zeros(2, 2, 40, 8)
        with store.read([key(1)]) as batch, pytest.raises(RecordError, match="must be"):
            batch.place(0, range(1), [Target(prompt[0], prompt[1])], 0)
        assert not prompt.any() and not store.contains(key(1))


def test_a_codec_with_other_settings_is_another(folder, kv, key):
    """CPU memory keeps what it was told to, whether a chunk is put or comes from disk."""
    want = kv(1, tokens=64, dim=64)
    with TieredStore(folder, codec=Int8(64), cpu_codec=Int8(8)) as store:
        store.put(key(1), want)
        with store.read([key(1)]) as batch:
            assert batch.tiers == ["cpu"] and batch.parts(0, 0)[0]["step"].shape[-1] == 8
            put = error(batch.kv(0).keys, want.keys)
    with TieredStore(folder, codec=Int8(64), cpu_codec=Int8(8)) as store:
        for tier, groups in (("disk", 1), ("cpu", 8)):
            with store.read([key(1)]) as batch:
                assert batch.tiers == [tier] and batch.parts(0, 0)[0]["step"].shape[-1] == groups
                assert error(batch.kv(0).keys, want.keys) > put
    with TieredStore(cpu_codec=Int8(8)) as store:
        store.put(key(1), want)
        assert error(store.get(key(1)).keys, want.keys) == put


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("name", sorted(CODECS))
def test_what_one_gets_is_ones_own_and_copied_once(folder, kv, key, name, tier, monkeypatch):
    copied, clone = [], torch.Tensor.clone
    bytes_of = {"gpu_bytes": (tier == "gpu") << 20, "cpu_bytes": (tier != "disk") << 20}
    with TieredStore(folder, codec=name, cpu_codec=name, device="cpu", **bytes_of) as store:
        store.put(key(1), kv(1, tokens=70))
        with store.read([key(1)]) as batch:
            assert batch.tiers == [tier]
        want = store.get(key(1))
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "clone", lambda one: copied.append(tuple(one.shape)) or clone(one))
            got = store.get(key(1))
        for side in (*got.keys, *got.values):
            side.zero_()
        again = store.get(key(1))
    assert all(torch.equal(a, b) for pair in zip(want, again, strict=True) for a, b in zip(*pair, strict=True))
    assert copied.count((2, 70, 8)) == (6 if name == "raw" or tier == "gpu" else 0)
