"""Placing against an fp64 oracle: every codec, pairing and place in memory, on odd shapes."""

import pytest
import torch

from ragkv.kernels import (
    KernelError,
    Piece,
    Rotation,
    Stored,
    place,
    place_pieces,
    rotation_tables,
    scatter,
    slots_of,
)
from ragkv.store.codecs import get_codec

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RAW = [  # (H, T, D, R), dtype, interleaved
    ((1, 1, 64, 64), F32, False),
    ((1, 1, 64, 64), BF16, True),
    ((2, 63, 80, 32), BF16, False),
    ((2, 63, 80, 32), F16, True),
    ((2, 257, 64, 64), BF16, False),
    ((1, 257, 64, 64), F32, True),
    ((3, 5, 128, 128), F16, False),
    ((1, 33, 80, 80), F32, False),
    ((1, 33, 80, 80), BF16, True),
    ((2, 70, 96, 48), BF16, False),
    ((6, 9, 64, 32), BF16, False),
    ((8, 40, 64, 48), BF16, True),
]
EPS = torch.finfo(torch.float32).eps


def name(value):
    if isinstance(value, bool):
        return "interleaved" if value else "halves"
    return "H{}-T{}-D{}-R{}".format(*value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def turned(numbers, cos, sin, interleaved):
    """Pairs as complex numbers times cos + i sin, in fp64."""
    numbers, rotary = numbers.double(), 2 * cos.shape[-1]
    head = numbers[..., :rotary]
    x, y = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    z = torch.complex(x, y) * torch.complex(cos.double(), sin.double())
    head = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    return torch.cat([head, numbers[..., rotary:]], -1)


def tables(tokens, rotary, interleaved, device, old=7, new=1007):
    rotation = Rotation(10000.0 ** -(torch.arange(0, rotary, 2) / rotary).to(device), interleaved)
    steps = torch.arange(tokens, device=device)
    return rotation_tables(rotation, old + steps, new + steps)


@pytest.fixture
def close(rounding):
    """fp32 arithmetic and one rounding, of a row's largest numbers."""

    def check(got, want, dtype):
        largest = want.abs().amax(-1, keepdim=True) * 2**0.5
        assert not got.isnan().any()
        assert ((got.double() - want).abs() <= (rounding(dtype) + 8 * EPS) * largest).all()

    return check


@pytest.mark.parametrize(("shape", "dtype", "interleaved"), RAW, ids=name)
def test_raw(shape, dtype, interleaved, device, random, poisoned, close):
    heads, tokens, dim, rotary = shape
    keys = random(heads, tokens + 3, dim, dtype=dtype)[:, 3:]  # strided, as a slice of a longer document is
    cos, sin = tables(tokens, rotary, interleaved, device)
    cache = poisoned(heads, tokens + 10, dim, dtype=dtype)
    place(cache[:, 4 : 4 + tokens], keys, cos, sin, interleaved=interleaved, impl="triton")
    close(cache[:, 4 : 4 + tokens], turned(keys, cos, sin, interleaved), dtype)
    assert cache[:, :4].isnan().all() and cache[:, 4 + tokens :].isnan().all()


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("shape", [(2, 63, 80, 80), (1, 1, 64, 64), (1, 130, 128, 128), (8, 40, 64, 32)], ids=name)
def test_encoded(shape, codec, side, device, random, poisoned, close):
    heads, tokens, dim, rotary = shape
    original = random(heads, tokens, dim).cpu()
    parts = get_codec(codec).encode(original, side)
    numbers = get_codec(codec).decode(parts, (heads, tokens, dim), torch.float32, side).to(device)
    stored = Stored.encoded(codec, {key: part.to(device) for key, part in parts.items()}, (heads, tokens, dim), side)
    for interleaved in (False, True) if tokens < 100 else (False,):
        cos, sin = tables(tokens, rotary, interleaved, device)
        out = poisoned(heads, tokens, dim, dtype=torch.bfloat16)
        place(out, stored, cos, sin, interleaved=interleaved, impl="triton")
        close(out, turned(numbers, cos, sin, interleaved), torch.bfloat16)
    out = poisoned(heads, tokens, dim)
    place(out, stored, impl="triton")
    assert (out - numbers).abs().max() <= 4 * EPS * original.abs().max()


def test_large_scales_are_read_too(device, poisoned):
    """Where fp16 does not hold them, the codec keeps steps or lowest numbers in fp32."""
    original = torch.linspace(-1e6, 1e6, 2 * 64 * 64).view(2, 64, 64)
    parts = get_codec("int8").encode(original, "v")
    assert parts["low"].dtype == torch.float32
    numbers = get_codec("int8").decode(parts, (2, 64, 64), torch.float32, "v").to(device)
    out = poisoned(2, 64, 64)
    stored = Stored.encoded("int8", {key: part.to(device) for key, part in parts.items()}, (2, 64, 64), "v")
    place(out, stored, impl="triton")
    assert (out - numbers).abs().max() <= 4 * EPS * 1e6


def test_every_e4m3_number(device, poisoned):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn).view(1, 1, 254).to(device)
    out = poisoned(1, 1, 254)
    place(out, Stored(codes, (1, 1, 254), "fp8", "v", scale=torch.ones(1, 1, 1, device=device)), impl="triton")
    assert torch.equal(out, codes.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_pool_and_several_chunks_in_one_call(dtype, device, random, poisoned, close):
    pool, blocks = random(40, 2, 16, 64, dtype=dtype), [[3, 17, 0], [39], [8, 4]]
    lengths = [41, 16, 32]
    slots = torch.cat([slots_of(torch.tensor(b), 16, n) for b, n in zip(blocks, lengths, strict=True)]).to(device)
    joined = torch.cat([pool[b].transpose(0, 1).flatten(1, 2)[:, :n] for b, n in zip(blocks, lengths, strict=True)], 1)
    cos, sin = tables(89, 64, False, device)
    keys, values = poisoned(2, 100, 64, dtype=dtype), poisoned(2, 100, 64, dtype=dtype)
    pieces = [
        Piece(keys[:, 5:94], Stored.paged(pool, slots), cos, sin),
        Piece(values[:, 5:94], Stored.paged(pool, slots)),
    ]
    place_pieces(pieces, impl="triton")
    close(keys[:, 5:94], turned(joined, cos, sin, False), dtype)
    assert torch.equal(values[:, 5:94], joined)
    assert keys[:, 94:].isnan().all() and values[:, :5].isnan().all()


def test_mixed_pieces(device, random, poisoned, close):
    """Several layers with their own rotations, chunks that stay where they are, an empty one, and several codecs, in one call."""
    want, pieces = [], []
    for number, (tokens, rotary, interleaved) in enumerate(
        [(33, 64, False), (1, 64, True), (0, 64, False), (90, 32, False)]
    ):
        keys = random(2, tokens, 64, dtype=torch.bfloat16)
        cos, sin = tables(tokens, rotary, interleaved, device, new=number)
        out = poisoned(2, tokens, 64, dtype=torch.bfloat16)
        pieces.append(Piece(out, Stored.raw(keys), cos, sin, interleaved))
        want.append(turned(keys, cos, sin, interleaved))
        out = poisoned(2, tokens, 64, dtype=torch.float32)
        pieces.append(Piece(out, Stored.raw(keys)))
        want.append(keys.double())
    place_pieces(pieces, impl="triton")
    for piece, numbers in zip(pieces, want, strict=True):
        close(piece.out, numbers, piece.out.dtype) if numbers.numel() else None


def test_what_stays_is_copied_bit_by_bit(device, random, poisoned, close):
    keys = random(2, 37, 64, dtype=torch.float16).transpose(1, 2).contiguous().transpose(1, 2)  # dims lie apart
    out = poisoned(2, 37, 64, dtype=torch.float16)
    cos, sin = tables(1, 64, False, device)
    other = poisoned(2, 1, 64, dtype=torch.float16)
    place_pieces([Piece(out, Stored.raw(keys)), Piece(other, Stored.raw(keys[:, :1]), cos, sin)], impl="triton")
    assert torch.equal(out, keys)
    close(other, turned(keys[:, :1], cos, sin, False), torch.float16)


def test_output_is_never_copied(device, random):
    keys, apart = random(2, 5, 64), random(2, 64, 5).transpose(1, 2)
    with pytest.raises(KernelError, match="side by side"):
        place(apart, keys, impl="triton")
    with pytest.raises(KernelError, match="side by side"):
        scatter(keys, keys, torch.arange(5, device=device), keys.clone(), apart, impl="triton")
