"""What chunks attend to is measured when they are read and in prompts, as the model itself attends."""

from dataclasses import replace
from math import ceil, exp

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragkv import CacheCraft, Method, MethodError, Reuse, SensitiveTokens
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

from .test_cache_craft import QUESTION, TEMPLATE, asked, attended, engine_of, texts, variants


def weights(model, ids):
    """``[N, N]`` the model's own attention, mean over heads and layers."""
    loaded = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=torch.tensor([ids]), output_attentions=True)
    finally:
        model.set_attn_implementation(loaded)
    return torch.stack([layer[0].mean(0) for layer in out.attentions]).mean(0).detach()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_chunks_attend_to_when_they_are_read(architecture):
    engine = engine_of(architecture, paths=False, piece_tokens=40)
    if architecture == "falcon":
        with pytest.raises(MethodError, match="not open to view"):
            engine.add([random_ids(13)])
        return
    chunks = engine.add_document(texts(13, 22, 30))
    seen = weights(engine.model, [*TEMPLATE.prefix, *(i for chunk in chunks for i in chunk.ids)])
    start = len(TEMPLATE.prefix)
    spans = [slice(start + chunk.offset, start + chunk.offset + len(chunk)) for chunk in chunks]
    for number, (chunk, span) in enumerate(zip(chunks, spans, strict=True)):
        got = attended(engine, chunk)
        assert got.front == tuple(other.short for other in chunks[:number])
        want = [float(seen[span, other].sum()) for other in spans[:number]]
        assert got.masses == pytest.approx(want, rel=1e-4)
        tokens = seen[span, start : span.start].sum(1)
        assert torch.allclose(got.tokens, tokens, rtol=1e-3, atol=1e-6)
        there = sum(mass / len(chunk) / len(other) for mass, other in zip(want, chunks, strict=False))
        here = float(seen[span, span].sum()) / len(chunk) ** 2
        assert got.impact == pytest.approx(1 / (1 + exp(-there / here)), rel=1e-4)
    assert attended(engine, chunks[0]).impact == 0.5


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_what_rows_of_a_prompt_attend_to(architecture, kernels):
    """By the model's attention, by the kernels' and by eager weights, the same."""
    got = []
    for way, in_pieces in (("eager", {}), (kernels, {"kernels": kernels, "piece_tokens": 11})):
        model = tiny_model(architecture)
        if way == "eager":
            model.set_attn_implementation("eager")
        engine = engine_of(model=model, method=CacheCraft(alpha=0.8), **in_pieces)
        chunks = engine.add(texts(13, 22, 30))
        report = asked(engine, chunks).report
        got.append([variants(engine, chunk) for chunk in chunks])
    assert way == "auto" or report.attention == "selective (reference)" or architecture == "gpt_oss"
    front = tuple(chunk.short for chunk in chunks)
    assert [list(found) for found in got[1]] == [[], [front[:1]], [front[:2]]]
    for one, other in zip(*got, strict=True):
        for names in one:
            a, b = one[names].attended, other[names].attended
            assert a.masses == pytest.approx(b.masses, rel=1e-3) and a.impact == pytest.approx(b.impact, rel=1e-3)
            assert torch.equal(one[names].rows, other[names].rows)
            assert torch.allclose(a.tokens, b.tokens, rtol=1e-2, atol=1e-5)


def test_what_a_prompt_did_not_compute_is_as_it_was_read():
    engine = engine_of()
    document = engine.add_document(texts(13, 40))
    (a,) = engine.add([random_ids(17)])
    asked(engine, [a, document[1]])
    (source,) = variants(engine, document[1]).values()
    before, left = attended(engine, document[1]).tokens, torch.ones(len(document[1]), dtype=torch.bool)
    left[source.rows] = False
    assert left.any() and torch.equal(source.attended.tokens[left], before[left]) and (before[left] > 0).all()
    assert not torch.equal(source.attended.tokens[~left], before[~left])


def test_documents_that_were_read_for_another_method_are_measured_once():
    engine = engine_of(method=SensitiveTokens(0.2))
    document = engine.add_document(texts(13, 22))
    chunks = [*engine.add([random_ids(17)]), *document]
    assert attended(engine, document[1]) is None
    assert asked(engine, chunks, method=CacheCraft()).report.sources == ["computed"] * 3
    assert attended(engine, document[1]).front == (document[0].short,)
    again = asked(engine, chunks, method=SensitiveTokens(0.2))
    assert "computed" not in again.report.sources  # sensitivities are still known


class Attends(Method):
    """Goes by what chunks attend to alone."""

    needs_attended, looks = True, False

    def select(self, view):
        assert len(view.variants) == len(view.layout.chunks)
        return view.layout.reusable[:0]


def test_what_was_measured_before_is_measured_again():
    engine = engine_of(method=Reuse())
    chunks = engine.add(texts(17, 22))
    for method in (Attends(), SensitiveTokens(0.2)):
        assert asked(engine, chunks, method=method).report.sources == ["computed"] * 2
    assert all(attended(engine, chunk) is not None for chunk in chunks)
    assert "computed" not in asked(engine, chunks, method=CacheCraft()).report.sources


def test_what_was_read_behind_a_neighbour_needs_nothing_where_that_stands_in_front():
    engine = engine_of(paths=False)
    a, b, c = engine.add(texts(17, 40, 25))
    (near,) = engine.add_document([random_ids(30)], behind=[a])
    assert attended(engine, near).front == (a.short,)
    with_it, without = (asked(engine, [*front, near]).report for front in ([c, a], [c, b]))
    spared = ceil(0.25 * len(a)), ceil(0.25 * len(b))
    assert with_it.tokens["recomputed"] == spared[0] < without.tokens["recomputed"] - spared[1] + spared[0]


def test_a_repaired_document_is_not_read_again_to_be_measured():
    engine = engine_of()
    parts = texts(13, 22, 30)
    old = engine.add_document(parts)
    new = engine.repair_document(old, [parts[0], random_ids(25), parts[2]])
    assert engine.add([random_ids(17)]) and new[1].mark
    report = asked(engine, [*engine.add([random_ids(17)]), *new]).report
    assert "computed" not in report.sources
    assert attended(engine, new[2]).front == (old[0].short, old[1].short) and not attended(engine, new[1]).front


LOOKED = []


class Looked(CacheCraft):
    """Keeps what it is shown at its checks."""

    def narrow(self, check):
        LOOKED.append((check.layer, check.looked))
        return super().narrow(check)


class LookedAtAll(Looked):
    """Computes every token."""

    def select(self, view):
        return replace(super().select(view), tokens=view.layout.reusable)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "stablelm"])
def test_what_the_question_does_not_attend_to_is_mended_no_further(architecture):
    engine = engine_of(model=tiny_model(architecture, num_hidden_layers=6))
    chunks = engine.add(texts(17, 40, 12, 25))
    LOOKED.clear()
    never = asked(engine, chunks, method=Looked(alpha=0.8, stop=1e-9))
    assert [layer for layer, _ in LOOKED] == [2, 3, 4] and len(set(never.report.fresh_by_layer)) == 1
    last = LOOKED[-1][1]
    assert last.shape == (4, 4) and (last >= 0).all() and (last.sum(1) < len(QUESTION) + 1).all()
    best = last[1:4].argmax(1)
    other = engine_of(model=engine.model)
    other.add([chunk.ids[1:-1] for chunk in chunks])
    soon = asked(other, chunks, method=CacheCraft(alpha=0.8, stop=1.0))
    assert soon.report.fresh_by_layer[0] == never.report.fresh_by_layer[0] > soon.report.fresh_by_layer[-1]
    kept = [number for number, chunk in enumerate(chunks) if variants(other, chunk)]
    assert set(kept) <= set(best.tolist())  # what was mended in some layers alone is not kept
    assert asked(engine, chunks, method=CacheCraft(alpha=0.8)).report.sources[1:] == ["variant"] * 3


def test_where_all_is_mended_every_layer_is_looked_at_too():
    """What attends is asked from the first layer on, also where without that the layers up to the check would be run apart."""
    engine = engine_of(paths=False, model=tiny_model(num_hidden_layers=6))
    LOOKED.clear()
    asked(engine, engine.add(texts(17, 40)), method=LookedAtAll(stop=1e-9))
    assert [(layer, len(looked)) for layer, looked in LOOKED] == [(2, 2), (3, 3), (4, 4)]


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_where_the_model_raises_while_it_is_watched_nothing_is_left(way):
    model = tiny_model()
    model.set_attn_implementation(way)
    engine = engine_of(model=model)
    chunks = engine.add(texts(17, 40))
    known = set(ALL_ATTENTION_FUNCTIONS)

    def broken(module, args):
        assert (model.config._attn_implementation == way) == (way == "eager")  # it is watched now
        raise RuntimeError("out of memory")

    hook = model.model.layers[1].mlp.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.fuse(chunks, QUESTION)
    hook.remove()
    assert model.config._attn_implementation == way and set(ALL_ATTENTION_FUNCTIONS) == known
    assert not any(child._forward_hooks for layer in model.model.layers for child in layer.children())
    assert asked(engine, chunks).report.budget > 0
