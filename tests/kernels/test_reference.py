"""The operations against an fp64 oracle, on odd shapes, into memory poisoned with NaN."""

import pytest
import torch

from ragkv.kernels import Rotation, deviation, place, rotation_tables

SHAPES = [(1, 1, 16, 16), (2, 63, 80, 32), (8, 257, 64, 64), (3, 5, 128, 128), (1, 0, 16, 16)]  # H, T, D, R


def oracle(keys, inv_freq, interleaved, shift):
    """Pairs as complex numbers, turned by e^(i angle), in fp64."""
    keys, rotary = keys.double(), 2 * len(inv_freq)
    turned = keys[..., :rotary]
    if interleaved:
        x, y = turned[..., 0::2], turned[..., 1::2]
    else:
        x, y = turned[..., : rotary // 2], turned[..., rotary // 2 :]
    z = torch.complex(x, y) * torch.polar(torch.ones_like(inv_freq).double(), inv_freq.double() * shift)
    turned = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    return torch.cat([turned, keys[..., rotary:]], -1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "H{}-T{}-D{}-R{}".format(*s))
def test_place(shape, dtype, interleaved):
    heads, tokens, dim, rotary = shape
    generator = torch.Generator().manual_seed(0)
    # strided input, as a slice of a longer document is
    keys = torch.randn(heads, tokens + 3, dim, generator=generator).to(dtype)[:, 3:]
    rotation = Rotation(10000.0 ** -(torch.arange(0, rotary, 2) / rotary), interleaved)
    old, new = torch.arange(tokens) + 7, torch.arange(tokens) + 1007
    cache = torch.full((heads, tokens + 10, dim), torch.nan, dtype=dtype)
    place(cache[:, 4 : 4 + tokens], keys, *rotation_tables(rotation, old, new), interleaved=interleaved)
    want = oracle(keys, rotation.inv_freq, interleaved, 1000)
    # an fp32 angle of 1000 radians is off by 6e-5 at most, which moves a pair by as much of its length; then one rounding
    tolerance = 1e-4 + torch.finfo(dtype).eps
    got = cache[:, 4 : 4 + tokens].double()
    assert not got.isnan().any()
    assert cache[:, :4].isnan().all() and cache[:, 4 + tokens :].isnan().all()
    longest = keys.double().square().sum(-1, keepdim=True).sqrt()
    assert ((got - want).abs() <= tolerance * longest).all()


def test_moving_back_and_forth_changes_nothing():
    keys = torch.randn(2, 33, 64, generator=torch.Generator().manual_seed(0))
    rotation = Rotation(500000.0 ** -(torch.arange(0, 64, 2) / 64), False)
    here, there = torch.arange(33), torch.arange(33) + 100_000
    moved, back = torch.empty_like(keys), torch.empty_like(keys)
    place(moved, keys, *rotation_tables(rotation, here, there))
    place(back, moved, *rotation_tables(rotation, there, here))
    torch.testing.assert_close(back, keys, atol=1e-5, rtol=1e-5)
    assert float((moved - keys).abs().max()) > 0.5


def test_deviation():
    generator = torch.Generator().manual_seed(0)
    fresh = torch.randn(3, 41, 80, generator=generator).to(torch.bfloat16)
    stored = torch.randn(3, 41, 80, generator=generator).to(torch.bfloat16)
    want = (fresh.double() - stored.double()).pow(2).sum((0, 2))
    got = deviation(fresh, stored)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert deviation(fresh, fresh).abs().max() == 0
