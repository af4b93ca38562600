"""The check layer that a model is given."""

import pytest
import torch

from ragkv import CacheBlend, Engine, FullPrefill, PromptTemplate, Union
from ragkv.library.depth import check_layer
from ragkv.methods import Auto, LegoLink
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)


def test_the_first_layer_that_sees_what_changes_behind_it():
    quiet, early, late = torch.rand(20) * 1e-3, torch.zeros(20), torch.zeros(20)
    early[:3], late[10:13] = 1.0, 5.0
    # What layer 1 sees is not what changes later; layer 2 sees it, and layer 3 no better.
    assert check_layer(torch.stack([quiet * 0, quiet + early, quiet + late, quiet + late, quiet + late])) == 2
    assert check_layer(torch.stack([quiet * 0, *[quiet + late] * 4])) == 1


@pytest.mark.parametrize(
    "changes",
    [torch.rand(2, 20), torch.rand(6, 0), torch.rand(6, 2), torch.zeros(6, 20), torch.full((6, 20), torch.nan)],
)
def test_too_little_to_compare(changes):
    assert check_layer(changes) == 1


def test_what_is_compared_are_the_models_own_values():
    model, foreign = tiny_model(), random_ids(17)
    engine = Engine(model, template=TEMPLATE, foreign=foreign)
    text = [*foreign, 10]
    front, behind = text[:9], text[9:]

    def values(ids):
        with torch.no_grad():
            layers = model(input_ids=torch.tensor([[1, 5, 6, *ids]]), use_cache=True).past_key_values.layers
        return torch.stack([layer.values[0, :, -len(behind) :] for layer in layers])

    want = (values(behind) - values(front + behind)).square().sum((1, 3))
    torch.testing.assert_close(engine.documents.reader.changes(), want, atol=1e-5, rtol=1e-3)
    assert want[1:].min() > 1e-6


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: Auto(repair=m), lambda m: Union(m, LegoLink(0))])
def test_the_engine_asks_for_the_layer_once_and_reports_it(wrap, monkeypatch):
    engine = Engine(tiny_model(), template=TEMPLATE)
    asked = []
    monkeypatch.setattr("ragkv.library.reading.check_layer", lambda changes: asked.append(changes) or 2)
    chunks = engine.add([random_ids(n) for n in (20, 31)])[::-1]
    for _ in range(2):
        prompt = engine.fuse(chunks, QUESTION, method=wrap(CacheBlend(0.2)))
        assert "check_layer=2" in prompt.report.method
        assert prompt.report.fresh_by_layer[:3] == [53, 53, 53] > prompt.report.fresh_by_layer[3:]
    assert len(asked) == 1
    given = engine.fuse(chunks, QUESTION, method=CacheBlend(0.2, check_layer=1))
    assert "check_layer=1" in given.report.method and len(asked) == 1
    engine.fuse(chunks, QUESTION, method=FullPrefill())
