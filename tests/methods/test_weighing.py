"""Auto by measured figures: what is slow to load is computed, and what loading leaves time for is repaired."""

import re
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from ragkv import (
    Auto,
    CacheBlend,
    CacheCraft,
    Engine,
    LegoLink,
    PromptTemplate,
    RelevantTokens,
    Reuse,
    SensitiveTokens,
    TieredStore,
    Union,
)
from ragkv.fusing import to_load
from ragkv.fusion.layout import lay_out
from ragkv.fusion.placement import Placement
from ragkv.fusion.view import Selection
from ragkv.library.documents import Documents
from ragkv.library.reading import Reader
from ragkv.library.watching import prefetched
from ragkv.store import CostProfile, Loading, Moved, Rates
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(9)
#: A millisecond a token, and half of one more behind a thousand others.
COSTS = CostProfile((0, 1000), (0, 1000), ((0.0, 1.0), (0.0, 1.5)))
DOCUMENTS = [[random_ids(40, seed=10 * number + part) for part in range(3)] for number in range(3)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """KV on disk, of three documents."""
    path = tmp_path_factory.mktemp("kv")
    with open_engine(model, path) as engine:
        for parts in DOCUMENTS:
            engine.add_document(parts)
    return path


def open_engine(model, path, cpu_bytes=0):
    return Engine(model, template=TEMPLATE, store=TieredStore(path, cpu_bytes=cpu_bytes), method="auto")


@pytest.fixture
def engine(model, folder):
    """Whatever was read before lies on disk, and nothing in memory."""
    with open_engine(model, folder, cpu_bytes=1 << 30) as opened:
        yield opened


def chunks_of(engine):
    """The documents' chunks, each document in order: some are to be repaired."""
    return [chunk for parts in DOCUMENTS for chunk in engine.documents.cut(parts)]


def rates(engine, beside=False, **seconds):
    """Figures by which a token of a tier takes so many seconds to load."""
    size = token_bytes(engine)
    return Rates(COSTS, {tier: Loading(size / s, size) for tier, s in seconds.items()}, beside=beside)


def token_bytes(engine):
    return sum(spec.heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in engine.decoder.specs)


def took_s(engine, prompt, figures):
    """What a prompt takes on a device of these figures: of what it has really loaded and computed."""
    loaded = {}
    for chunk in prompt.report.chunks:
        if chunk.source in figures.tiers:
            loaded[chunk.source] = loaded.get(chunk.source, 0) + chunk.tokens
    assert prompt.report.bytes_read == loaded.get("disk", 0) * token_bytes(engine), "it loads what it says, and no more"
    rows = len(prompt.recomputed)
    return figures.prompt_s(loaded, figures.compute_s(rows, prompt.input_ids.shape[1] - rows))


def said_ms(prompt):
    """What a report says that a prompt takes, and a full prefill of it."""
    return [
        float(said) for said in re.search(r"takes ([\d.]+) ms; a full prefill ([\d.]+) ms", prompt.report.why).groups()
    ]


@pytest.mark.parametrize("beside", [False, True], ids=["one after the other", "side by side"])
def test_never_far_from_the_better_of_loading_and_computing(model, folder, beside):
    picked = set()
    with open_engine(model, folder) as engine:
        chunks = chunks_of(engine)
        for exponent in range(-8, 1):
            figures = rates(engine, beside, disk=3 * 10**exponent / 10)
            loading, computing, chosen = (
                engine.fuse(chunks, QUESTION, method=method)
                for method in (SensitiveTokens(), "full-prefill", Auto(rates=figures))
            )
            load_s, full_s, own_s = (took_s(engine, prompt, figures) for prompt in (loading, computing, chosen))
            assert own_s <= 1.15 * min(load_s, full_s) and own_s <= 1.1 * full_s, (exponent, own_s, load_s, full_s)
            picked.add(chosen.report.method.split("(")[0])
    assert picked == {"SensitiveTokens", "FullPrefill"}


def test_the_report_says_why(engine):
    chunks = chunks_of(engine)
    fast = engine.fuse(chunks, QUESTION, method=Auto(rates=rates(engine, disk=1e-6))).report
    assert fast.method == repr(SensitiveTokens()) and fast.hits == {"disk": 9}
    assert fast.why.startswith("369 tokens from disk are loaded in 0.4 ms, the prompt takes ")
    assert fast.as_dict()["why"] == fast.why
    again = engine.fuse(chunks, QUESTION, method=Auto(rates=rates(engine, cpu=1, disk=1e-6))).report
    assert again.method == "FullPrefill()" and "369 tokens from cpu are loaded in 369.00 s" in again.why
    assert engine.fuse(chunks, QUESTION, method=SensitiveTokens()).report.why == ""


def test_the_look_of_a_repair_is_reckoned_with(engine):
    chunks, figures = chunks_of(engine), rates(engine, cpu=1e-6, disk=1e-6)
    plain, looking = (
        engine.fuse(chunks, QUESTION, method=Auto(repair, figures)).report
        for repair in (SensitiveTokens(), RelevantTokens())
    )
    look_s = figures.compute_s(plain.suffix_tokens, plain.prefix_tokens + plain.chunk_tokens)
    assert look_s > 0 and looking.looked and not plain.looked
    assert looking.reckoned["loaded"] - plain.reckoned["loaded"] == pytest.approx(look_s * 1e3)


def test_both_reasons_are_given():
    class Hidden(RelevantTokens):
        def select(self, view):
            return replace(Selection.of(super().select(view), self), why="so it is")

    with Engine(tiny_model(), template=PromptTemplate(prefix=[1, 5, 6])) as engine:
        chunks = engine.add([random_ids(40), random_ids(41)])
        figures = rates(engine, cpu=1e-7)
        why = engine.fuse(chunks, QUESTION, method=Auto(Hidden(), figures)).report.why
    assert "are loaded in" in why and why.endswith("; so it is")


def test_what_a_path_settles_is_loaded_and_never_computed(model, folder):
    """The first document stands where it was read, on a slow disk."""
    figures = {"cpu": 1e-6, "disk": 1e-2}
    for paths, source in ((False, "unused"), (1 << 28, "disk")):
        store = TieredStore(folder, cpu_bytes=1 << 30)
        with Engine(model, template=TEMPLATE, store=store, paths=paths) as engine:
            chunks = chunks_of(engine)
            engine.store.prefetch([engine.documents.key(chunk) for chunk in chunks[3:6]]).result()
            prompt = engine.fuse(chunks, QUESTION, method=Auto(LegoLink(4), rates(engine, **figures)))
            assert prompt.report.sources[:3] == [source] * 3
            assert (3 in prompt.recomputed) is not bool(paths)


@dataclass(frozen=True)
class Narrowing(LegoLink):
    """Goes on with the last token alone."""

    def select(self, view):
        return replace(super().select(view), checks=[1])

    def narrow(self, check):
        return check.tokens[-1:]


@pytest.mark.parametrize("repair", [CacheBlend(0.2), CacheCraft(0.3), LegoLink(4), RelevantTokens(0.2), Reuse()])
def test_what_a_prompt_would_load_is_known_before_its_turn(engine, monkeypatch, repair):
    """Who waits has its chunks moved to memory; which these are is reckoned without the model."""
    monkeypatch.setattr(Reader, "changes", None)
    chunks, prefix = chunks_of(engine), engine.encoder.prefix
    layout = lay_out(prefix, prefix, chunks, QUESTION, torch.device("cpu"))
    keys = [engine.documents.key(chunk) for chunk in chunks]
    assert to_load(engine.documents, layout, Auto(repair, rates(engine, disk=1e-7))) == keys
    assert to_load(engine.documents, layout, Auto(repair, rates(engine, disk=1.0))) == []
    monkeypatch.setattr(Documents, "reader", None)  # it may have to be made first, which runs the model
    assert to_load(engine.documents, layout, repair) == keys


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize(
    "repair", [SensitiveTokens(0.3), LegoLink(4), Union(LegoLink(4), SensitiveTokens()), Narrowing(4)]
)
def test_what_is_slow_to_load_is_computed_and_not_loaded(engine, monkeypatch, repair, by_layer):
    """Chunks in memory are taken, those on a slow disk computed whole: what comes out is as if they had been loaded too."""
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=by_layer))
    chunks = chunks_of(engine)
    chunks.append(chunks[1])
    first = [engine.documents.key(chunk) for chunk in chunks[3:6]]
    engine.store.prefetch(first).result()
    assert set(engine.store.where(first).values()) == {"cpu"}
    method = Auto(repair, rates(engine, cpu=1e-7, disk=1.0))
    prompt = engine.fuse(chunks, QUESTION, method=method)
    assert (
        prompt.report.method == f"{repair!r}, and all from disk" and "; computing all from disk 3" in prompt.report.why
    )
    assert prompt.report.sources == ["unused"] * 3 + ["cpu"] * 3 + ["unused"] * 4
    assert prompt.report.bytes_read == 0
    computed = set(prompt.recomputed.tolist())
    assert len(computed) == len(prompt.recomputed), "what both choose is computed once"
    assert set(range(3, 3 + 123)) <= computed and not set(range(126, 249)) <= computed
    if repair == SensitiveTokens(0.3):
        assert len(computed & set(range(126, 249))) == round(0.3 * 123), "its share is of what is loaded"
    monkeypatch.setattr(Placement, "spare", lambda *_: None)
    monkeypatch.setattr("ragkv.fusing.Fusing.open", lambda self, without, *_: setattr(self, "spared", without))
    loaded = engine.fuse(chunks, QUESTION, method=method)
    assert loaded.report.bytes_read > 0
    assert torch.equal(loaded.recomputed, prompt.recomputed) and torch.equal(loaded.logits, prompt.logits)


def test_a_chunk_that_a_method_computes_whole_is_not_loaded(engine):
    chunks = chunks_of(engine)[::-1]
    want = engine.fuse(chunks, QUESTION, method="full-prefill").logits
    prompt = engine.fuse(chunks[:1] + chunks, QUESTION, method=LegoLink(1000))
    assert prompt.report.bytes_read == 0 and set(prompt.report.sources) == {"unused"}
    some = engine.fuse(chunks, QUESTION, method=Union(LegoLink(1000), Reuse()))
    assert torch.allclose(some.logits, want, atol=1e-4)


class Looks(Reuse):
    """Looks at all that is stored, and computes the first chunk."""

    def select(self, view):
        view.attention("all")
        return view.layout.span(view.layout.chunks[0])


@pytest.mark.parametrize("by_layer", [False, True])
def test_a_chunk_that_was_looked_at_was_loaded(engine, monkeypatch, by_layer):
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=by_layer))
    assert engine.fuse(chunks_of(engine)[::-1], QUESTION, method=Looks()).report.sources == ["disk"] * 9


def test_what_loading_leaves_time_for_is_repaired(model, folder):
    """Side by side only: else every token more takes time."""
    with open_engine(model, folder) as engine:
        chunks = chunks_of(engine)
        method = partial(Auto, rates=rates(engine, beside=True, disk=0.4e-3))
        prompt = engine.fuse(chunks, QUESTION, method=method())
        ratio = float(re.search(r"ratio=([\d.]+)", prompt.report.method)[1])
        load_s = sum(chunk.tokens for chunk in prompt.report.chunks if chunk.source == "disk") * 0.4e-3
        assert 0.1 < ratio < 0.5
        assert 0.9 * load_s < COSTS(cached=381 - len(prompt.recomputed), new=len(prompt.recomputed)) <= load_s
        slower = Auto(CacheBlend(0.02, check_layer=1), rates(engine, beside=True, disk=0.7e-3))
        blend = engine.fuse(chunks[::-1], QUESTION, method=slower).report
        assert float(blend.method.split("ratio=")[1].split(",")[0]) > 0.02
        fixed = engine.fuse(chunks[::-1], QUESTION, method=method(LegoLink(2))).report
        assert fixed.method == "LegoLink(k=2), and 2 of 9 from disk", "what has no ratio computes chunks meanwhile"
        after = Auto(rates=rates(engine, beside=False, disk=0.4e-3))
        assert engine.fuse(chunks, QUESTION, method=after).report.method == repr(SensitiveTokens())


def test_computing_has_to_save_a_twentieth_of_the_time(model, folder):
    with open_engine(model, folder) as engine:
        chunks = chunks_of(engine)
        computed_ms, full_ms = said_ms(engine.fuse(chunks, QUESTION, method=Auto(rates=rates(engine, disk=1e-12))))
        for dearer, picked in ((1.04, repr(SensitiveTokens())), (1.07, "FullPrefill()")):
            method = Auto(rates=rates(engine, disk=(dearer * full_ms - computed_ms) / 369e3))
            assert engine.fuse(chunks, QUESTION, method=method).report.method == picked


def test_what_has_to_be_read_first_counts_as_computed(engine):
    chunks = [*chunks_of(engine), *engine.documents.cut([random_ids(40, seed=900 + part) for part in range(3)])]
    prompt = engine.fuse(chunks, QUESTION, method=Auto(rates=rates(engine, disk=1e-6)))
    assert prompt.report.why.startswith("369 tokens from disk") and 123 < said_ms(prompt)[0] < 250


def test_a_repair_that_looks_loads_all_or_nothing(engine):
    chunks = chunks_of(engine)
    engine.store.prefetch([engine.documents.key(chunk) for chunk in chunks[:8]]).result()
    figures = rates(engine, cpu=1e-7, disk=1.0)
    report = engine.fuse(chunks, QUESTION, method=Auto(CacheBlend(0.1, check_layer=1), figures)).report
    assert report.method == "FullPrefill()" and report.bytes_read == 0


def test_as_before_where_nothing_was_measured(engine, monkeypatch):
    """And a question measures nothing, nor asks where chunks lie."""
    monkeypatch.setattr("ragkv.library.costs.measure", None)
    monkeypatch.setattr("ragkv.library.rates.measure_loading", None)
    monkeypatch.setattr(engine.store, "where", None)
    report = engine.fuse(chunks_of(engine), QUESTION).report
    assert report.method == repr(SensitiveTokens()) and report.why == ""


def test_as_before_where_a_tier_was_not_measured(engine):
    report = engine.fuse(chunks_of(engine), QUESTION, method=Auto(rates=rates(engine, cpu=1e-7))).report
    assert report.method == repr(SensitiveTokens()) and report.why == ""


def test_what_is_moved_for_this_question_counts_where_it_was(engine):
    """However far the store's thread has come with it: the choice does not hang on what else the machine does."""
    chunks, method = chunks_of(engine), Auto(rates=rates(engine, cpu=1e-7, disk=1.0))
    keys, moved = list(engine.documents.keys(chunks)), {}
    engine.store.prefetch(keys, moved).result()
    assert set(engine.store.where(keys).values()) == {"cpu"}
    with prefetched(moved):
        assert engine.fuse(chunks, QUESTION, method=method).report.method == "FullPrefill()"
    assert engine.fuse(chunks, QUESTION, method=method).report.method == repr(SensitiveTokens())
    assert all(isinstance(was, Moved) for was in moved.values())
