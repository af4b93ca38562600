"""Scatter and deviation against an fp64 oracle."""

import pytest
import torch

from ragkv.kernels import deviation, scatter

EPS = torch.finfo(torch.float32).eps
SHAPES = [
    (1, 1, 64, 5),
    (2, 63, 80, 200),
    (3, 257, 64, 300),
    (1, 17, 128, 17),
    (12, 9, 64, 20),
    (2, 0, 64, 9),
]  # H, S, D, N


def name(value):
    return "H{}-S{}-D{}-N{}".format(*value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def distance(fresh, held):
    """Squares are summed in fp32, over heads times dims of them."""
    want = (fresh.double() - held.double()).square().sum((0, 2))
    return want, want * EPS * (fresh.shape[0] * fresh.shape[2]) ** 0.5 * 2 + 1e-30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_scatter(shape, dtype, device, random, poisoned):
    heads, tokens, dim, keys = shape
    rows = torch.randperm(keys, generator=torch.Generator().manual_seed(1))[:tokens].sort().values.to(device)
    fresh_keys = random(1, tokens, heads, dim, dtype=dtype).transpose(1, 2)[0]  # as a model makes them
    fresh_values = random(heads, tokens, dim, dtype=dtype)
    room = random(2, heads, keys + 8, dim, dtype=dtype)
    want = room.clone()
    held_keys, held_values = room[:, :, :keys]
    scatter(fresh_keys, fresh_values, rows, held_keys, held_values, impl="triton")
    want[0][:, rows], want[1][:, rows] = fresh_keys, fresh_values
    assert torch.equal(room, want)


def test_scatter_of_unlike_widths_and_int32_rows(device, random, poisoned):
    keys, values = poisoned(2, 20, 64), poisoned(2, 20, 32)
    rows = torch.tensor([19, 0, 7], dtype=torch.int32, device=device)
    fresh_keys, fresh_values = random(2, 3, 64), random(2, 3, 32)
    scatter(fresh_keys, fresh_values, rows, keys, values, impl="triton")
    assert torch.equal(keys[:, rows.long()], fresh_keys) and torch.equal(values[:, rows.long()], fresh_values)
    assert keys.isnan().sum() == 2 * 17 * 64 and values.isnan().sum() == 2 * 17 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_deviation(shape, dtype, device, random):
    heads, tokens, dim, keys = shape
    fresh, stored = random(heads, tokens, dim, dtype=dtype), random(heads, keys, dim, dtype=dtype)
    rows = torch.randperm(keys, generator=torch.Generator().manual_seed(1))[:tokens].to(device)
    exact, tolerance = distance(fresh, stored[:, rows])
    got = deviation(fresh, stored, rows=rows, impl="triton")
    assert got.dtype == torch.float32 and ((got - exact).abs() <= tolerance).all()
    plain = stored[:, rows].transpose(1, 2).contiguous().transpose(1, 2)  # dims lie apart
    assert ((deviation(fresh, plain, impl="triton") - exact).abs() <= tolerance).all()
    assert not deviation(fresh, fresh, impl="triton").any()
