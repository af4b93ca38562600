"""Selective attention inside models: exact with every kind of rule, found out by trying, and gone afterwards."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ragkv.errors import UnsupportedModelError
from ragkv.model import kernel_attention as adapter
from ragkv.model.decoder import Decoder
from ragkv.model.kernel_attention import KernelAttention, SpanBuilder, SpanRule, kernel_attention, serves, span_rules
from ragkv.model.masks import for_model, layer_rules
from ragkv.testing import random_ids, tiny_model

RULES = {
    "llama": {SpanRule()},
    "starcoder2": {SpanRule(window=16)},
    "gemma2": {SpanRule(), SpanRule(window=16)},  # soft caps
    "gpt_oss": {SpanRule(), SpanRule(window=16)},  # sinks
    "llama4_text": {SpanRule(), SpanRule(chunk=32)},
}


def scattered(decoder, rules, ids, rows):
    """Logits of a pass over ``rows`` above an exact cache, in which what these rows wrote was destroyed."""
    everywhere, kept = torch.arange(len(ids)), []
    cache = decoder.cache(len(ids))
    want = decoder.step(ids, everywhere, cache)
    for layer in cache.layers:
        layer.key_room[:, :, rows] = layer.value_room[:, :, rows] = torch.nan

    def write(layer, keys, values):
        held = cache.layers[layer]
        held.key_room[:, :, rows], held.value_room[:, :, rows] = keys, values
        kept.append(layer)
        return held.key_room, held.value_room

    cache.set_length(0)
    cache.writer = write
    with kernel_attention(decoder.config, decoder.device, decoder.dtype) as ran:
        got = decoder.step(ids[rows], rows, cache, for_model(SpanBuilder(rules, rows, len(ids)), decoder.config))
    assert ran == "selective (reference)" and len(kept) == len(decoder.layers)
    return got, want


@pytest.mark.parametrize("architecture", RULES)
def test_scattered_rows_are_exact(architecture):
    model = tiny_model(architecture)
    decoder, ids = Decoder(model), torch.tensor(random_ids(90))
    loaded = model.config._attn_implementation
    rules = span_rules(decoder.rules)
    assert rules is not None and set(rules) == RULES[architecture] and serves(model, decoder.config)
    rows = torch.cat([torch.arange(1, 80, 3), torch.arange(80, 90)])
    got, want = scattered(decoder, rules, ids, rows)
    assert float((got - want).abs().max()) < 1e-4
    narrower = [SpanRule(window=rule.window - 1 if rule.window else 16) for rule in rules]
    wrong, _ = scattered(decoder, narrower, ids, rows)
    assert float((wrong - want).abs().max()) > 1e-3  # the check above can fail
    assert model.config._attn_implementation == loaded


def test_the_model_may_make_its_own_masks():
    """Without ready-made spans transformers asks for a mask by name: it gets spans, or none where plain causal is meant."""
    for architecture in ("llama", "starcoder2"):
        model, ids = tiny_model(architecture), torch.tensor([random_ids(60)])
        with torch.no_grad():
            want = model(ids).logits
            with kernel_attention(model.config, model.device, model.dtype):
                got = model(ids).logits
        assert float((got - want).abs().max()) < 1e-4


def test_no_trace():
    model = tiny_model()
    before = set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    with pytest.raises(RuntimeError, match="on purpose"), kernel_attention(model.config, model.device, model.dtype):
        assert model.config._attn_implementation not in before[0]
        raise RuntimeError("on purpose")
    assert (set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)) == before
    assert model.config._attn_implementation == "sdpa"


def test_rules_of_large_windows_and_others():
    config = tiny_model("starcoder2", sliding_window=4096).config
    assert span_rules(layer_rules(config, 4, torch.device("cpu"))) == [SpanRule(window=4096)] * 4
    config = tiny_model("llama4_text", attention_chunk_size=8192).config
    found = span_rules(layer_rules(config, 4, torch.device("cpu")))
    assert found is not None and set(found) == {SpanRule(), SpanRule(chunk=8192)}
    assert span_rules([lambda b, h, q, k: (k <= q) & (k % 7 != 3)]) is None  # no run of keys
    assert span_rules([lambda b, h, q, k: (k <= q) | (q < 3)]) is None


def test_models_that_hide_their_attention_are_not_served():
    model = tiny_model("falcon")
    assert not serves(model, model.config)


@pytest.mark.parametrize("architecture", ["llama", "starcoder2", "gemma2", "gpt_oss"])
def test_a_layers_window_is_handed_on(architecture, monkeypatch):
    """By it the kernel shares out its work."""
    windows, plain = [], adapter.selective_attention
    handed = lambda *given, window, **more: (windows.append(window), plain(*given, window=window, **more))[1]  # noqa: E731
    monkeypatch.setattr(adapter, "selective_attention", handed)
    decoder = Decoder(tiny_model(architecture))
    rules = span_rules(decoder.rules)
    scattered(decoder, rules, torch.tensor(random_ids(40)), torch.arange(0, 40, 2))
    assert windows == [rule.window for rule in rules]


def test_what_it_does_not_know_is_refused():
    module, attend = torch.nn.Identity(), KernelAttention("reference")
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 5, 16)
    with pytest.raises(UnsupportedModelError, match="spans"):
        attend(module, query, key, key, torch.zeros(1, 1, 3, 5))
    spans = SpanRule().spans(torch.tensor([0, 2, 4]))
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        attend(module, query, key, key, spans, position_bias=query)
    out, weights = attend(module, query, key, key, spans)
    assert out.shape == (1, 3, 2, 16) and weights is None
