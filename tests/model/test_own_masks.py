"""Models whose layers work on the masks that they are given: Doge hides more keys, and adds to the scores, head by head."""

import pytest
import torch

from ragkv import (
    CacheBlend,
    CacheCraft,
    Engine,
    FullPrefill,
    LegoLink,
    PromptTemplate,
    QuestionAware,
    RelevantTokens,
    UnsupportedModelError,
)
from ragkv.model.decoder import Decoder
from ragkv.model.packing import packs
from ragkv.model.traits import Traits
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5])


def doge(attention="sdpa", **settings):
    model = tiny_model("doge", attn_implementation=attention, **settings)
    for layer in model.model.layers:  # zeros when it is made: of no effect
        torch.nn.init.normal_(layer.self_attn.A, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(params=["sdpa", "eager"])
def engine(request):
    return Engine(doge(request.param), template=TEMPLATE)


@pytest.mark.parametrize("method", [FullPrefill(), LegoLink(k=1000), CacheBlend(ratio=1.0)], ids=str)
def test_everything_recomputed_is_exact(engine, method):
    chunks = engine.add([random_ids(30), random_ids(40)])[::-1]
    for question in (
        random_ids(1),
        random_ids(7),
        random_ids(20),
    ):  # one row, few and more than are put beside each other
        prompt = engine.fuse(chunks, question, method=method)
        with torch.no_grad():
            want = engine.model(input_ids=prompt.input_ids).logits[:, -1]
        torch.testing.assert_close(prompt.logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "method", [LegoLink(2), CacheBlend(0.3), QuestionAware(0.3), RelevantTokens(0.3), CacheCraft()], ids=str
)
def test_sdpa_gives_what_eager_attention_gives(method):
    prompts = []
    for attention in ("sdpa", "eager"):
        engine = Engine(doge(attention), template=TEMPLATE)
        prompts.append(engine.fuse(engine.add([random_ids(30), random_ids(40)])[::-1], random_ids(7), method=method))
    torch.testing.assert_close(*[prompt.logits for prompt in prompts], atol=1e-4, rtol=0)


def test_the_question_looks_through_eager_attention(engine):
    chunks = engine.add([random_ids(30), random_ids(40)])[::-1]
    report = engine.fuse(chunks, random_ids(7), method=QuestionAware(0.3)).report
    assert report.looked == "eager"


def test_nothing_takes_the_place_of_its_masks():
    model = doge()
    decoder = Decoder(model)
    assert not decoder.hands_on and not packs(decoder)
    assert not Traits.from_bytes(decoder.traits.to_bytes(model), model).hands_on
    with pytest.raises(UnsupportedModelError, match="changes the masks that it is given"):
        Engine(model, kernels="reference")


def test_as_on_a_gpu_masks_serve(monkeypatch):
    monkeypatch.setattr("ragkv.model.decoder.implementation", lambda *_: "triton")
    assert Decoder(doge()).spans is None and Decoder(tiny_model()).spans is not None


def test_its_positions_end_where_it_chooses_keys():
    assert Decoder(doge(keep_window_size=100)).max_positions == 100
    assert Decoder(doge(keep_window_size=100_000)).max_positions == 2048


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss"])
def test_other_models_hand_their_masks_on(architecture):
    assert Decoder(tiny_model(architecture)).hands_on
