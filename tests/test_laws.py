"""The laws of docs/design.md that concern fusion, on every architecture that is promised."""

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
    RelevantTokens,
    Reuse,
    Selection,
    SensitiveTokens,
)
from ragkv.testing import ARCHITECTURES, as_cache, random_ids, tiny_model

EXACT = 1e-4  # on fp32 logits; the models' noise is 5e-6 at most, and leaving one token out shows as 1e-2 or more
TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], before_chunk=[9], after_chunk=[10, 11], after_question=[12])
EVERYTHING = [
    FullPrefill(),
    LegoLink(k=1000),
    CacheBlend(ratio=1.0),
    CacheBlend(ratio=1.0, signal="key", check_layer=2),
    CacheBlend(gradual=(1.0, 1.0), signal="both"),
    SensitiveTokens(ratio=1.0),
    QuestionAware(ratio=1.0),
    RelevantTokens(ratio=1.0),
]


class Some(Method):
    """Every other token in the first layers, every fourth from layer 2 on: a scattered set that narrows."""

    def select(self, view):
        return Selection(view.layout.reusable[::2], checks=[2])

    def narrow(self, check):
        return check.tokens[::2]


def reference(model, prompt):
    """Logits, keys and values of the model's own prefill of the prompt's ids."""
    with torch.no_grad():
        out = model(input_ids=prompt.input_ids, use_cache=True, **as_cache(_full_cache()))
    return out.logits[:, -1], [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def _full_cache():
    from transformers import DynamicCache

    return DynamicCache()  # without config: every layer keeps all tokens, those with windows too


def worst(prompt, kv):
    layers = zip(prompt.past_key_values.layers, kv, strict=True)
    pairs = [pair for layer, (keys, values) in layers for pair in ((layer.keys, keys), (layer.values, values))]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def read(request):
    """An engine that has read a document and two unrelated passages, and a question."""
    model = tiny_model(request.param)
    attention = model.config._attn_implementation
    engine = Engine(model, template=TEMPLATE)
    assert model.config._attn_implementation == attention  # no trace of the engine's own probing either
    document = engine.add_document([random_ids(n) for n in (13, 1, 22, 30)])
    lone = engine.add([random_ids(17), random_ids(40)])
    return engine, document, lone, random_ids(9)


def test_exact_at_100_percent(read):
    engine, document, lone, question = read
    mixed = [lone[1], document[2], document[0], lone[0], document[2]]
    for method in EVERYTHING:
        if isinstance(method, QuestionAware) and not engine.model._supports_attention_backend:
            with pytest.raises(MethodError, match="not open to view"):
                engine.fuse(mixed, question, method=method)
            continue
        prompt = engine.fuse(mixed, question, method=method)
        logits, kv = reference(engine.model, prompt)
        assert float((prompt.logits - logits).abs().max()) < EXACT, method
        assert worst(prompt, kv) < EXACT, method
    for method in (Reuse(), LegoLink(k=2)):  # the check above can fail: less than everything is not exact here
        prompt = engine.fuse(mixed, question, method=method)
        assert float((prompt.logits - logits).abs().max()) > 50 * EXACT, method


def test_exact_where_it_was_made(read):
    engine, document, lone, question = read
    for chunks in (document, document[:2], lone[:1]):
        for method in (Reuse(), LegoLink(k=4), CacheBlend(ratio=0.2), SensitiveTokens(ratio=0.2)):
            prompt = engine.fuse(chunks, question, method=method)
            logits, kv = reference(engine.model, prompt)
            assert float((prompt.logits - logits).abs().max()) < EXACT, method
            assert worst(prompt, kv) < EXACT, method
            assert prompt.report.budget == 0


def test_causal_at_scattered_positions(read):
    """Over an exact cache, recomputing any scattered tokens, in any layers, changes nothing: each sees just what is before it."""
    engine, document, _, question = read
    prompt = engine.fuse(document, question, method=Some())
    logits, kv = reference(engine.model, prompt)
    assert 0 < prompt.report.budget < 0.5
    assert float((prompt.logits - logits).abs().max()) < EXACT
    assert worst(prompt, kv) < EXACT


def test_moved_keys_are_the_keys_of_their_new_place(read):
    """Layer 0's keys and values depend on the token alone: rotated, they equal those computed there."""
    engine, document, lone, question = read
    prompt = engine.fuse([lone[1], document[3], document[0]], question, method=Reuse())
    _, kv = reference(engine.model, prompt)
    layer = prompt.past_key_values.layers[0]
    assert float((layer.keys - kv[0][0]).abs().max()) < EXACT
    assert float((layer.values - kv[0][1]).abs().max()) < EXACT


def test_same_ids(read):
    engine, document, lone, question = read
    chunks = [lone[0], document[1], lone[0]]
    want = [1, 5, 6, 7, *(i for chunk in chunks for i in chunk.ids), *question, 12]
    for method in (Reuse(), LegoLink(k=2), CacheBlend(), FullPrefill()):
        assert engine.fuse(chunks, question, method=method).input_ids.tolist() == [want]
    assert lone[0].ids[0] == 9 and lone[0].ids[-2:] == (10, 11)


def test_the_suffix_is_fresh(read):
    engine, document, lone, question = read
    for method in (Reuse(), LegoLink(k=2), CacheBlend(ratio=0.1), FullPrefill(), Some()):
        prompt = engine.fuse([document[2], lone[0]], question, method=method)
        total = prompt.input_ids.shape[1]
        assert prompt.recomputed[-10:].tolist() == list(range(total - 10, total))


def test_no_trace(read):
    engine, document, lone, question = read
    model = engine.model
    attention, forward = model.config._attn_implementation, model.forward

    class Boom(RuntimeError):
        pass

    class Failing(Some):
        def narrow(self, check):
            raise Boom

    class Looking(Some):
        def select(self, view):
            view.attention()
            raise Boom

    for attempt in (CacheBlend(), Failing(), SensitiveTokens(), CacheCraft(), QuestionAware(), Looking()):
        try:
            engine.fuse([lone[0], document[2]], question, method=attempt)
        except (Boom, MethodError):
            pass
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert model.config._attn_implementation == attention
        assert model.forward == forward
    prompt = engine.fuse([lone[0], document[2]], question, method=FullPrefill())
    logits, _ = reference(model, prompt)
    assert float((prompt.logits - logits).abs().max()) < EXACT


def test_cache_shows_what_transformers_expects(read):
    engine, document, lone, question = read
    prompt = engine.fuse([document[1], lone[0]], question, room_tokens=32)
    cache, total = prompt.past_key_values, prompt.input_ids.shape[1]
    assert cache.get_seq_length() == total
    for layer in cache.layers:
        assert layer.keys.shape[0] == 1 and layer.keys.shape[2] == layer.values.shape[2] == total
    assert prompt.logits.shape == (1, engine.decoder.vocab_size)
