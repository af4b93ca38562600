"""Cache-Craft: what chunks attend to is measured, kept, and decides what is taken and what is computed."""

from math import ceil, exp

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ragkv import (
    CacheCraft,
    Engine,
    Method,
    MethodError,
    PromptTemplate,
    RecordError,
    Reuse,
    SensitiveTokens,
    TieredStore,
    Union,
)
from ragkv.chunk import Attended
from ragkv.fusion.placement import Placement
from ragkv.kernels import place, rotation_tables
from ragkv.library.paths import Paths
from ragkv.methods.cache_craft import overlap
from ragkv.store.keys import variants_of
from ragkv.store.source import InMemory
from ragkv.testing import ARCHITECTURES, random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], before_chunk=[9], after_chunk=[10], after_question=[12])
QUESTION = random_ids(9)
EXACT = 1e-4


def engine_of(architecture="llama", **options):
    return Engine(tiny_model(architecture), template=TEMPLATE, **{"paths": 64 << 20, "method": CacheCraft(), **options})


def asked(engine, chunks, question=QUESTION, **options):
    """A prompt, once all that it computed is stored."""
    prompt = engine.fuse(chunks, question, **options)
    assert engine.paths is None or engine.paths.wait(30)
    return prompt


def weights(model, ids):
    """``[N, N]`` the model's own attention, mean over heads and layers."""
    loaded = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=torch.tensor([ids]), output_attentions=True)
    finally:
        model.set_attn_implementation(loaded)
    return torch.stack([layer[0].mean(0) for layer in out.attentions]).mean(0).detach()


class Chosen(Method):
    """Computes the tokens that it was given."""

    looks = False

    def __init__(self, tokens):
        self.tokens = tokens

    def select(self, view):
        return self.tokens


def attended(engine, chunk):
    """What is stored of a chunk as it was read."""
    return engine.store.headers([engine.documents.key(chunk)]).popitem()[1].attended


def variants(engine, chunk):
    """What is kept of a chunk as it was computed behind others, by the names of these."""
    headers = engine.paths.store.headers(keyed(engine, chunk).values())
    return {source.attended.front: source for source in headers.values()}


def keyed(engine, chunk):
    """The keys of that."""
    beginning = variants_of(engine.documents.key(chunk))
    keys = engine.paths.store.beginning([beginning])[beginning]
    return {source.attended.front: key for key, source in engine.paths.store.headers(keys).items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_chunks_attend_to_when_they_are_read(architecture):
    engine = engine_of(architecture, paths=False, piece_tokens=40)
    if architecture == "falcon":
        with pytest.raises(MethodError, match="not open to view"):
            engine.add([random_ids(13)])
        return
    chunks = engine.add_document([random_ids(n) for n in (13, 22, 30)])
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
    texts = [random_ids(n) for n in (13, 22, 30)]
    got = []
    for way in ("eager", kernels):
        model = tiny_model(architecture)
        if way == "eager":
            model.set_attn_implementation("eager")
        engine = Engine(
            model,
            template=TEMPLATE,
            method=CacheCraft(alpha=0.8),
            paths=64 << 20,
            kernels="auto" if way == "eager" else kernels,
            piece_tokens=512 if way == "eager" else 11,  # a pass in pieces
        )
        chunks = engine.add(texts)
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


def test_the_formulas():
    held = Attended(("a", "b", "c"), (3.0, 2.0, 1.0), 0.6, torch.zeros(4))
    assert overlap(held, ["a", "b", "c"]) == 1
    assert overlap(held, ["x", "a", "y", "b", "c"]) == 1  # what is new in front does not count, as in the paper
    assert overlap(held, ["a", "b"]) == pytest.approx(5 / 6)
    assert overlap(held, ["b", "a", "c"]) == pytest.approx(2 / 3)  # one of three pairs stands the other way round
    assert overlap(held, ["c", "a"]) == pytest.approx(4 / 6 * 0)
    assert overlap(held, []) == 0 == overlap(held, ["x"])
    nothing = Attended.nothing(4)
    assert overlap(nothing, []) == 1 and overlap(nothing, ["a"]) == 0


def test_how_much_is_computed_and_of_what():
    engine = engine_of(method=CacheCraft(alpha=0.4))
    a, b = engine.add([random_ids(n) for n in (17, 40)])
    report = asked(engine, [a, b]).report
    assert report.tokens["recomputed"] == ceil(0.4 * 0.5 * len(b))  # read behind no chunk: the first ones
    start = len(TEMPLATE.prefix) + len(a)
    prompt = asked(engine, [a, b], random_ids(8))
    assert prompt.report.sources == ["cpu", "variant"]
    assert prompt.report.budget == 0 and prompt.report.saved_tokens == ceil(0.2 * len(b))
    (front, source), *others = variants(engine, b).items()
    assert front == (a.short,) and not others and source.base == start
    sensitive = engine.store.headers([engine.documents.key(b)]).popitem()[1].sensitivity
    assert source.rows.tolist() == sorted(sensitive.topk(ceil(0.2 * len(b))).indices.tolist())


def test_a_variant_is_what_the_prompt_computed_wherever_it_is_placed():
    """Behind the same chunk, at another place, its tokens' keys are turned there."""
    engine, plain = engine_of(), engine_of(method=Reuse(), paths=False)
    texts = [random_ids(n) for n in (17, 40, 25)]
    (a, b, c), plains = engine.add(texts), plain.add(texts)
    asked(engine, [a, b])
    prompt = asked(engine, [c, a, b])  # of c b's variant knows nothing: beta is 1
    assert prompt.report.sources[2] == "variant"
    held = plain.fuse([plains[2], plains[0], plains[1]], QUESTION)
    start, rows = len(TEMPLATE.prefix) + len(c) + len(a), variants(engine, b)[(a.short,)].rows
    others = torch.tensor([i for i in range(len(b)) if i not in rows.tolist()])
    first = plain.fuse([plains[0], plains[1]], QUESTION, method=Chosen(rows + len(TEMPLATE.prefix) + len(a)))
    moved = plain.decoder.rotations[0]
    assert moved is not None
    for layer, own, made in zip(
        prompt.past_key_values.layers, held.past_key_values.layers, first.past_key_values.layers, strict=True
    ):
        assert torch.allclose(layer.keys[0, :, start + others], own.keys[0, :, start + others], atol=EXACT)
        assert torch.allclose(layer.values[0, :, start + others], own.values[0, :, start + others], atol=EXACT)
        there = start - len(c) + rows
        assert torch.allclose(layer.values[0, :, start + rows], made.values[0, :, there], atol=EXACT)
        assert not torch.allclose(layer.keys[0, :, start + rows], made.keys[0, :, there], atol=1e-2)  # turned
    turned = turned_keys(
        plain, first.past_key_values.layers[1].keys[0, :, start - len(c) + rows], start - len(c) + rows, start + rows
    )
    assert torch.allclose(prompt.past_key_values.layers[1].keys[0, :, start + rows], turned, atol=EXACT)


def turned_keys(engine, keys, old, new):
    rotation, out = engine.decoder.rotations[1], torch.empty_like(keys)
    place(out, keys, *rotation_tables(rotation, old, new), interleaved=rotation.interleaved)
    return out


def test_what_is_kept_goes_with_the_chunks_that_it_was_computed_of(tmp_path):
    engine = engine_of(paths=True, store=TieredStore(tmp_path))
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    asked(engine, [a, b, c])
    assert set(variants(engine, b)) == {(a.short,)} and set(variants(engine, c)) == {(a.short, b.short)}
    engine.forget([b])
    assert not variants(engine, b) and not variants(engine, c)
    engine.add([a.ids[1:-1]])
    asked(engine, [a, c])
    engine.close()
    with engine_of(paths=True, store=TieredStore(tmp_path)) as other:  # of another process
        assert set(variants(other, c)) == {(a.short,)}
        assert asked(other, [a, c]).report.sources[1] == "variant"
        other.forget([a])
        assert not variants(other, c)


def test_variants_of_another_namespace_or_model_are_not_found(tmp_path):
    store = TieredStore(tmp_path)
    texts = [random_ids(n) for n in (17, 40)]
    for options in ({}, {"namespace": "other"}, {"seed": 1}):
        model = tiny_model(seed=options.pop("seed", 0))
        engine = Engine(model, template=TEMPLATE, method=CacheCraft(), store=store, paths=True, **options)
        chunks = engine.add(texts)
        assert "variant" not in asked(engine, chunks).report.sources
        assert asked(engine, chunks).report.sources[1] == "variant"


def test_so_many_are_kept_of_a_chunk_the_most_valuable_ones():
    engine = engine_of()
    (b,) = engine.add([random_ids(40)])
    fronts = engine.add([random_ids(n) for n in range(11, 18)])
    for front in fronts[:5]:
        asked(engine, [front, b])
    for _ in range(2):
        asked(engine, [fronts[0], b])
    asked(engine, [fronts[5], b])
    kept = set(variants(engine, b))
    assert len(kept) == 5 and {(fronts[0].short,), (fronts[5].short,)} < kept
    assert asked(engine, [fronts[0], b]).report.sources[1] == "variant"


def test_looking_for_variants_is_no_use_of_them():
    engine = engine_of()
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    asked(engine, [a, b])
    asked(engine, [c, b])
    rows = {front: engine.paths.store._home.row(key) for front, key in keyed(engine, b).items()}
    before = {front: row.usage.frequency for front, row in rows.items()}
    asked(engine, [a, b])
    after = {front: engine.paths.store._home.row(key).usage.frequency for front, key in keyed(engine, b).items()}
    assert after == {(a.short,): before[(a.short,)] + 1, (c.short,): before[(c.short,)]}


def test_a_damaged_or_evicted_variant_is_computed_anew(monkeypatch):
    engine = engine_of()
    a, b = engine.add([random_ids(n) for n in (17, 40)])
    first = asked(engine, [a, b])
    (key,) = keyed(engine, b).values()
    found = Paths.variants

    def gone(self, *args):
        lists = found(self, *args)
        self.store.remove(key)
        return lists

    monkeypatch.setattr(Paths, "variants", gone)
    again = asked(engine, [a, b])
    assert again.report.sources[1] == "cpu" and torch.equal(first.logits, again.logits)
    monkeypatch.undo()
    assert asked(engine, [a, b]).report.sources[1] == "variant"
    monkeypatch.setattr(InMemory, "layer", damaged := Damaged(key, engine))
    last = asked(engine, [a, b])
    assert damaged.raised == 1 and torch.equal(first.logits, last.logits)


class Damaged:
    """A layer of one record cannot be read."""

    def __init__(self, key, engine):
        self.key, self.raised = key, 0
        (self.source,) = engine.paths.store._home.find([key]).values()
        self.layer = InMemory.layer

    def __get__(self, source, kind):
        def layer(number):
            if source is self.source:
                self.raised += 1
                raise RecordError("damaged")
            return self.layer(source, number)

        return layer


def test_a_chunk_computed_whole_is_a_variant_of_all_its_tokens():
    """Behind what is not exact itself; elsewhere it needs nothing of what was read."""
    engine = engine_of(method=CacheCraft(alpha=1.0))
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    asked(engine, [a, b, c], method=CacheCraft(alpha=2.0))  # b behind a is exact, and so is c
    made = asked(engine, [c, a, b], method=Union(CacheCraft(alpha=0.5), Behind(b)))
    (whole,) = variants(engine, b).values()
    assert whole.rows is None and whole.attended.front == (c.short, a.short)
    (d,) = engine.add([random_ids(11)])
    prompt = asked(engine, [d, c, a, b], random_ids(7))
    assert prompt.report.sources[3] == "variant" and prompt.report.chunks[3].saved == ceil(0.5 * len(b))
    old = torch.arange(whole.base, whole.base + len(b))
    layer, there = made.past_key_values.layers[1], prompt.past_key_values.layers[1]
    assert torch.allclose(there.values[0, :, old + len(d)], layer.values[0, :, old], atol=EXACT)
    turned = turned_keys(engine, layer.keys[0, :, old], old, old + len(d))
    assert torch.allclose(there.keys[0, :, old + len(d)], turned, atol=EXACT)


class Behind(Method):
    """Computes a chunk whole."""

    looks = False

    def __init__(self, chunk):
        self.chunk = chunk

    def select(self, view):
        return view.layout.span(*[placed for placed in view.layout.chunks if placed.chunk is self.chunk])


def test_documents_that_were_read_for_another_method_are_measured_once():
    engine = engine_of(method=SensitiveTokens(0.2))
    document = engine.add_document([random_ids(n) for n in (13, 22)])
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
    chunks = engine.add([random_ids(n) for n in (17, 22)])
    for method in (Attends(), SensitiveTokens(0.2)):
        assert asked(engine, chunks, method=method).report.sources == ["computed"] * 2
    assert all(attended(engine, chunk) is not None for chunk in chunks)
    assert "computed" not in asked(engine, chunks, method=CacheCraft()).report.sources


def test_layers_that_are_placed_one_by_one_hold_the_same(monkeypatch):
    """As on an accelerator."""
    engine = engine_of()
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    asked(engine, [a, b])
    first = asked(engine, [c, a, b])
    init = Placement.__init__
    monkeypatch.setattr(
        Placement, "__init__", lambda self, *args, **more: init(self, *args, **{**more, "by_layer": True})
    )
    again = asked(engine, [c, a, b])
    assert again.report.sources[2] == first.report.sources[2] == "variant" and again.report.budget == 0
    plain = asked(engine, [c, a, b], method=Reuse())
    assert not torch.allclose(again.logits, plain.logits, atol=EXACT)
    monkeypatch.undo()
    assert torch.allclose(asked(engine, [c, a, b]).logits, again.logits, atol=EXACT)


def test_with_many_at_once_and_in_a_session_it_is_as_alone():
    engine, lone = engine_of(), engine_of()
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    prompts = engine.fuse_many([([a, b], QUESTION), ([c, b], QUESTION)])
    for prompt, chunks in zip(prompts, ([a, b], [c, b]), strict=True):
        own = lone.fuse(lone.add([chunk.ids[1:-1] for chunk in chunks]), QUESTION)
        assert torch.allclose(prompt.logits, own.logits, atol=EXACT)


@pytest.mark.parametrize("alpha", [0, -1, True, "1", float("inf"), float("nan")])
def test_an_alpha_that_is_none(alpha):
    with pytest.raises(MethodError, match="alpha must be more than 0"):
        CacheCraft(alpha=alpha)


def test_without_paths_documents_are_all_that_is_known():
    engine = engine_of(paths=False)
    document = engine.add_document([random_ids(n) for n in (13, 22)])
    chunks = [*engine.add([random_ids(17)]), *document]
    report = asked(engine, chunks).report
    assert report.tokens["recomputed"] == ceil(0.5 * 0.5 * len(document[0]))  # behind its document nothing is missing
    alone = asked(engine, [chunks[0], document[1]]).report
    impact = attended(engine, document[1]).impact
    assert alone.tokens["recomputed"] == ceil(0.5 * impact * len(document[1]))


class Looked(CacheCraft):
    """Keeps what it is shown at its checks."""

    def narrow(self, check):
        LOOKED.append((check.layer, check.looked))
        return super().narrow(check)


LOOKED = []


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "stablelm"])
def test_what_the_question_does_not_attend_to_is_mended_no_further(architecture):
    engine = Engine(tiny_model(architecture, num_hidden_layers=6), template=TEMPLATE, paths=64 << 20)
    chunks = engine.add([random_ids(n) for n in (17, 40, 12, 25)])
    LOOKED.clear()
    never = asked(engine, chunks, method=Looked(alpha=0.8, stop=1e-9))
    assert [layer for layer, _ in LOOKED] == [2, 3, 4] and len(set(never.report.fresh_by_layer)) == 1
    last = LOOKED[-1][1]
    assert last.shape == (4, 4) and (last >= 0).all() and (last.sum(1) < len(QUESTION) + 1).all()
    best = last[1:4].argmax(1)
    other = Engine(engine.model, template=TEMPLATE, paths=64 << 20)
    other.add([chunk.ids[1:-1] for chunk in chunks])
    soon = asked(other, chunks, method=CacheCraft(alpha=0.8, stop=1.0))
    assert soon.report.fresh_by_layer[0] == never.report.fresh_by_layer[0] > soon.report.fresh_by_layer[-1]
    kept = [number for number, chunk in enumerate(chunks) if variants(other, chunk)]
    assert set(kept) <= set(best.tolist())  # what was mended in some layers alone is not kept
    assert asked(engine, chunks, method=CacheCraft(alpha=0.8)).report.sources[1:] == ["variant"] * 3


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_where_the_model_raises_while_it_is_watched_nothing_is_left(way):
    model = tiny_model()
    model.set_attn_implementation(way)
    engine = Engine(model, template=TEMPLATE, method=CacheCraft(), paths=64 << 20)
    chunks = engine.add([random_ids(n) for n in (17, 40)])
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


def test_what_was_read_behind_a_neighbour_needs_nothing_where_that_stands_in_front():
    engine = engine_of(paths=False)
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    (near,) = engine.add_document([random_ids(30)], behind=[a])
    assert attended(engine, near).front == (a.short,)
    with_it, without = (asked(engine, [*front, near]).report for front in ([c, a], [c, b]))
    spared = ceil(0.25 * len(a)), ceil(0.25 * len(b))
    assert with_it.tokens["recomputed"] == spared[0] < without.tokens["recomputed"] - spared[1] + spared[0]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_with_a_method_that_looks_at_stored_chunks_first(alpha, monkeypatch):
    """Variants take the places of chunks that are placed by then; rows of a chunk, and whole ones."""
    engine = engine_of(method=CacheCraft(alpha=alpha))
    a, b, c = engine.add([random_ids(n) for n in (17, 40, 25)])
    asked(engine, [c, a, b], method=CacheCraft(0.2))
    asked(engine, [c, a, b], method=Union(CacheCraft(0.2), Behind(b)) if alpha == 2.0 else CacheCraft(0.2))
    monkeypatch.setattr(Paths, "keep", lambda self, *args: None)
    want = asked(engine, [a, c, a, b], method=CacheCraft(0.2))
    looked = asked(engine, [a, c, a, b], method=Union(Looks(), CacheCraft(0.2)))
    assert want.report.sources[3] == looked.report.sources[3] == "variant"
    for one, other in zip(want.past_key_values.layers, looked.past_key_values.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=EXACT) and torch.allclose(one.values, other.values, atol=EXACT)


class Looks(Method):
    """Looks at what is stored, and computes nothing."""

    def select(self, view):
        assert view.attention().shape[0] == view.layers
        return view.layout.reusable[:0]


def test_what_a_prompt_did_not_compute_is_as_it_was_read():
    engine = engine_of()
    document = engine.add_document([random_ids(n) for n in (13, 40)])
    (a,) = engine.add([random_ids(17)])
    asked(engine, [a, document[1]])
    (source,) = variants(engine, document[1]).values()
    before, left = attended(engine, document[1]).tokens, torch.ones(len(document[1]), dtype=torch.bool)
    left[source.rows] = False
    assert left.any() and torch.equal(source.attended.tokens[left], before[left]) and (before[left] > 0).all()
    assert not torch.equal(source.attended.tokens[~left], before[~left])


def test_a_repaired_document_is_not_read_again_to_be_measured():
    engine = engine_of()
    parts = [random_ids(n) for n in (13, 22, 30)]
    old = engine.add_document(parts)
    new = engine.repair_document(old, [parts[0], random_ids(25), parts[2]])
    assert engine.add([random_ids(17)]) and new[1].mark
    report = asked(engine, [*engine.add([random_ids(17)]), *new]).report
    assert "computed" not in report.sources
    assert attended(engine, new[2]).front == (old[0].short, old[1].short) and not attended(engine, new[1]).front
