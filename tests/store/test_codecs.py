"""Every codec: exact or within its step, for odd shapes and hard numbers."""

from __future__ import annotations

import math

import pytest
import torch

from ragkv.errors import ArgumentError, RecordError, StoreError
from ragkv.store import TieredStore
from ragkv.store.codecs import CODECS, CacheGen, Int4, Int8, get_codec

SHAPES = {"even": (2, 64, 16), "one-token": (3, 1, 8), "odd": (2, 65, 7), "prime": (1, 131, 33), "one": (1, 1, 1)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def numbers(shape, dtype, seed=0):
    """Normal numbers of which some channels are far larger, as in real K."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    return (tensor * torch.logspace(-2, 1, shape[2])).to(dtype)


def through(name, tensor, side):
    codec = get_codec(name)
    parts = codec.encode(tensor, side)
    return codec.decode(parts, tuple(tensor.shape), tensor.dtype, side), parts


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", sorted(CODECS))
def test_error_is_bounded_by_the_step(name, shape, dtype, side):
    tensor = numbers(shape, dtype)
    got, _ = through(name, tensor, side)
    assert got.shape == tensor.shape
    assert got.dtype == dtype
    if name in ("raw", "lossless"):
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8))
        return
    # Of a line that shares a scale, the largest span; a half of a step, and what half precision and the dtype round.
    line = tensor.float().transpose(1, 2) if side == "k" else tensor.float()
    span = (line.amax(-1) - line.amin(-1)).max() if name.startswith("int") else line.abs().max()
    step = {"int8": 1 / 255, "int4": 1 / 15, "fp8": 1 / 8, "cachegen": 0.2}[name]
    slack = line.abs().max() * (2 * torch.finfo(dtype).eps + 2 * torch.finfo(torch.half).eps)
    assert (got.float() - tensor.float()).abs().max() <= span * step / 2 + slack


@pytest.mark.parametrize("name", ["raw", "lossless"])
def test_exact_codecs_keep_every_bit(name):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(4, 128, 128)
    for dtype in (torch.bfloat16, torch.float16):
        tensor = bits.view(dtype)
        got, _ = through(name, tensor, "k")
        assert torch.equal(got.view(torch.int16), bits)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "cachegen"])
@pytest.mark.parametrize("value", [0.0, 3.25, -70_000.0, 1e-30])
def test_constant_lines(name, value):
    tensor = torch.full((2, 5, 6), value)
    got, _ = through(name, tensor, "k")
    assert torch.allclose(got, tensor, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "cachegen"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, value):
    tensor = torch.ones(2, 5, 6)
    tensor[1, 2, 3] = value
    with pytest.raises(StoreError, match="finite"):
        get_codec(name).encode(tensor, "v")


@pytest.mark.parametrize("name", sorted(CODECS))
def test_parts_of_another_shape_are_refused(name):
    codec = get_codec(name)
    parts = codec.encode(numbers((2, 64, 16), torch.bfloat16), "k")
    for shape in ((2, 200, 16), (3, 64, 16), (2, 64, 5)):
        with pytest.raises(RecordError):
            codec.decode(parts, shape, torch.bfloat16, "k")
    parts.pop("low", None)
    parts.pop("scale", None)
    if name == "cachegen":
        parts.pop("step")
    if name != "raw":
        with pytest.raises(RecordError):
            codec.decode(parts, (2, 64, 16), torch.bfloat16, "k")


SPOILED = {
    "groups": lambda parts: {**parts, "step": torch.cat([parts["step"], parts["step"]], -1)},
    "lowest": lambda parts: {**parts, "low": parts["low"][:1]},
    "shorter": lambda parts: {**parts, "": parts[""][..., :-1].contiguous()},
    "heads": lambda parts: {**parts, "": parts[""][:1]},
    "dtype": lambda parts: {**parts, "": parts[""].float().half()},
    "steps": lambda parts: {**parts, "step": parts["step"].int()},
    "scales": lambda parts: {**parts, "scale": parts["scale"].half()},
}
GROUPED = ("groups", "lowest", "shorter", "heads", "dtype", "steps")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("int8", how) for how in GROUPED),
        *(("int4", how) for how in GROUPED),
        *(("fp8", how) for how in ("shorter", "heads", "dtype", "scales")),
        *(("raw", how) for how in ("shorter", "heads", "dtype")),
    ],
)
@pytest.mark.parametrize("side", ["k", "v"])
def test_parts_that_contradict_each_other_are_refused(name, how, side):
    """Before a kernel is given them as they are, too."""
    codec, shape = get_codec(name), (2, 70, 32)
    parts = codec.encode(numbers(shape, torch.float32), side)
    codec.check(parts, shape, torch.float32, side)
    for look in (codec.check, codec.decode):
        with pytest.raises(RecordError):
            look(SPOILED[how](parts), shape, torch.float32, side)


@pytest.mark.parametrize(
    ("name", "at_most"), [("lossless", 0.85), ("int8", 0.56), ("fp8", 0.56), ("int4", 0.36), ("cachegen", 0.30)]
)
def test_bytes_against_raw_bf16(name, at_most):
    tensor = numbers((4, 256, 64), torch.bfloat16)
    for side in ("k", "v"):
        _, parts = through(name, tensor, side)
        stored = sum(part.numel() * part.element_size() for part in parts.values())
        assert stored <= at_most * tensor.numel() * 2


@pytest.mark.parametrize("name", sorted(CODECS))
def test_codec_is_recorded_with_the_entry(folder, kv, key, same, name):
    """What was stored with one codec is read by a store with another."""
    want = kv(1, tokens=70, dtype=torch.bfloat16)
    with TieredStore(folder, cpu_bytes=0, codec=name) as store:
        store.put(key(1), want)
        first = store.get(key(1))
    with TieredStore(folder, codec="raw") as store:
        store.put(key(2), want)
        same(store.get(key(1)), first)
        same(store.get(key(2)), want)
    assert (first.keys[0].float() - want.keys[0].float()).abs().mean() < 0.15


def test_codec_with_settings(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0, codec=Int4(group=16)) as store:
        store.put(key(1), kv(1, tokens=70))
        assert store.get(key(1)).keys[0].shape == (2, 70, 8)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("group", [1, 10, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cachegen_errs_by_half_a_step(shape, group, side):
    """With and without differences: an error does not grow along a group, for it is taken from what is decoded."""
    codec, tensor = CacheGen(bins=(0.1,), group_tokens=group), numbers(shape, torch.float32)
    parts = codec.encode(tensor, side)
    got = codec.decode(parts, shape, torch.float32, side)
    assert ((got - tensor).abs() <= parts["step"].float() * 0.5001 + 1e-6).all()
    assert get_codec("cachegen").decode(parts, shape, torch.float32, side).equal(got), "settings are recorded"


def test_cachegen_is_finer_in_early_layers(folder, kv, key):
    want = kv(1, tokens=300, layers=6, dim=32)
    with TieredStore(folder, cpu_bytes=0, codec=CacheGen(bins=(0.1, 0.4))) as store:
        store.put(key(1), want)
        got = store.get(key(1))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(got.keys, want.keys, strict=True)]
    assert max(errors[:3]) < 0.04 < 0.1 < min(errors[3:])


@pytest.mark.parametrize("harm", ["claims more", "nonsense", "too few", "group"])
def test_cachegen_refuses_what_it_did_not_make(harm):
    import zstandard

    codec, tensor = CacheGen(), torch.zeros(2, 8, 4)
    parts = codec.encode(tensor, "k")
    shape = (2, 8, 4)
    if harm == "claims more":
        shape = (2, 1 << 40, 4)
        packed = zstandard.ZstdCompressor().compressobj(size=2 << 42)
        parts[""] = torch.frombuffer(
            bytearray(packed.compress(b"x") + packed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)), dtype=torch.uint8
        )
    elif harm == "nonsense":
        parts[""] = torch.arange(40, dtype=torch.uint8)
    elif harm == "too few":
        parts[""] = parts[""][:-3]
    else:
        parts["group"] = torch.tensor([math.nan])
    with pytest.raises(RecordError):
        codec.decode(parts, shape, torch.float32, "k")


@pytest.mark.parametrize("settings", [{"bins": ()}, {"bins": (0.0,)}, {"group_tokens": 0}])
def test_cachegen_settings(settings):
    with pytest.raises(StoreError):
        CacheGen(**settings)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("tokens", [1, 2, 63, 65, 96, 100, 129, 200, 450])
@pytest.mark.parametrize("codec", [Int8(), Int4(), Int8(7)], ids=["int8", "int4", "groups of 7"])
def test_what_is_no_multiple_of_a_group_is_exact_to_half_a_step_and_fills_up_little(codec, tokens, side):
    """Also of numbers that half precision has few of, and of a narrow span far from zero."""
    for scale, far in ((1.0, 0.0), (1e-4, 0.0), (1e-6, 0.0), (1e-2, 300.0), (1e5, 0.0)):
        tensor = numbers((2, tokens, 48), torch.float32) * scale + far
        parts = codec.encode(tensor, side)
        got = codec.decode(parts, tuple(tensor.shape), torch.float32, side)
        length = tokens if side == "k" else 48
        size = parts[""].numel() * 8 // codec.bits // parts["step"].numel()
        steps = parts["step"].float().repeat_interleave(size, 2)[..., :length]
        error = (got - tensor).abs()
        assert ((error.transpose(1, 2) if side == "k" else error) <= steps * 0.5001 + tensor.abs().max() * 1e-6).all()
        assert size <= codec.group
        assert parts["step"].shape[2] * size - length <= max(length / 8, parts["step"].shape[2])


@pytest.mark.parametrize(("codec", "group"), [(Int4, 3), (Int4, 0), (Int8, 0), (Int8, -8)])
def test_groups_that_are_none(codec, group):
    with pytest.raises(ArgumentError, match="group"):
        codec(group)


@pytest.mark.parametrize("size", [2 << 42, 5])
def test_lossless_refuses_what_claims_another_size_before_it_is_decompressed(size, monkeypatch):
    import zstandard

    codec, tensor = get_codec("lossless"), numbers((2, 8, 4), torch.bfloat16)
    parts = codec.encode(tensor, "k")
    packed = zstandard.ZstdCompressor().compressobj(size=size)
    data = packed.compress(b"xxxxx") + packed.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    parts[""] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("it was decompressed"))
    with pytest.raises(RecordError, match="not 64 bytes"):
        codec.decode(parts, (2, 8, 4), torch.bfloat16, "k")


@pytest.mark.parametrize("name", ["lossless", "cachegen"])
def test_what_is_compressed_is_bytes(name):
    codec, tensor = get_codec(name), numbers((2, 8, 4), torch.bfloat16)
    parts = codec.encode(tensor, "k")
    parts[""] = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(RecordError, match="bytes, got"):
        codec.decode(parts, (2, 8, 4), torch.bfloat16, "k")
