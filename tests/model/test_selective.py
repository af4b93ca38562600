"""Fusion with selective attention in the place of masks: the same prompts, on every architecture that allows it."""

import pytest
import torch

from ragkv import (
    CacheBlend,
    Engine,
    LegoLink,
    Method,
    MethodError,
    PromptTemplate,
    QuestionAware,
    SensitiveTokens,
    UnsupportedModelError,
)
from ragkv.fusion.looking import Looking
from ragkv.kernels import KernelError
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10])
# They call sdpa or eager themselves, past transformers' attention interface.
CLOSED = ("falcon", "gptj", "stablelm")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spans_give_what_masks_give(architecture):
    model = tiny_model(architecture)
    if architecture in CLOSED:
        with pytest.raises(UnsupportedModelError, match="kernels='reference' was asked for"):
            Engine(model, template=TEMPLATE, kernels="reference")
        return
    question, passages = random_ids(6), [random_ids(n) for n in (30, 17, 41)]
    masks, spans = (Engine(model, template=TEMPLATE, kernels=kernels) for kernels in ("auto", "reference"))
    loaded = model.config._attn_implementation
    for method in (LegoLink(3), CacheBlend(0.3), SensitiveTokens(0.2)):
        want, got = (e.fuse(e.add(passages)[::-1], question, method=method) for e in (masks, spans))
        assert got.report.attention == "selective (reference)" != want.report.attention
        assert torch.equal(got.recomputed, want.recomputed)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        for a, b in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation == loaded


class Looks(Method):
    """Sees what the question looks at, and computes nothing."""

    def __init__(self, queries):
        self.queries = queries

    def select(self, view):
        self.seen = view.attention(self.queries)
        return view.layout.reusable[:0]


def look(engine, chunks, queries="all"):
    looks = Looks(queries)
    looks.looked = engine.fuse(chunks, random_ids(6), method=looks).report.looked
    return looks


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in CLOSED])
def test_the_question_looks_at_what_eager_attention_shows(architecture, monkeypatch):
    model = tiny_model(architecture)
    engine = Engine(model, template=TEMPLATE)
    chunks = engine.add([random_ids(n) for n in (30, 17, 41)])[::-1]
    loaded = model.config._attn_implementation
    got = [look(engine, chunks, queries) for queries in ("last", "both")]
    assert model.config._attn_implementation == loaded
    monkeypatch.setattr(Looking, "_rules", lambda self: None)
    for scored, queries in zip(got, ("last", "both"), strict=True):
        eager = look(engine, chunks, queries)
        assert (scored.looked, eager.looked) == ("scored (reference)", "eager")
        assert eager.seen.shape == (len(engine.decoder.layers), 91) and eager.seen.sum() > 0.5
        torch.testing.assert_close(scored.seen, eager.seen, atol=1e-6, rtol=1e-4)


def test_only_auto_looks_another_way(monkeypatch):
    """What the kernels refuse is eager attention's for "auto", and an error where they were asked for by name."""

    def refuse(*args, **kwargs):
        raise KernelError("on purpose")

    passages = [random_ids(n) for n in (12, 9)]
    auto, named = (Engine(tiny_model(), template=TEMPLATE, kernels=kernels) for kernels in ("auto", "reference"))
    want = look(auto, auto.add(passages)).seen
    monkeypatch.setattr("ragkv.model.kernel_attention.scored_attention", refuse)
    got = look(auto, auto.add(passages))
    assert got.looked == "eager"
    torch.testing.assert_close(got.seen, want, atol=1e-6, rtol=1e-4)
    with pytest.raises(KernelError, match="on purpose"):
        look(named, named.add(passages))


def test_a_closed_model_has_no_look():
    engine = Engine(tiny_model("falcon"), template=TEMPLATE)
    with pytest.raises(MethodError, match="not open to view"):
        engine.fuse(engine.add([random_ids(9), random_ids(8)]), random_ids(4), method=QuestionAware())


def test_a_model_that_does_more_than_it_says_gets_masks(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("ragkv.model.decoder.implementation", lambda *_: "triton")  # as on a GPU

    def wrong(self, *args, **kwargs):
        return torch.zeros(1, args[1].shape[2], args[1].shape[1], args[3].shape[3]), None

    monkeypatch.setattr("ragkv.model.kernel_attention.KernelAttention.__call__", wrong)
    engine = Engine(model, template=TEMPLATE)
    assert engine.decoder.spans is None
    monkeypatch.setattr("ragkv.fusion.looking.implementation", lambda *_: "triton")
    assert look(engine, engine.add([random_ids(9), random_ids(12)])).looked == "eager"
    prompt = engine.fuse(engine.add([random_ids(9), random_ids(12)]), random_ids(4), method=LegoLink(2))
    assert prompt.report.attention == "sdpa"


def test_kernels_are_asked_for_by_name():
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton"):
        Engine(tiny_model(), template=TEMPLATE, kernels="fast")
