"""Cache-Craft: what chunks attend to is kept, and decides what is taken and what is computed."""

from math import ceil

import pytest
import torch

from ragkv import CacheCraft, Engine, Method, MethodError, PromptTemplate, RecordError, Reuse, TieredStore, Union
from ragkv.chunk import Attended
from ragkv.fusion.placement import Placement
from ragkv.kernels import place, rotation_tables
from ragkv.library.paths import Paths
from ragkv.methods.cache_craft import overlap
from ragkv.store.keys import variants_of
from ragkv.store.source import InMemory
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6, 7], before_chunk=[9], after_chunk=[10], after_question=[12])
QUESTION = random_ids(9)
EXACT = 1e-4


def engine_of(architecture="llama", model=None, **options):
    options = {"paths": 64 << 20, "method": CacheCraft(), **options}
    return Engine(model or tiny_model(architecture), template=TEMPLATE, **options)


def texts(*lengths):
    return [random_ids(n) for n in lengths]


def asked(engine, chunks, question=QUESTION, **options):
    """A prompt, once all that it computed is stored."""
    prompt = engine.fuse(chunks, question, **options)
    assert engine.paths is None or engine.paths.wait(30)
    return prompt


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
    a, b = engine.add(texts(17, 40))
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
    (a, b, c), plains = (one.add(texts(17, 40, 25)) for one in (engine, plain))
    asked(engine, [a, b])
    prompt = asked(engine, [c, a, b])  # of c b's variant knows nothing: beta is 1
    assert prompt.report.sources[2] == "variant"
    held = plain.fuse([plains[2], plains[0], plains[1]], QUESTION)
    start, rows = len(TEMPLATE.prefix) + len(c) + len(a), variants(engine, b)[(a.short,)].rows
    others = torch.tensor([i for i in range(len(b)) if i not in rows.tolist()])
    first = plain.fuse([plains[0], plains[1]], QUESTION, method=Chosen(rows + len(TEMPLATE.prefix) + len(a)))
    moved = plain.decoder.rotations[0]
    assert moved is not None
    there, now, still = start - len(c) + rows, start + rows, start + others
    layers = (each.past_key_values.layers for each in (prompt, held, first))
    for layer, own, made in zip(*layers, strict=True):
        assert torch.allclose(layer.keys[0, :, still], own.keys[0, :, still], atol=EXACT)
        assert torch.allclose(layer.values[0, :, still], own.values[0, :, still], atol=EXACT)
        assert torch.allclose(layer.values[0, :, now], made.values[0, :, there], atol=EXACT)
        assert not torch.allclose(layer.keys[0, :, now], made.keys[0, :, there], atol=1e-2)  # turned
    turned = turned_keys(plain, first.past_key_values.layers[1].keys[0, :, there], there, now)
    assert torch.allclose(prompt.past_key_values.layers[1].keys[0, :, now], turned, atol=EXACT)


def turned_keys(engine, keys, old, new):
    rotation, out = engine.decoder.rotations[1], torch.empty_like(keys)
    place(out, keys, *rotation_tables(rotation, old, new), interleaved=rotation.interleaved)
    return out


def test_what_is_kept_goes_with_the_chunks_that_it_was_computed_of(tmp_path):
    engine = engine_of(paths=True, store=TieredStore(tmp_path))
    a, b, c = engine.add(texts(17, 40, 25))
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
    for namespace, seed in (("", 0), ("other", 0), ("", 1)):
        engine = engine_of(model=tiny_model(seed=seed), store=store, paths=True, namespace=namespace)
        chunks = engine.add(texts(17, 40))
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
    a, b, c = engine.add(texts(17, 40, 25))
    asked(engine, [a, b])
    asked(engine, [c, b])
    rows = {front: engine.paths.store._tiers.home.row(key) for front, key in keyed(engine, b).items()}
    before = {front: row.usage.frequency for front, row in rows.items()}
    asked(engine, [a, b])
    after = {front: engine.paths.store._tiers.home.row(key).usage.frequency for front, key in keyed(engine, b).items()}
    assert after == {(a.short,): before[(a.short,)] + 1, (c.short,): before[(c.short,)]}


def test_a_damaged_or_evicted_variant_is_computed_anew(monkeypatch):
    engine = engine_of()
    a, b = engine.add(texts(17, 40))
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
        (self.source,) = engine.paths.store._tiers.home.find([key]).values()
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
    a, b, c = engine.add(texts(17, 40, 25))
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


def test_layers_that_are_placed_one_by_one_hold_the_same(monkeypatch):
    """As on an accelerator."""
    engine = engine_of()
    a, b, c = engine.add(texts(17, 40, 25))
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
    a, b, c = engine.add(texts(17, 40, 25))
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
    document = engine.add_document(texts(13, 22))
    chunks = [*engine.add([random_ids(17)]), *document]
    report = asked(engine, chunks).report
    assert report.tokens["recomputed"] == ceil(0.5 * 0.5 * len(document[0]))  # behind its document nothing is missing
    alone = asked(engine, [chunks[0], document[1]]).report
    impact = attended(engine, document[1]).impact
    assert alone.tokens["recomputed"] == ceil(0.5 * impact * len(document[1]))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_with_a_method_that_looks_at_stored_chunks_first(alpha, monkeypatch):
    """Variants take the places of chunks that are placed by then; rows of a chunk, and whole ones."""
    engine = engine_of(method=CacheCraft(alpha=alpha))
    a, b, c = engine.add(texts(17, 40, 25))
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
