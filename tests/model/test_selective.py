"""Fusion with selective attention in the place of masks: the same prompts, on every architecture that allows it."""

from contextlib import nullcontext

import pytest
import torch

from ragkv import (
    CacheBlend,
    CacheCraft,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    MethodError,
    PromptTemplate,
    QuestionAware,
    Reuse,
    SensitiveTokens,
    UnsupportedModelError,
)
from ragkv.fusion.looking import Looking
from ragkv.kernels import KernelError
from ragkv.model.decoder import Decoder
from ragkv.model.rows import Rows
from ragkv.model.syncs import no_syncs
from ragkv.testing import ARCHITECTURES, random_ids, shows_attention, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10])
# They call sdpa or eager themselves, past transformers' attention interface.
CLOSED = [name for name in ARCHITECTURES if not shows_attention(name)]


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


@pytest.fixture
def masked(monkeypatch):
    """Shapes of the masks ``[S, N]`` of rows behind others, as attention is given them."""
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*args, attn_mask=None, **more):
        if attn_mask is not None and attn_mask.shape[-1] > attn_mask.shape[-2]:
            seen.append(attn_mask.shape)
        return plain(*args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr("ragkv.model.kernel_attention._spans_of_model", lambda **_: pytest.fail("made by the model"))
    return seen


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gemma2", "gpt_oss", "llama4_text"])
def test_rows_behind_others_see_by_spans(architecture, masked):
    """No mask of rows and keys is made, and no keys and values are copied for it: of a document behind an anchor, of later pieces,
    of the last rows of a prompt; and nothing is waited for.
    """
    model = tiny_model(architecture)
    own, spans = (Decoder(model, kernels) for kernels in ("auto", "reference"))
    ids, caches = torch.tensor(random_ids(70)), []
    masked.clear()
    for decoder, wait in ((own, nullcontext()), (spans, no_syncs(torch.device("cpu")))):
        caches.append(cache := decoder.cache(80))
        with wait:
            hidden = [decoder.read(ids[a:b], cache, a) for a, b in ((0, 30), (30, 50), (50, 51))]
            rows = [Rows(ids[a:b], torch.arange(a, b), cache, wanted=1) for a, b in ((51, 69), (69, 70))]
            hidden += [decoder.forward(one) for one in rows]
        caches.append(hidden)
        if decoder is own:
            assert masked or architecture in ("gemma2", "gpt_oss")  # loaded with eager attention
            masked.clear()
    assert not masked
    assert rows[0].attention == "selective (reference)"
    for a, b in zip(caches[1], caches[3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    for a, b in zip(caches[0].layers, caches[2].layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [Reuse(), FullPrefill(), CacheBlend(0.3), CacheCraft()], ids=repr)
def test_no_prompt_makes_masks(method, masked):
    """Documents are read, and methods that measure read them, behind an anchor and in pieces; and 300 rows end the prompt."""
    own, spans = (
        Engine(tiny_model(), template=TEMPLATE, kernels=kernels, piece_tokens=40, method=method)
        for kernels in ("auto", "reference")
    )
    masked.clear()
    passages, question = [random_ids(n) for n in (60, 17, 41)], random_ids(300)
    got = spans.fuse(spans.add(passages)[::-1], question)
    assert not masked
    want = own.fuse(own.add(passages)[::-1], question)
    assert masked
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(got.recomputed, want.recomputed)


def test_a_prompt_alone_is_the_models_own():
    """Nothing in front: causal attention needs no mask, and has kernels of its own; a window that all fits into is none."""
    for architecture, tokens in (("llama", 70), ("mistral", 8)):
        decoder = Decoder(tiny_model(architecture), "reference")
        ids, cache = torch.tensor(random_ids(tokens)), decoder.cache(tokens)
        rows = Rows(ids, torch.arange(tokens), cache)
        decoder.forward(rows)
        assert rows.attention == "sdpa"


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
