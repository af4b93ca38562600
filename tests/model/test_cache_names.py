"""A model takes its cache by the name that its code gives it: ``cache`` since transformers 5.24, ``past_key_values`` before."""

import warnings

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from ragkv import CacheBlend, Engine, PromptTemplate
from ragkv.model.cache import cache_argument
from ragkv.model.packing import packs
from ragkv.testing import random_ids, tiny_model

TEMPLATE, PASSAGES, QUESTION = PromptTemplate(prefix=[1, 5]), [random_ids(20), random_ids(30)], random_ids(5)
OURS = cache_argument(create_causal_mask)


def old(model, input_ids=None, past_key_values=None, **more):
    return given(model, input_ids, past_key_values, more)


def new(model, input_ids=None, cache=None, **more):
    return given(model, input_ids, cache, more)


def given(model, input_ids, cache, more):
    return type(model).__base__.forward(
        model, input_ids=input_ids, **({OURS: cache} if cache is not None else {}), **more
    )


def test_the_name_is_read_off_what_is_called():
    assert cache_argument(old) == "past_key_values" and cache_argument(new) == "cache"
    assert cache_argument(lambda *args, **kwargs: None) == OURS, "what hands all on takes what transformers takes"


@pytest.mark.parametrize("forward", [old, new])
def test_models_of_either_name(forward):
    """As those that bring code of their own, written for transformers before or behind the one that is installed."""
    model = tiny_model()
    want = answers(model)
    for module in (model, model.model):
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    for got, first in zip(answers(model), want, strict=True):
        torch.testing.assert_close(got, first, atol=1e-4, rtol=1e-4)


def test_nothing_that_is_deprecated_is_called():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(cache|past_key_values).*deprecated")
        answers(tiny_model("gemma3_text"))


def answers(model):
    """Logits of a prompt, and ids of an answer and of beams; rows of several prompts go through one forward, too."""
    with Engine(model, template=TEMPLATE) as engine:
        assert packs(engine.decoder)
        chunks = engine.add(PASSAGES)
        logits = engine.fuse(chunks[::-1], QUESTION, method=CacheBlend(0.3)).logits
        asked = [engine.generate(chunks, QUESTION, max_new_tokens=4, eos_token_id=None, num_beams=n) for n in (1, 2)]
        return [logits, *(torch.tensor(answer.token_ids) for answer in asked)]
