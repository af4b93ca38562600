"""The engine: what is stored and found, what bad input does, what is charged."""

import pytest
import torch

from ragkv import (
    CacheBlend,
    Chunk,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    MethodError,
    PromptError,
    PromptTooLongError,
    QuestionAware,
    Reuse,
    Selection,
    SensitiveTokens,
    StoreFullError,
    TieredStore,
)
from ragkv.fusion.placement import Placement
from ragkv.testing import random_ids, tiny_model

from .conftest import QUESTION, TEMPLATE, full


def test_lost_chunks_are_read_again_in_their_context(engine):
    document = engine.add_document([random_ids(12), random_ids(20), random_ids(15)])
    chunks = [document[2], document[1]]
    want = engine.fuse(chunks, QUESTION)
    for lost in ([document[2]], [document[0], document[2]], document):
        for chunk in lost:
            engine.store.remove(engine.documents.key(chunk))
        got = engine.fuse(chunks, QUESTION)
        assert got.report.hits.get("computed", 0) == sum(chunk in chunks for chunk in lost)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert engine.fuse(chunks, QUESTION).report.hits == {"cpu": 2}


def test_a_record_that_breaks_its_promise_is_not_served(engine):
    chunk, other = engine.add([random_ids(20), random_ids(25)])
    want = engine.fuse([chunk], QUESTION)
    wrong = engine.store.get(engine.documents.key(other))
    engine.store.remove(engine.documents.key(chunk))
    engine.store.put(engine.documents.key(chunk), wrong)
    got = engine.fuse([chunk], QUESTION)
    assert got.report.hits == {"computed": 1}
    torch.testing.assert_close(got.logits, want.logits)


def test_a_store_that_is_too_small_is_worked_around_and_told(shared_model):
    with TieredStore(cpu_bytes=1000) as store:
        engine = Engine(shared_model, template=TEMPLATE, store=store)
        with pytest.raises(StoreFullError):
            engine.add([random_ids(50)])
        chunk = Chunk((*random_ids(50), 10))
        prompt = engine.fuse([chunk], QUESTION)
        assert prompt.report.hits == {"computed": 1}
        assert float((prompt.logits - full(shared_model, prompt.input_ids)).abs().max()) < 1e-4


def test_disk_survives_the_engine(shared_model, tmp_path):
    question = QUESTION
    with Engine(shared_model, template=TEMPLATE, store=TieredStore(tmp_path / "kv")) as engine:
        document = engine.add_document([random_ids(12), random_ids(20)])
        want = engine.fuse(document[::-1], question)
    with Engine(shared_model, template=TEMPLATE, store=TieredStore(tmp_path / "kv", cpu_bytes=0)) as engine:
        document = engine.add_document([random_ids(12), random_ids(20)])
        got = engine.fuse(document[::-1], question)
        assert got.report.hits == {"disk": 2}
        assert got.report.bytes_read > 0
        torch.testing.assert_close(got.logits, want.logits)


def test_another_models_kv_are_never_found(shared_model, tmp_path):
    with TieredStore(tmp_path / "kv") as store:
        Engine(shared_model, template=TEMPLATE, store=store).add([random_ids(20)])
        other = Engine(tiny_model(seed=1), template=TEMPLATE, store=store)
        prompt = other.fuse([Chunk((*random_ids(20), 10))], QUESTION)
        assert prompt.report.hits == {"computed": 1}
        assert float((prompt.logits - full(other.model, prompt.input_ids)).abs().max()) < 1e-4
        secret = Engine(shared_model, template=TEMPLATE, store=store, namespace="tenant")
        assert secret.fuse([Chunk((*random_ids(20), 10))], QUESTION).report.hits == {"computed": 1}


def test_no_chunks_and_the_same_chunk_twice(engine):
    chunk = engine.add([random_ids(20)])[0]
    for chunks in ([], [chunk, chunk], [chunk, random_ids(7), chunk]):
        for method in (Reuse(), LegoLink(k=4), CacheBlend(), FullPrefill()):
            prompt = engine.fuse(chunks, QUESTION, method=method)
            assert prompt.input_ids.shape[1] == 3 + sum(
                len(c) if isinstance(c, Chunk) else len(c) + 1 for c in chunks
            ) + len(QUESTION)
            if isinstance(method, FullPrefill) or not chunks:
                assert float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("chunks", "question", "reason"),
    [
        ([], [], "question is empty"),
        ([[]], [4], "chunk is empty"),
        ([[4, 128]], [4], "128 is out of the model's vocabulary"),
        ([[-1]], [4], "-1 is out of the model's vocabulary"),
        ([], [999], "999 is out of the model's vocabulary"),
        (["text"], [4], "no tokenizer"),
        ("text", [4], "must be a list"),
    ],
)
def test_bad_prompts(engine, chunks, question, reason):
    with pytest.raises(PromptError, match=reason):
        engine.fuse(chunks, question)


def test_too_long(shared_model):
    engine = Engine(shared_model, template=TEMPLATE)
    chunks = engine.add([random_ids(1000), random_ids(900), random_ids(500)])
    with pytest.raises(PromptTooLongError, match=r"2412 tokens, 364 more than the model's 2048"):
        engine.fuse(chunks, QUESTION)
    with pytest.raises(PromptTooLongError, match=r"is 956 more than the 2045"):
        engine.add([random_ids(3000)])
    assert engine.fuse(chunks[:2], QUESTION).logits.isfinite().all()


def test_bad_methods(engine):
    chunk = engine.add([random_ids(20)])[0]

    class Outside(Method):
        def select(self, view):
            return view.layout.suffix

    class Growing(LegoLink):
        def select(self, view):
            return Selection(super().select(view).tokens, checks=[1])

        def narrow(self, check):
            return check.layout.reusable

    for method in (Outside(), Growing(k=2)):
        with pytest.raises(MethodError, match="must choose among"):
            engine.fuse([chunk, chunk], QUESTION, method=method)
    for make in (
        lambda: LegoLink(k=-1),
        lambda: CacheBlend(ratio=1.5),
        lambda: CacheBlend(check_layer=0),
        lambda: CacheBlend(signal="query"),
        lambda: CacheBlend(gradual=(0.1, 0.2)),
        lambda: CacheBlend(threshold=-1.0),
    ):
        with pytest.raises(MethodError):
            make()
    with pytest.raises(MethodError, match="check_layer 9"):
        engine.fuse([chunk, chunk], QUESTION, method=CacheBlend(check_layer=9))
    with pytest.raises(TypeError, match=r"ragkv\.Method"):
        engine.fuse([chunk], QUESTION, method=LegoLink)


def test_budgets_are_charged_budgets(engine):
    chunks = engine.add([random_ids(40), random_ids(50), random_ids(60)])  # 41 + 51 + 61 tokens, 4 layers
    assert engine.fuse(chunks, QUESTION, method=Reuse()).report.fresh_by_layer == [0] * 4
    assert engine.fuse(chunks, QUESTION, method=LegoLink(k=8)).report.fresh_by_layer == [16] * 4
    report = engine.fuse(chunks, QUESTION, method=CacheBlend(ratio=0.2)).report
    assert report.fresh_by_layer == [153, 153, 31, 31]
    assert report.budget == pytest.approx((153 * 2 + 31 * 2) / (4 * 153))
    gradual = engine.fuse(chunks, QUESTION, method=CacheBlend(gradual=(0.4, 0.2))).report
    assert gradual.fresh_by_layer == [153, 153, 61, 31]
    assert engine.fuse(chunks, QUESTION, method=FullPrefill()).report.budget == 1
    assert set(report.milliseconds) == {"read", "place", "select", "compute", "total"}


def test_time_to_first_token_counts_every_stage(monkeypatch):
    """By a clock that only work moves: 1 s a forward, 100 s a layer placed, 10,000 s a choice."""
    now, model = [0.0], tiny_model("llama")

    def costing(seconds, function):
        def timed(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return timed

    for module in ("generating", "answering", "fusion.timing"):
        monkeypatch.setattr(f"ragkv.{module}.perf_counter", lambda: now[0])
    placed = Placement._place_chunks
    monkeypatch.setattr(
        Placement,
        "_place_chunks",
        lambda self, layers, *slots: costing(100 * len(layers), placed)(self, layers, *slots),
    )
    for kind, choice in ((CacheBlend, "narrow"), (SensitiveTokens, "select"), (QuestionAware, "select")):
        monkeypatch.setattr(kind, choice, costing(10_000, getattr(kind, choice)))
    model.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 1))
    engine = Engine(model, template=TEMPLATE)
    chunks = engine.add_document([random_ids(20), random_ids(30)]) + engine.add_document([random_ids(25)])
    for method, place, select in (
        (Reuse(), 400, 0),
        (CacheBlend(ratio=0.2, check_layer=2), 200, 10_000),  # the two layers in front are computed whole
        (SensitiveTokens(ratio=0.2), 400, 10_000),
        (QuestionAware(ratio=0.2), 400, 10_000),
        (FullPrefill(), 0, 0),
    ):
        begin = now[0]
        report = engine.generate(chunks, QUESTION, method=method, max_new_tokens=1).report
        stages = report.fusion.milliseconds
        wanted = {"read": 0, "place": place, "select": select, "compute": 1, "total": place + select + 1}
        assert {name: ms / 1e3 for name, ms in stages.items()} == wanted, method
        assert report.first_token_ms == stages["total"] == (now[0] - begin) * 1e3


def test_cacheblend_keeps_what_deviates_most(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    for signal in ("key", "value", "both"):
        prompt = engine.fuse(chunks, QUESTION, method=CacheBlend(ratio=0.2, signal=signal))
        kept = prompt.recomputed[:-6].tolist()
        assert len(kept) == round(0.2 * 92)
        # the first chunk stands where it was made: whatever deviates is in the second
        assert min(kept) >= 3 + 41
    everything = engine.fuse(chunks, QUESTION, method=CacheBlend(threshold=0.0))
    some = engine.fuse(chunks, QUESTION, method=CacheBlend(threshold=2.0))
    assert len(some.recomputed) < len(everything.recomputed)


def test_layer_by_layer_and_chunk_by_chunk_place_the_same(shared_model, tmp_path, monkeypatch):
    """Accelerators load by layer, the CPU by chunk: the bytes are the same, also where a check begins in the middle."""
    from ragkv.fusion import placement

    with Engine(shared_model, template=TEMPLATE, store=TieredStore(tmp_path / "kv", cpu_bytes=0)) as engine:
        chunks = engine.add([random_ids(20), random_ids(31), random_ids(7)])[::-1]
        init = placement.Placement.__init__
        for method in (Reuse(), LegoLink(k=4), CacheBlend(ratio=0.3, check_layer=2)):
            one = engine.fuse(chunks, QUESTION, method=method)
            with monkeypatch.context() as patch:
                patch.setattr(placement.Placement, "__init__", lambda *a, **more: init(*a, **more, by_layer=True))
                two = engine.fuse(chunks, QUESTION, method=method)
            assert torch.equal(one.logits, two.logits)
            for a, b in zip(one.past_key_values.layers, two.past_key_values.layers, strict=True):
                assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            assert one.report.hits == two.report.hits == {"disk": 3}
            assert one.report.bytes_read == two.report.bytes_read > 0
