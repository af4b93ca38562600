"""A position is not a slot: chunks may stand apart or share positions, and a cache may hold more slots than tokens."""

from time import perf_counter

import pytest
import torch
from transformers import DynamicCache

from ragkv import CacheBlend, Engine, FullPrefill, LegoLink, Method, PromptError, PromptTemplate, Reuse, Selection
from ragkv.fuse import fuse
from ragkv.fusion.layout import lay_out
from ragkv.fusion.narrowing import Narrowing
from ragkv.fusion.passes import Pass
from ragkv.fusion.plan import plan
from ragkv.fusion.view import View
from ragkv.testing import as_cache, random_ids, tiny_model

EXACT = 1e-4
TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10])
QUESTION = random_ids(6)
# Full attention, windows, both by turns, layers without rope, interleaved and partial rotation, attention in chunks, sinks.
MODELS = ("llama", "starcoder2", "gemma3_text", "smollm3", "cohere2", "glm", "llama4_text", "gpt_oss", "falcon")
# Two gaps; two chunks at the same positions; the second in front of the first.
STARTS = {"apart": (9, 40, 90), "shared": (4, 4, 30), "crossed": (40, 8, 70)}


@pytest.fixture(scope="module", params=MODELS)
def engine(request):
    return Engine(tiny_model(request.param), template=TEMPLATE, piece_tokens=16)


def laid_out(engine, starts):
    chunks = engine.add([random_ids(n) for n in (20, 17, 25)])
    encoder = engine.encoder
    return lay_out(encoder.prefix, encoder.anchor, chunks, QUESTION, engine.decoder.device, starts)


def own_mask(config, positions, kind):
    """By the definition: causal, and within a window or an attention chunk."""
    query, key = positions[:, None], positions[None, :]
    seen = key <= query
    if kind == "sliding_attention":
        seen = seen & (query - key < config.sliding_window)
    if kind == "chunked_attention":
        seen = seen & (query // config.attention_chunk_size == key // config.attention_chunk_size)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return (seen if config._attn_implementation == "sdpa" else mask)[None, None]


def reference(model, layout):
    """Logits and KV of the model's own forward at the same positions."""
    config, at = model.config, layout.positions
    kinds = getattr(config, "layer_types", None)
    only = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    mask = {kind: own_mask(config, at, kind) for kind in set(kinds)} if kinds else own_mask(config, at, only)
    with torch.no_grad():
        out = model(input_ids=layout.ids[None], position_ids=at[None], attention_mask=mask, **as_cache(DynamicCache()))
    return out.logits[:, -1], out.past_key_values.layers


class Half(Method):
    """Everything up to layer 2, every second token from there on."""

    def select(self, view):
        return Selection(view.layout.reusable, checks=[2])

    def narrow(self, check):
        return check.tokens[::2]


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_recomputed_at_100_percent_it_is_the_models_own_forward(engine, starts):
    layout = laid_out(engine, starts)
    want, layers = reference(engine.model, layout)
    for method in (FullPrefill(), LegoLink(1000), CacheBlend(1.0, check_layer=1)):
        prompt = fuse(engine.documents, layout, method, 0, perf_counter())
        assert float((prompt.logits - want).abs().max()) < EXACT, method
        for held, true in zip(prompt.past_key_values.layers, layers, strict=True):
            torch.testing.assert_close(held.keys, true.keys, atol=EXACT, rtol=0)
            torch.testing.assert_close(held.values, true.values, atol=EXACT, rtol=0)
    even = fuse(engine.documents, laid_out(engine, None), FullPrefill(), 0, perf_counter())
    assert float((even.logits - want).abs().max()) > 50 * EXACT


def test_stored_keys_turn_to_positions(engine):
    """Layer 0 depends on the token and its position alone, so that what is placed there equals what is computed there."""
    for starts in STARTS.values():
        layout = laid_out(engine, starts)
        _, layers = reference(engine.model, layout)
        placed = fuse(engine.documents, layout, Reuse(), 0, perf_counter()).past_key_values.layers[0]
        torch.testing.assert_close(placed.keys, layers[0].keys, atol=EXACT, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "starcoder2", "gemma3_text", "llama4_text"])
@pytest.mark.parametrize(
    ("kernels", "starts"),  # spans are for positions that run with the slots
    [("auto", None), ("reference", None), ("auto", STARTS["apart"]), ("auto", STARTS["shared"])],
    ids=["even", "even-spans", "apart", "shared"],
)
def test_what_lies_behind_the_prompt_in_the_cache_is_never_seen(architecture, kernels, starts):
    """With masks and with spans, by every way through a pass."""
    engine = Engine(tiny_model(architecture), template=TEMPLATE, piece_tokens=16, kernels=kernels)
    layout, decoder = laid_out(engine, starts), engine.decoder
    for method in (FullPrefill(), LegoLink(3), Half()):
        prompt = fuse(engine.documents, layout, method, 0, perf_counter())
        cache = decoder.cache(layout.tokens + 40)
        for layer, held in zip(cache.layers, prompt.past_key_values.layers, strict=True):
            layer.key_room.fill_(torch.nan)
            layer.value_room.fill_(torch.nan)
            layer.key_room[:, :, : layout.tokens], layer.value_room[:, :, : layout.tokens] = held.keys, held.values
        work = plan(Selection.of(method.select(View(layout, 4)), method), layout, 4)
        kind = Narrowing if work.checks else Pass
        logits = kind(decoder, cache, layout, work, 16).logits()
        torch.testing.assert_close(logits, prompt.logits, atol=EXACT, rtol=0)


def test_what_stands_elsewhere_is_not_exact():
    engine = Engine(tiny_model(), template=TEMPLATE)
    document = engine.add_document([random_ids(n) for n in (9, 12)])
    encoder = engine.encoder

    def exact(starts):
        layout = lay_out(encoder.prefix, encoder.anchor, document, QUESTION, engine.decoder.device, starts)
        return [placed.exact for placed in layout.chunks]

    assert exact(None) == exact((4, 14)) == [True, True]
    assert exact((4, 15)) == [True, False]
    assert exact((5, 14)) == [False, False]  # behind what stands elsewhere
    assert exact((4, 13)) == exact((4, 4)) == [False, False]  # the second is in sight of the first one's end


@pytest.mark.parametrize("starts", [(4,), (4, 3), (4, 14, 30)])
def test_starts_that_cannot_be(starts):
    engine = Engine(tiny_model(), template=TEMPLATE)
    chunks = engine.add([random_ids(9), random_ids(12)])
    with pytest.raises(PromptError, match="one position, 4"):
        lay_out(engine.encoder.prefix, (), chunks, QUESTION, engine.decoder.device, starts)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_piece_is_not_shown_what_nobody_wrote(kernels, unwritten):
    """Memory that was never written may hold anything: here not a number."""
    engine = Engine(tiny_model(), template=TEMPLATE, piece_tokens=8, kernels=kernels)
    unwritten(engine)
    layouts = [laid_out(engine, starts) for starts in (None, *(STARTS.values() if kernels == "auto" else ()))]
    for layout in layouts:
        for method in (LegoLink(6), FullPrefill(), Half()):
            assert fuse(engine.documents, layout, method, 0, perf_counter()).logits.isfinite().all()
    old = engine.add_document([random_ids(n) for n in (20, 17, 25)])
    assert engine.repair_document(old, [random_ids(20), random_ids(30, seed=1), random_ids(25)])
    made = engine.fuse(engine.add([random_ids(7)]), QUESTION, method=Reuse())
    assert made.logits.isfinite().all()
