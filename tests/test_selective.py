"""Fusion with selective attention in the place of masks: the same prompts, on every architecture that allows it."""

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, SensitiveTokens, UnsupportedModelError
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10])
# They call sdpa or eager themselves, past transformers' attention interface.
CLOSED = ("falcon", "stablelm")


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


def test_a_model_that_does_more_than_it_says_gets_masks(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr("ragkv.model.implementation", lambda *_: "triton")  # as on a GPU

    def wrong(self, *args, **kwargs):
        return torch.zeros(1, args[1].shape[2], args[1].shape[1], args[3].shape[3]), None

    monkeypatch.setattr("ragkv.kernel_attention.KernelAttention.__call__", wrong)
    engine = Engine(model, template=TEMPLATE)
    assert engine.decoder.spans is None
    prompt = engine.fuse(engine.add([random_ids(9), random_ids(12)]), random_ids(4), method=LegoLink(2))
    assert prompt.report.attention == "sdpa"


def test_kernels_are_asked_for_by_name():
    with pytest.raises(ValueError, match="impl must be one of auto, reference, triton"):
        Engine(tiny_model(), template=TEMPLATE, kernels="fast")
