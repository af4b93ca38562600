"""As on an accelerator, where stored chunks are placed layer by layer within the pass: prompts run together all the same."""

import threading
from functools import partial

import pytest
import torch

from ragkv import Engine, LegoLink, PromptTemplate, RecordError
from ragkv.fusion.placement import Placement
from ragkv.model import steps as module
from ragkv.store.batch import Batch
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
NO_END = {"max_new_tokens": 6, "eos_token_id": None}


def requests(engine, many=4):
    chunks = engine.add([random_ids(n) for n in (17, 20, 31)])
    return [([chunks[n % 3], chunks[(n + 1) % 3]], random_ids(5 + n)) for n in range(many)]


@pytest.fixture
def by_layer(monkeypatch):
    """From here on chunks are placed so; a list of who did it, and where."""
    placed, place = [], Placement._place_layer

    def watched(self, layer):
        placed.append((self, layer, threading.get_ident()))
        place(self, layer)

    def begin():
        monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
        monkeypatch.setattr(Placement, "_place_layer", watched)
        return placed

    return begin


def same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=1e-4)
        assert (a.report.budget, a.report.hits) == (b.report.budget, b.report.hits)
        for layer, other in zip(a.past_key_values.layers, b.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *(
            (name, "lego-link:k=4")
            for name in ("llama", "mistral", "gemma2", "glm", "qwen3_moe", "gpt_oss", "llama4_text")
        ),
        ("llama", "reuse"),
    ],
)
def test_one_pass_for_all_is_what_each_is_alone(architecture, method, by_layer):
    """With selective attention over spans, as the kernel runs it."""
    engine = Engine(tiny_model(architecture), template=TEMPLATE, kernels="reference")
    asked, steps = requests(engine), engine.runner.steps("reference")
    want, before = [engine.fuse(*one, method=method) for one in asked], steps.sizes.total()
    assert steps.packs
    placed = by_layer()
    got = engine.fuse_many(asked, method=method)
    same(got, want)
    assert steps.sizes.total() == before + 1 and steps.sizes[len(asked)] == 1
    assert {one.report.attention for one in got} == {"selective (reference)"}
    assert len({self for self, *_ in placed}) == len(asked) and len({thread for *_, thread in placed}) == 1
    assert [layer for _, layer, _ in placed] == sorted(layer for _, layer, _ in placed)  # all prompts' of each layer


def test_answers_go_along(by_layer, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 1000.0)
    engine = Engine(tiny_model(), template=TEMPLATE, method=LegoLink(4), piece_tokens=16)
    asked, steps = requests(engine, 7), engine.runner.steps()
    want = [engine.generate(*one, **NO_END).token_ids for one in asked]
    by_layer()
    sizes, real = [], module.run_packed

    def watched(decoder, parts):
        sizes.append(sorted(len(part) for part in parts))
        return real(decoder, parts)

    monkeypatch.setattr(module, "run_packed", watched)
    assert steps.packs
    assert [answer.token_ids for answer in engine.generate_many(asked, at_once=3, **NO_END)] == want
    assert any(size[0] == 1 < size[-1] for size in sizes)  # a token beside a prompt


def test_a_record_that_proves_damaged_in_the_middle_is_nobody_elses(by_layer, monkeypatch):
    engine = Engine(tiny_model(), template=TEMPLATE, method=LegoLink(4))
    asked = requests(engine)
    asked[2] = ([*engine.add([random_ids(40)]), *asked[2][0]], asked[2][1])
    key, found, read = engine.documents.key(asked[2][0][0]), [], Batch.layer
    want = [engine.fuse(*one) for one in asked]

    def damaged(self, index, layer):
        if self.keys[index] == key and layer == 2 and self in (found or [self]):
            with self._reading(index):
                found.append(self)
                raise RecordError("a bit was flipped")
        return read(self, index, layer)

    monkeypatch.setattr(Batch, "layer", damaged)
    by_layer()
    got = engine.fuse_many(asked)
    assert found and got[2].report.hits == {"computed": 1, "cpu": 2}
    got[2].report.hits = want[2].report.hits
    same(got, want)
    assert all(part.past_key_values.before is None for part in got)
