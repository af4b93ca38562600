"""Fixed shapes as CUDA graphs: what is replayed is what runs as it is, to the last bit, and what runs without."""

import pytest
import torch

from ragkv import CacheBlend, Engine, LegoLink, PromptTemplate, RelevantTokens, Reuse
from ragkv.testing import ARCHITECTURES, random_ids, shows_attention, tiny_model

CLOSED = [name for name in ARCHITECTURES if not shows_attention(name)]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4_text")  # their experts may wait for the device
TEMPLATE, QUESTION = PromptTemplate(prefix=[1, 5, 6, 7], after_chunk=[10]), random_ids(6)
PASSAGES = [random_ids(n) for n in (30, 17, 41)]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in CLOSED])
def test_graphs_change_nothing(device, architecture):
    model = tiny_model(architecture).to(device)
    plain, graphs = (
        Engine(model, template=TEMPLATE, kernels="triton", graphs=wanted, piece_tokens=16) for wanted in (False, None)
    )
    for method in (LegoLink(3), CacheBlend(0.3), Reuse(), RelevantTokens(0.2)):
        want = plain.fuse(plain.add(PASSAGES)[::-1], QUESTION, method=method)
        runs = [graphs.fuse(graphs.add(PASSAGES)[::-1], QUESTION, method=method) for _ in range(4)]
        ran = [got.report.ran for got in runs]
        assert ran[-1] == "graph" or (architecture in MIXTURES and ran[-1].startswith("eager: ")), ran
        for got in runs:
            torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
            if ran[-1] == "graph":  # as they are, captured and replayed
                assert torch.equal(got.logits, runs[0].logits), ran
            for layer, other in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
                torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)
    for options in ({}, {"prompt_lookup_num_tokens": 3}):
        options |= {"max_new_tokens": 12, "eos_token_id": None}
        want, got, again = (
            each.generate(each.add(PASSAGES)[::-1], QUESTION, **options) for each in (plain, graphs, graphs)
        )
        assert got.token_ids == again.token_ids == want.token_ids
        assert again.report.ran == "graph" or architecture in MIXTURES, again.report.ran
    assert model.config._attn_implementation == plain.decoder.attention


def test_a_model_that_waits_runs_as_before(device, monkeypatch):
    """Also where the wait shows only while a graph is captured, behind which random numbers and streams are as they were."""
    model = tiny_model().to(device)
    engine = Engine(model, template=TEMPLATE, kernels="triton")
    chunks, layer = engine.add(PASSAGES), model.model.layers[1].mlp
    want = engine.generate(chunks, QUESTION, max_new_tokens=4, eos_token_id=None)
    engine.documents.steps.graphs._marked = None
    forward = layer.forward

    def waiting(hidden):
        if torch.cuda.is_current_stream_capturing():
            hidden.sum().item()
        return forward(hidden)

    monkeypatch.setattr(layer, "forward", waiting)
    for _ in range(3):
        got = engine.generate(chunks, QUESTION, max_new_tokens=4, eos_token_id=None)
    assert got.report.ran.startswith("eager: its graph could not be captured") and got.token_ids == want.token_ids
    engine.generate(chunks, QUESTION, max_new_tokens=4, eos_token_id=None, do_sample=True)
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def test_graphs_come_again_where_all_had_gone(device):
    """Behind other weights, and a prompt that fits no room there was."""
    model = tiny_model().to(device)
    engine = Engine(model, template=TEMPLATE, kernels="triton")
    longer = [*PASSAGES, random_ids(300)]
    for passages in (PASSAGES, PASSAGES, longer, longer, PASSAGES):
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        ran = [engine.fuse(engine.add(passages), QUESTION, method=LegoLink(3)).report.ran for _ in range(4)]
        assert ran[-1] == "graph", ran


def test_what_was_run_too_much_is_dropped(device):
    """The step behind an end token was launched before the token was read."""
    model = tiny_model().to(device)
    plain, graphs = (Engine(model, template=TEMPLATE, kernels="triton", graphs=wanted) for wanted in (False, None))
    asked = {"max_new_tokens": 12, "keep_past": True}
    ids = plain.generate(plain.add(PASSAGES), QUESTION, eos_token_id=None, **asked).token_ids
    found = [each.generate(each.add(PASSAGES), QUESTION, eos_token_id=ids[5], **asked) for each in (plain, graphs)]
    assert found[0].token_ids == found[1].token_ids
    behind = [
        each.generate([], random_ids(5), past=one.past, max_new_tokens=5, eos_token_id=None).token_ids
        for each, one in zip((plain, graphs), found, strict=True)
    ]
    assert behind[0] == behind[1]
