"""Methods that look at the prompt before they choose, and what they look at."""

import gc
import weakref

import pytest
import torch

from ragkv import (
    CacheBlend,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    MethodError,
    Oracle,
    PromptTemplate,
    QuestionAware,
    Random,
    RelevantTokens,
    Reuse,
    SensitiveTokens,
    TieredStore,
    Union,
)
from ragkv.fusion import view
from ragkv.library.sensitivity import sensitivity
from ragkv.methods import Auto
from ragkv.model.decoder import Decoder
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)
PARTS = [random_ids(n) for n in (20, 31, 9)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    return Engine(model, template=TEMPLATE)


def chosen(prompt):
    """Chunk tokens computed afresh."""
    return set(prompt.recomputed[prompt.recomputed < prompt.input_ids.shape[1] - len(QUESTION)].tolist())


class Keep(Method):
    """Looks, and keeps what it saw."""

    def __init__(self, look):
        self.look, self.seen = look, None

    def select(self, view):
        self.seen = self.look(view)
        return view.layout.reusable[:0]


def see(engine, chunks, look):
    keep = Keep(look)
    engine.fuse(chunks, QUESTION, method=keep)
    return keep.seen


def test_attention_is_the_models_own(engine, model):
    document = engine.add_document(PARTS)  # exact where it stands, so that full prefill gives the same attention
    prompt = engine.fuse(document, QUESTION)
    model.set_attn_implementation("eager")
    try:
        weights = model(input_ids=prompt.input_ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    start, end = 3, prompt.input_ids.shape[1] - len(QUESTION)
    shown = torch.stack([layer[0, :, end:, start:end].mean(0) for layer in weights])
    means = {"all": shown.mean(1), "last": shown[:, -1]}
    for queries, want in {**means, "both": (means["all"] + means["last"]) / 2}.items():
        torch.testing.assert_close(
            see(engine, document, lambda s, q=queries: s.attention(q)), want, atol=1e-6, rtol=1e-4
        )


def test_a_prompt_in_the_making_is_gone_once_it_is_made(engine):
    """It is the view, and holds all that was loaded: that does not wait for the garbage collector."""
    chunks = engine.add(PARTS)[::-1]
    gc.disable()
    try:
        assert see(engine, chunks, lambda v: (v.attention(), v.deviation, v.tiers, weakref.ref(v))[-1])() is None
    finally:
        gc.enable()


def test_question_aware_takes_what_the_question_looks_at(engine):
    chunks = engine.add(PARTS)
    attention = see(engine, chunks, lambda view: view.attention("last")).mean(0)
    prompt = engine.fuse(chunks, QUESTION, method=QuestionAware(ratio=0.25, queries="last"))
    exact = len(PARTS[0]) + 1  # the first chunk stands where it was made
    best = attention[exact:].topk(round(0.25 * len(attention))).indices + exact + 3
    assert chosen(prompt) == set(best.tolist())
    assert prompt.report.budget == pytest.approx(0.25, abs=0.02)


def test_oracle_sees_the_deviation_from_full_prefill(engine):
    chunks = engine.add(PARTS)[::-1]
    deviation = see(engine, chunks, lambda view: view.deviation)
    stored = engine.fuse(chunks, QUESTION, method=Reuse())
    full = engine.fuse(chunks, QUESTION, method=FullPrefill())
    span, layer = slice(3, stored.input_ids.shape[1] - len(QUESTION)), 2
    want = 0
    for name in ("keys", "values"):
        a, b = (getattr(p.past_key_values.layers[layer], name)[0, :, span] for p in (stored, full))
        distance = (a - b).square().sum((0, 2))
        want = want + distance / distance.mean()
    torch.testing.assert_close(deviation[layer], want, atol=1e-4, rtol=1e-3)
    prompt = engine.fuse(chunks, QUESTION, method=Oracle(ratio=0.2, layer=layer))
    assert chosen(prompt) == set((want.topk(round(0.2 * len(want))).indices + 3).tolist())
    with pytest.raises(MethodError, match="layer 9 of a model"):
        engine.fuse(chunks, QUESTION, method=Oracle(layer=9))


def test_sensitivity_is_the_change_behind_a_foreign_text(model):
    foreign = random_ids(15)
    engine = Engine(model, template=TEMPLATE, method=SensitiveTokens(), foreign=foreign, piece_tokens=16)
    document = engine.add_document(PARTS)
    ids = [i for chunk in document for i in chunk.ids]

    def values(front):
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([[*front, *ids]]), use_cache=True).past_key_values
        return [layer.values[0] for layer in cache.layers]

    alone, behind = [v[:, 3:] for v in values([1, 5, 6])], values([1, 5, 6, *foreign, 10])
    want = sensitivity(alone, [v[:, 19:] for v in behind], [v[:, 3:19] for v in behind])
    got = torch.cat([engine.store.get(engine.documents.key(chunk)).sensitivity for chunk in document])
    assert want.max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=2e-3)  # kept as fp16


def test_only_the_later_part_of_a_document_is_measured_anew(model):
    def engine():
        return Engine(model, template=TEMPLATE, method=SensitiveTokens())

    at_once, later = engine(), engine()
    whole = at_once.add_document(PARTS)
    later.add_document(PARTS[:2])
    later.add_document(PARTS)
    for chunk in whole:
        one, two = (e.store.get(e.documents.key(chunk)).sensitivity for e in (at_once, later))
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("tiers", [{"cpu_bytes": 0}, {"cpu_bytes": 1 << 24}, {"gpu_bytes": 1 << 20, "device": "cpu"}])
def test_sensitivity_is_kept_with_the_chunk(model, tmp_path, tiers):
    kept = []
    for _ in range(3):
        with Engine(
            model, template=TEMPLATE, method=SensitiveTokens(0.2), store=TieredStore(tmp_path, **tiers)
        ) as engine:
            chunks = engine.add(PARTS)
            for _ in range(2):
                prompt = engine.fuse(chunks, QUESTION)
                kept.append((chosen(prompt), engine.store.get(engine.documents.key(chunks[1])).sensitivity.tolist()))
    assert all(item == kept[0] for item in kept) and kept[0][0]


def test_what_was_not_measured_is_made_up_for(model):
    engine = Engine(model, template=TEMPLATE, method=Reuse())
    chunks = engine.add(PARTS)
    for source in ("computed", "cpu"):
        prompt = engine.fuse(chunks, QUESTION, method=SensitiveTokens(0.2))
        assert prompt.report.sources == [source] * 3
        assert prompt.report.budget == pytest.approx(0.2, abs=0.02)
    assert engine.fuse(chunks, QUESTION, method=Reuse()).report.budget == 0


def test_a_foreign_text_takes_only_the_positions_there_are(model):
    longest = model.config.max_position_embeddings
    engine = Engine(model, template=PromptTemplate(prefix=[1]), method=SensitiveTokens())
    chunk = engine.add([random_ids(longest - 1)])[0]
    assert len(engine.store.get(engine.documents.key(chunk)).sensitivity) == longest - 1


def test_a_repaired_document_keeps_what_was_measured(model):
    engine = Engine(model, template=TEMPLATE, method=SensitiveTokens(0.3))
    old = engine.add_document(PARTS)
    new = engine.repair_document(old, [PARTS[0], random_ids(12), PARTS[2]], behind_tokens=2)
    kept, changed, moved = (engine.store.get(engine.documents.key(chunk)).sensitivity for chunk in new)
    assert kept.any() and not changed.any()
    assert torch.equal(moved, engine.store.get(engine.documents.key(old[2])).sensitivity)
    prompt = engine.fuse(engine.add([random_ids(8)]) + new[::-1], QUESTION)
    assert prompt.report.hits == {"cpu": 4}


def test_only_what_stands_behind_another_document_is_recomputed(model):
    engine = Engine(model, template=TEMPLATE, method=SensitiveTokens(0.99, keep_document=True))
    document, other = engine.add_document(PARTS), engine.add([random_ids(25)])
    assert not chosen(engine.fuse(document[::-1], QUESTION))
    prompt = engine.fuse([document[2], *other, *document[:2]], QUESTION)
    spared = 3 + len(document[2])
    assert chosen(prompt) == set(range(spared, prompt.input_ids.shape[1] - len(QUESTION)))


@pytest.mark.parametrize(
    ("order", "spared"),
    [((1, 2), {0, 1}), ((2, 0, 1), {0}), ((1, 0, 2), {0, 2}), ((0, 2, 1), {1, 2}), ((0, 1, 2), set())],
)
def test_a_chunk_without_its_documents_earlier_text_is_spared(model, order, spared):
    engine = Engine(model, template=TEMPLATE, method=SensitiveTokens(0.99, keep_document=True))
    document, other = engine.add_document(PARTS), engine.add([random_ids(25)])
    chunks = [*other, *(document[number] for number in order)]
    prompt = engine.fuse(chunks, QUESTION)
    at, want = 3 + len(other[0]), set()
    for place, number in enumerate(order):
        want |= set() if place in spared else set(range(at, at + len(document[number])))
        at += len(document[number])
    assert chosen(prompt) == want


@pytest.mark.parametrize("method", [SensitiveTokens, RelevantTokens])
def test_what_a_document_told_its_chunks_is_given_up_unless_it_is_to_be_kept(model, method):
    engine = Engine(model, template=TEMPLATE, method=method(0.99))
    document, other = engine.add_document(PARTS), engine.add([random_ids(25)])
    prompt = engine.fuse([*document[:1], *other, *document[1:]], QUESTION)
    start, end = 3 + len(document[0]), prompt.input_ids.shape[1] - len(QUESTION)  # only the first is exact
    assert chosen(prompt) == set(range(start, end))
    assert len(chosen(engine.fuse(document[::-1], QUESTION, method=method(0.5)))) > 0
    with pytest.raises(MethodError, match="keep_document must be true or false, got 1"):
        method(0.1, keep_document=1)


def test_a_chunk_that_another_document_parts_from_its_earlier_text_is_spared(model):
    engine = Engine(model, template=TEMPLATE, method=SensitiveTokens(0.99, keep_document=True))
    document, other = engine.add_document(PARTS), engine.add([random_ids(25)])
    prompt = engine.fuse([document[0], *other, *document[1:]], QUESTION)
    start = 3 + len(document[0])
    assert chosen(prompt) == set(range(start, start + len(other[0])))


def test_the_report_says_what_was_looked_with(engine):
    chunks = engine.add(PARTS)[::-1]
    assert engine.fuse(chunks, QUESTION, method=QuestionAware(0.2)).report.looked == "scored (reference)"
    assert engine.fuse(chunks, QUESTION, method=Oracle(0.2)).report.looked == ""


def test_a_check_runs_the_kernels_that_were_asked_for(model, monkeypatch):
    engine, asked = Engine(model, template=TEMPLATE, kernels="reference"), []
    plain = view.deviation
    monkeypatch.setattr(view, "deviation", lambda *pair, impl: asked.append(impl) or plain(*pair, impl=impl))
    engine.fuse(engine.add(PARTS)[::-1], QUESTION, method=CacheBlend(0.2, signal="both"))
    assert asked == ["reference"] * 2


def test_random_is_a_fair_control(engine):
    chunks = engine.add(PARTS)[::-1]
    first, again, other = (engine.fuse(chunks, QUESTION, method=Random(0.3, seed)) for seed in (0, 0, 1))
    assert chosen(first) == chosen(again) != chosen(other)
    assert len(chosen(first)) == round(0.3 * 63)


def test_union_computes_what_either_does(engine):
    chunks = engine.add(PARTS)[::-1]
    for a, b in [
        (LegoLink(3), SensitiveTokens(0.1)),
        (Random(0.1), QuestionAware(0.2)),
        (LegoLink(5), CacheBlend(0.2)),
        (CacheBlend(0.2), LegoLink(5)),
        (CacheBlend(0.2), QuestionAware(0.1)),
    ]:
        apart = [chosen(engine.fuse(chunks, QUESTION, method=method)) for method in (a, b)]
        prompt = engine.fuse(chunks, QUESTION, method=Union(a, b))
        assert chosen(prompt) == apart[0] | apart[1]
        assert prompt.recomputed.diff().min() > 0, "each once, in order"
    with pytest.raises(MethodError, match="Union: both"):
        engine.fuse(chunks, QUESTION, method=Union(CacheBlend(), CacheBlend(0.3)))


def test_auto_says_what_it_picked(model):
    engine = Engine(model, template=TEMPLATE, method="auto")
    document = engine.add_document(PARTS)
    assert engine.fuse(document, QUESTION).report.method == "Reuse()"
    assert engine.fuse(document[::-1], QUESTION).report.method == "Reuse()"
    other = engine.add([random_ids(30)])
    assert engine.fuse(document[::-1] + other, QUESTION).report.method == repr(SensitiveTokens())
    assert engine.fuse(engine.add([[7, 8], [9, 8]]), QUESTION).report.method == "FullPrefill()"
    assert engine.fuse(other + document, QUESTION, method=Auto(LegoLink(2))).report.method == "LegoLink(k=2)"
    with pytest.raises(MethodError, match="there are: auto"):
        engine.fuse(document, QUESTION, method="automatic")


def test_relevant_is_what_is_looked_at_and_changes(model):
    """Attention times the change of values; never what SensitiveTokens spares."""
    engine = Engine(model, template=TEMPLATE, method=RelevantTokens(0.3, keep_document=True))
    document, other = engine.add_document(PARTS), engine.add([random_ids(25)])
    chunks, views = [*document[1:], *other], []

    class Seeing(RelevantTokens):
        def scores(self, view):
            views.append(view)
            return super().scores(view)

    prompt = engine.fuse(chunks, QUESTION, method=Seeing(0.3, keep_document=True))
    (view,) = views
    assert len(view.sensitivity) == len(view.layout.reusable) and view.sensitivity.min() >= 0
    want = view.attention("both").mean(0) * view.sensitivity.sqrt()
    open_ = view.layout.span(view.layout.chunks[-1])  # the others stand without their document's first part
    most = round(0.3 * len(view.layout.reusable))
    best = open_[want[-len(open_) :].topk(most).indices]
    assert chosen(prompt) == set(best.tolist()) and 0 < len(best) < len(open_)
    assert prompt.report.looked and engine.fuse(chunks, QUESTION, method=RelevantTokens(1)).report.budget == 1
    assert RelevantTokens.needs_sensitivity and RelevantTokens.looks


def test_where_attention_is_hidden_sensitivity_alone_decides():
    engine = Engine(tiny_model("falcon"), template=TEMPLATE, method=RelevantTokens(0.3))
    chunks = engine.add([random_ids(n) for n in (40, 31, 30)])
    prompt, plain = engine.fuse(chunks, QUESTION), engine.fuse(chunks, QUESTION, method=SensitiveTokens(0.3))
    assert chosen(prompt) == chosen(plain) != set()
    parts = [*chunks[:1], *engine.add_document(PARTS)[:0:-1]]  # without their document's first part
    assert chosen(engine.fuse(parts, QUESTION))
    assert not chosen(engine.fuse(parts, QUESTION, method=RelevantTokens(0.3, keep_document=True)))
    assert prompt.report.method == repr(RelevantTokens(0.3)) and "not open to view" in prompt.report.why


@pytest.mark.parametrize("make", [SensitiveTokens, RelevantTokens, QuestionAware, Random, Oracle])
def test_ratios_are_checked(make):
    for ratio in (-0.1, 1.1):
        with pytest.raises(MethodError, match=r"ratio must lie in \[0, 1\]"):
            make(ratio=ratio)


def test_reading_for_sensitivity_reads_twice(model, reads):
    for method, times in ((Reuse(), 1), (SensitiveTokens(), 2)):
        engine = Engine(model, template=TEMPLATE, method=method, foreign=random_ids(9))
        seen = reads(engine)
        document = engine.add_document(PARTS)
        own = sum(map(len, document))
        front = len(TEMPLATE.prefix) + 9 + 1  # read once, however many documents follow
        assert sum(seen) == times * own + front * (times - 1)
        engine.add([random_ids(11)])
        assert sum(seen) == times * (own + 12) + front * (times - 1)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_a_long_question_looks_in_pieces(architecture, kernels, monkeypatch):
    """As many rows at a time as a forward may have; what is seen is the same."""
    model, question = tiny_model(architecture), random_ids(40)
    ran = []
    for name in ("run", "step"):
        inner = getattr(Decoder, name)
        monkeypatch.setattr(
            Decoder,
            name,
            lambda self, ids, *rest, inner=inner, **more: ran.append(len(ids)) or inner(self, ids, *rest, **more),
        )
    seen = []
    for piece_tokens in (512, 16):
        engine, got = Engine(model, template=TEMPLATE, kernels=kernels, piece_tokens=piece_tokens), []
        chunks = engine.add(PARTS)
        ran.clear()
        for starts in (None, [3, 60, 120]) if kernels == "auto" else (None,):
            keep = Keep(lambda view: [view.attention(queries) for queries in ("all", "last", "both")])
            engine.fuse(chunks, question, method=keep, starts=starts)
            got += keep.seen
        seen.append(got)
    assert max(ran) == 16
    for whole, pieces in zip(*seen, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-4)


def test_what_others_look_at_meanwhile_is_not_seen(engine, monkeypatch):
    """Weights that the model shows to one thread are not another's, who waits for its turn."""
    chunks, reader = engine.add(PARTS), type(engine.documents.reader)
    turn = reader.turn

    def look(given, before):
        keep = Keep(lambda view: [view.attention("last"), before(), view.attention("all")][-1])
        prompt = engine.fuse(given, QUESTION, method=keep, starts=[3, 60, 120])
        assert prompt.report.looked == "eager"
        return keep.seen

    def late(self):
        monkeypatch.setattr(reader, "turn", turn)
        look(chunks[::-1], lambda: None)
        return turn(self)

    want = look(chunks, lambda: None)
    assert torch.equal(look(chunks, lambda: monkeypatch.setattr(reader, "turn", late)), want)


def test_what_is_run_again_is_seen_once(engine, monkeypatch):
    """As where a forward failed beside others' rows."""
    chunks, reader = engine.add(PARTS), type(engine.documents.reader)
    want, forward = see(engine, chunks, lambda view: view.attention("all")), reader.forward

    def twice(self, rows, seat=None):
        held = rows.held
        forward(self, rows, seat)
        rows.cache.set_length(held)
        return forward(self, rows, seat)

    monkeypatch.setattr(reader, "forward", twice)
    assert torch.equal(see(engine, chunks, lambda view: view.attention("all")), want)
