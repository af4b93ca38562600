"""Grouped attention against transformers' own, and that it runs where it should and is gone afterwards."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ragkv import Engine, LegoLink, PromptTemplate
from ragkv.model import attention
from ragkv.testing import random_ids, tiny_model


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (14, 7), (6, 6)])
@pytest.mark.parametrize("queries", [1, 5])
def test_grouped_is_transformers_own(heads, groups, queries):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, queries, 16, generator=generator)
    key, value = torch.randn(2, 1, heads // groups, 33, 16, generator=generator).unbind(0)
    mask = torch.rand(1, 1, queries, 33, generator=generator) > 0.3
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    got, none = attention.grouped_sdpa(module, query, key, value, additive, scaling=0.3)
    want, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    assert none is None and got.shape == want.shape == (1, queries, heads, 16)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 5, 20])
def test_grouped_takes_a_mask_for_each_head(queries):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 16, generator=generator)
    key, value = torch.randn(2, 2, 3, 33, 16, generator=generator).unbind(0)
    mask = torch.randn(2, 6, queries, 33, generator=generator)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    got, _ = attention.grouped_sdpa(module, query, key, value, mask)
    want, _ = sdpa_attention_forward(module, query, key, value, mask)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "used"), [("llama", True), ("falcon", False)])
def test_it_runs_for_the_pass_only(architecture, used, monkeypatch):
    model = tiny_model(architecture)
    engine = Engine(model, template=PromptTemplate(prefix=[1]))
    chunks = engine.add([random_ids(20), random_ids(30)])
    calls = []
    grouped = attention.grouped_sdpa
    monkeypatch.setattr(attention, "grouped_sdpa", lambda *a, **k: (calls.append(1), grouped(*a, **k))[1])
    engine.fuse(chunks, random_ids(4), method=LegoLink(k=4))
    assert bool(calls) == used
    assert model.config._attn_implementation == "sdpa"
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
