"""How much values change behind another text."""

import pytest
import torch

from ragkv.library.sensitivity import sensitivity
from ragkv.model.syncs import no_syncs


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_one_number_a_token_is_waited_for_once(layers):
    draw = torch.Generator().manual_seed(1)
    alone, behind, foreign = (
        [torch.randn(2, tokens, 4, generator=draw) for _ in range(layers)] for tokens in (7, 7, 5)
    )
    waits = []
    with no_syncs(torch.device("cpu"), waits.append):
        got = sensitivity(alone, behind, foreign)
    assert waits == ["cpu"]
    want = torch.zeros(7, dtype=torch.float64)
    for own, other, unit in zip(alone[1:], behind[1:], foreign[1:], strict=True):
        want += (own - other).double().square().sum((0, 2)) / unit.double().square().sum((0, 2)).mean()
    torch.testing.assert_close(got.double(), want / max(1, layers - 1), atol=0, rtol=1e-6)
    assert got.dtype == torch.float32


def test_without_a_foreign_text_nothing_changes():
    alone, none = [torch.ones(2, 7, 4)] * 3, [torch.ones(2, 0, 4)] * 3
    assert torch.equal(sensitivity(alone, [2 * one for one in alone], none), torch.zeros(7))
