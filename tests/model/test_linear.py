"""Linear layers of a few rows: the same numbers in another order, where that is faster, and the model stays as it is."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import linear

from ragkv import Engine, LegoLink, PromptTemplate
from ragkv.model import linear as module
from ragkv.model.decoder import Decoder
from ragkv.testing import random_ids, tiny_model


@pytest.fixture
def ran(monkeypatch):
    """Rows of each linear layer that was computed the other way round, where that always pays."""
    rows, turned = [], module.turned
    monkeypatch.setattr(module, "_SMALL", 0)
    monkeypatch.setattr(module, "pays", lambda threads: True)
    monkeypatch.setattr(
        module, "turned", lambda given, *rest: (rows.append(given[..., 0].numel()), turned(given, *rest))[1]
    )
    return rows


@pytest.mark.parametrize("shape", [(2, 7), (3, 5, 7), (1, 40, 7)])
@pytest.mark.parametrize("bias", [None, torch.randn(6)])
def test_turned_is_linear(shape, bias):
    given, weight = torch.randn(shape), torch.randn(6, 7)
    got = module.turned(given, weight, bias)
    torch.testing.assert_close(got, linear(given, weight, bias))
    assert got.is_contiguous()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox", "gemma3_text"])
def test_a_prompt_and_its_answer_are_the_same(ran, monkeypatch, architecture):
    engine = Engine(tiny_model(architecture), template=PromptTemplate(prefix=[1, 5]), method=LegoLink(4))
    chunks, question = engine.add([random_ids(30), random_ids(40)]), random_ids(7)
    ran.clear()
    prompt = engine.fuse(chunks[::-1], question)
    assert max(ran) == 4 + 7  # the second chunk's, and the question
    ids = engine.generate(chunks, question, max_new_tokens=6, prompt_lookup_num_tokens=3).token_ids
    monkeypatch.setattr(module, "pays", lambda threads: False)
    ran.clear()
    torch.testing.assert_close(prompt.logits, engine.fuse(chunks[::-1], question).logits, atol=1e-4, rtol=1e-4)
    assert engine.generate(chunks, question, max_new_tokens=6, prompt_lookup_num_tokens=3).token_ids == ids
    assert not ran


def test_only_few_rows_of_plain_fp32_weights(ran):
    def computed(rows, dtype=torch.float32, weight_of=lambda weight: weight):
        ran.clear()
        with module.few_rows(rows, torch.device("cpu"), dtype):
            linear(torch.randn(rows, 7, dtype=dtype), weight_of(torch.randn(6, 7, dtype=dtype)))
        return bool(ran)

    assert computed(2) and computed(128)
    assert not any([computed(1), computed(129), computed(2, torch.bfloat16)])
    assert not computed(2, weight_of=lambda weight: torch.randn(7, 6).t())
    with module.few_rows(2, torch.device("cpu"), torch.float32):
        linear(torch.randn(300, 7), torch.randn(6, 7))
    assert not ran
    linear(torch.randn(2, 7), torch.randn(6, 7))
    assert not ran  # and nothing is left behind the block


def test_models_of_small_weights_are_not_watched(monkeypatch):
    """It costs every operation some microseconds, and they have nothing to win."""
    monkeypatch.setattr(module, "pays", lambda threads: True)
    small = Decoder(tiny_model())
    assert not small.wide and isinstance(small.few_rows(8), nullcontext)
    assert not Decoder(tiny_model(vocab_size=8192)).wide, "few rows get logits"
    for architecture, sizes in (
        ("llama", {"intermediate_size": 4096}),
        ("mixtral", {"hidden_size": 512, "intermediate_size": 512}),
    ):
        large = Decoder(tiny_model(architecture, num_hidden_layers=1, **sizes))
        assert large.wide and not isinstance(large.few_rows(8), nullcontext)


def test_it_is_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(module, "turned", lambda given, weight: tried.append(1))
    module.pays.cache_clear()
    monkeypatch.setattr(module, "_TRIED", 8)
    assert module.pays(1) in (True, False) and tried
    tried.clear()
    module.pays(1)
    assert not tried
    module.pays.cache_clear()


def test_nothing_is_drawn_from_anybodys_generator(monkeypatch):
    """A seeded answer is the same whether an engine was made before or not."""
    monkeypatch.setattr(module, "_SMALL", 0)
    module.pays.cache_clear()
    before = torch.get_rng_state()
    engine = Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5]))
    engine.fuse(engine.add([random_ids(20), random_ids(9)]), random_ids(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert module.pays.cache_info().misses == 1
