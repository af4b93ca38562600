"""What chunks cost: measured once, kept in the store, and without a trace on the model."""

import pytest
import torch

from ragkv import Engine, PromptTemplate, TieredStore
from ragkv.errors import StoreFullError
from ragkv.library.costs import cost_profile, measure
from ragkv.library.reading import Reader
from ragkv.model.decoder import Decoder
from ragkv.store import CostProfile
from ragkv.store.maintenance import entries
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def measured(monkeypatch, unmeasured):
    """How often a profile was measured; the measured one says a millisecond a token, and a microsecond for each before it."""
    calls = []

    def pretend(decoder, most_tokens, limit_s):
        calls.append(most_tokens)
        return CostProfile((0, 100), (0, 100), tuple((0.0, 100 * (1e-3 + 1e-6 * cached)) for cached in (0, 100)))

    monkeypatch.setattr("ragkv.library.costs.measure", pretend)
    return calls


def costs(engine, chunks):
    return [engine.store._disk.row(engine.documents.key(chunk)).usage.cost_s for chunk in chunks]


def test_measured_once_for_a_folder(model, tmp_path, measured):
    for _ in range(2):
        with Engine(model, template=TEMPLATE, store=TieredStore(tmp_path, cpu_bytes=0)) as engine:
            assert engine.documents.missing(list(engine.documents.cut([random_ids(9, seed=1)]))) or len(measured) == 1
            chunks = engine.add_document([random_ids(20, seed=1), random_ids(30, seed=2)])
            first, second = costs(engine, chunks)
            assert first == pytest.approx(20 * (1e-3 + 3e-6))
            assert second == pytest.approx(30 * (1e-3 + 23e-6)), "behind the anchor and the first chunk"
    assert len(measured) == 1


def test_another_model_has_another_profile(model, tmp_path, measured):
    for each in (model, tiny_model(seed=1)):
        with Engine(each, template=TEMPLATE, store=TieredStore(tmp_path, cpu_bytes=0)) as engine:
            engine.add([random_ids(9)])
    assert len(measured) == 2


def test_what_a_process_measured_holds_for_its_other_stores(model, tmp_path, measured, facts):
    """They keep it, too. Not where documents that are read in shorter windows need fewer lengths."""
    with Engine(model, template=TEMPLATE) as engine:
        engine.add([random_ids(9)])
    for prefix in ([1, 5, 6], [1, 7]):
        path, template = tmp_path / f"kv{len(prefix)}", PromptTemplate(prefix=prefix)
        with Engine(model, template=template, store=TieredStore(path, cpu_bytes=0)) as engine:
            (chunk,) = engine.add([random_ids(20)])
            assert costs(engine, [chunk]) == [pytest.approx(20 * (1e-3 + len(prefix) * 1e-6))]
            assert [name for name in facts(engine.store) if name.startswith("prefill seconds:")]
    assert len(measured) == 1
    with Engine(model, template=TEMPLATE, document_tokens=100) as engine:
        engine.add([random_ids(9)])
    assert len(measured) == 2


def test_not_measured_where_nobody_asks(model, tmp_path, measured):
    """Neither for policies that do not look at costs, nor before something is read."""
    for policy in ("lru", "lfu", "gdsf"):
        with Engine(model, template=TEMPLATE, store=TieredStore(policy=policy)) as engine:
            engine.add([random_ids(9)])
    with Engine(model, template=TEMPLATE) as engine:
        engine.fuse([], random_ids(5))
    assert measured == []


def test_damaged_profile_is_measured_again(model, tmp_path, measured, monkeypatch, facts):
    reader = reader_of(model, "model")
    with TieredStore(tmp_path, cpu_bytes=0) as store:
        assert cost_profile(reader, store, 1000) is not None
        (name,) = [name for name in facts(store) if name.startswith("prefill seconds:")]
        store.meta_put(name, b"{}")
        monkeypatch.setattr("ragkv.library.costs._measured", {})  # another process
        profile = cost_profile(reader, store, 1000)
        assert profile == cost_profile(reader, store, 1000)
    assert len(measured) == 2
    with TieredStore(tmp_path, cpu_bytes=0, readonly=True) as store:
        assert cost_profile(reader_of(model, "another"), store, 1000) is not None
    assert len(measured) == 3


def reader_of(model, fingerprint=""):
    return Reader(Decoder(model), (), 512, fingerprint=fingerprint)


@pytest.mark.parametrize("most", [1, 7, 20, 300, 100_000])
def test_grid_fits_the_model(model, most):
    profile = measure(reader_of(model), most, 30.0)
    assert profile.cached[-1] + profile.new[-1] <= most or most == 1
    assert all(seconds > 0 for row in profile.seconds for seconds in row[1:])
    assert profile(0, 0) == 0 and profile(0, 50) > 0


@pytest.mark.parametrize(
    ("piece", "new"), [(512, (0, 16, 128, 512)), (300, (0, 16, 128)), (4096, (0, 16, 128, 512, 2048)), (9, (0, 9))]
)
def test_grid_reaches_to_what_one_forward_computes(model, monkeypatch, piece, new):
    """On a GPU 512 tokens take as long as 16: a line from there would say that any number does."""
    monkeypatch.setattr("ragkv.library.costs._prefill", lambda reader, cached, new: max(new, 512) * 1e-3)
    assert measure(Reader(Decoder(model), (), piece, fingerprint=""), 10_000, 60.0).new == new


def test_measurement_is_bounded(model, monkeypatch):
    """What would take too long is not begun: a slow model is asked for its two smallest cells only."""
    asked, clock, token_s = [], [0.0], 0.001

    def slow(decoder, cached, new):
        asked.append((cached, new))
        clock[0] += new * token_s
        return new * token_s

    monkeypatch.setattr("ragkv.library.costs._prefill", slow)
    monkeypatch.setattr("ragkv.library.costs.perf_counter", lambda: clock[0])
    assert measure(reader_of(model), 10_000, 2.0).new == (0, 16, 128)  # 512 take 2 s more
    asked.clear()
    token_s = 0.5
    profile = measure(reader_of(model), 10_000, 2.0)
    assert asked == [(0, 16)] * 3 + [(1024, 16)] * 2
    assert profile(0, 64) == pytest.approx(32.0), "it goes on along the line"


def test_no_trace(model):
    """Weights, hooks, attention, and the state of random numbers are as they were."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention, forward, chance = model.config._attn_implementation, model.forward, torch.get_rng_state()
    measure(reader_of(model), 500, 30.0)
    assert torch.equal(torch.get_rng_state(), chance)
    assert model.forward == forward and model.config._attn_implementation == attention
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_chunks_are_written_together(model, tmp_path, monkeypatch):
    with Engine(model, template=TEMPLATE, store=TieredStore(tmp_path, cpu_bytes=0)) as engine:
        calls, put_many = [], engine.store.put_many
        monkeypatch.setattr(
            engine.store, "put_many", lambda items, **o: (items and calls.append(len(items)), put_many(items, **o))[1]
        )
        chunks = engine.add_document([random_ids(20, seed=n) for n in range(6)])
        assert calls == [6]
        monkeypatch.setattr("ragkv.library.documents._WRITTEN_TOGETHER_BYTES", 1)
        more = engine.add([random_ids(20, seed=n) for n in range(10, 13)])
        assert calls == [6, 1, 1, 1]
        assert engine.documents.missing([*chunks, *more]) == []


def test_those_that_fit_are_stored(model, tmp_path):
    """One of several does not fit: what stands before it is stored all the same."""
    with Engine(model, template=TEMPLATE, store=TieredStore(tmp_path, cpu_bytes=0, disk_bytes=120_000)) as engine:
        parts = [random_ids(10, seed=1), random_ids(500, seed=2)]
        with pytest.raises(StoreFullError):
            engine.add(parts)
        assert [len(chunk) for chunk in engine.documents.missing(list(engine.documents.cut(parts[:1])))] == []


def test_documents_are_named_but_not_in_a_namespace(model, tmp_path):
    for namespace, label in (("", "a report"), ("tenant", "")):
        path = tmp_path / f"kv{namespace}"
        with Engine(model, template=TEMPLATE, store=TieredStore(path, cpu_bytes=0), namespace=namespace) as engine:
            engine.add_document([random_ids(9)], document_id="a report")
        assert [entry.label for entry in entries(path)] == [label]
