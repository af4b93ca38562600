"""PyTorch's default dtype is somebody else's: what is added up, and kept, is so in full precision under any."""

import pytest
import torch

from ragkv import Engine
from ragkv.kernels import scored_attention
from ragkv.library.sensitivity import sensitivity
from ragkv.model.masks import MaskBuilder, layer_rules
from ragkv.testing import tiny_model


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def under(request):
    """Works something out twice: as it is, and under another default."""
    before = torch.get_default_dtype()

    def both(work):
        want = work()
        torch.set_default_dtype(request.param)
        return want, work()

    yield both
    torch.set_default_dtype(before)


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def test_sensitivities_are_the_same(under):
    values = [drawn(2, 40, 16, seed=n) for n in range(9)]
    want, got = under(lambda: sensitivity(values[:3], values[3:6], values[6:]))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_what_is_attended_to_is_the_same(under):
    spans, held = torch.tensor([[0, 39]] * 400, dtype=torch.int32), drawn(2, 40, 16, seed=1)
    want, got = under(lambda: scored_attention(drawn(2, 400, 16), held, held, spans, drawn(400))[1])
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_masks_are_the_same(under):
    rules, at = layer_rules(tiny_model(num_hidden_layers=1).config, 1, torch.device("cpu")), torch.arange(4)
    want, got = under(lambda: MaskBuilder(rules, at, at, torch.float32, additive=True).layer(0))
    assert got.isfinite().all()
    assert torch.equal(got, want)


def test_a_models_noise_is_the_same(under):
    """In bfloat16 the random numbers would be too coarse to shake an embedding."""
    decoder = Engine(tiny_model()).decoder
    want, got = under(decoder._noise)
    assert got == want
