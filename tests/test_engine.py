"""The engine: what is read when, what bad input does, what is stored, and how answers are decoded."""

import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from ragkv import (
    CacheBlend,
    Chunk,
    Engine,
    FullPrefill,
    LegoLink,
    Method,
    MethodError,
    PromptError,
    PromptTemplate,
    PromptTooLongError,
    Reuse,
    StoreFullError,
    TieredStore,
)
from ragkv.cache import FusedCache
from ragkv.reading import with_window
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)


@pytest.fixture(scope="module")
def shared_model():
    return tiny_model()


@pytest.fixture
def engine(shared_model):
    return Engine(shared_model, template=TEMPLATE, method=Reuse())


def reads(engine, monkeypatch):
    """A list that grows by the number of tokens of every forward pass that reads documents."""
    seen, read = [], engine.decoder.read
    monkeypatch.setattr(engine.decoder, "read", lambda ids, *rest: (seen.append(len(ids)), read(ids, *rest))[1])
    return seen


def full(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=DynamicCache()).logits[:, -1]


def test_each_chunk_is_read_once(engine, monkeypatch):
    seen = reads(engine, monkeypatch)
    first = engine.add([random_ids(20), random_ids(30)])
    assert sum(seen) == 21 + 31
    again = engine.add([random_ids(30), random_ids(20)])
    assert sum(seen) == 21 + 31
    assert [chunk.id for chunk in again] == [first[1].id, first[0].id]


def test_a_document_is_read_as_a_whole_in_pieces(shared_model, monkeypatch):
    engine = Engine(shared_model, template=TEMPLATE, method=Reuse(), piece_tokens=16)
    seen = reads(engine, monkeypatch)
    document = engine.add_document([random_ids(n) for n in (12, 40, 3, 3, 3)])
    assert sum(seen) == sum(len(chunk) for chunk in document)
    assert max(seen) <= 16
    prompt = engine.fuse(document, QUESTION, method=Reuse())
    assert float((prompt.logits - full(shared_model, prompt.input_ids)).abs().max()) < 1e-4


def test_a_changed_document_is_read_from_the_change_on(engine, monkeypatch):
    parts = [random_ids(n) for n in (12, 40, 13, 14)]
    engine.add_document(parts)
    seen = reads(engine, monkeypatch)
    changed = engine.add_document([*parts[:2], random_ids(9), parts[3]])
    assert sum(seen) == 10 + 15
    prompt = engine.fuse(changed, QUESTION, method=Reuse())
    assert float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max()) < 1e-4


def test_context_is_part_of_the_key(engine):
    document = engine.add_document([random_ids(12), random_ids(20)])
    alone = engine.add([random_ids(20)])[0]
    assert document[1].ids == alone.ids and document[1].id == alone.id
    assert engine.chunk_key(document[1]) != engine.chunk_key(alone)
    chunkwise = Engine(engine.model, template=TEMPLATE, method=Reuse(), context="chunk")
    parts = chunkwise.add_document([random_ids(12), random_ids(20)])
    assert chunkwise.chunk_key(parts[1]) == engine.chunk_key(alone)


def test_a_chunk_of_a_document_is_what_the_whole_pass_computed(engine):
    """Wherever its neighbours are: the KV of a chunk read in its document is a slice of the pass over the document."""
    document = engine.add_document([random_ids(12), random_ids(20), random_ids(15)])
    ids = torch.tensor([[1, 5, 6, *(i for chunk in document for i in chunk.ids)]])
    cache = DynamicCache()
    with torch.no_grad():
        engine.model(input_ids=ids, past_key_values=cache)
    kv = engine.store.get(engine.chunk_key(document[2]))
    assert kv.base == 3 + 13 + 21
    for layer, (keys, values) in zip(cache.layers, kv, strict=True):
        torch.testing.assert_close(keys, layer.keys[0, :, kv.base : kv.base + 16], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, layer.values[0, :, kv.base : kv.base + 16], atol=1e-5, rtol=1e-4)


def test_long_documents_are_read_in_windows(shared_model, monkeypatch):
    engine = Engine(shared_model, template=TEMPLATE, method=Reuse(), document_tokens=64)
    largest = []
    make = engine.decoder.cache
    monkeypatch.setattr(engine.decoder, "cache", lambda capacity: (largest.append(capacity), make(capacity))[1])
    chunks = engine.add_document([random_ids(15, seed=i) for i in range(12)])
    assert [chunk.offset for chunk in chunks] == [0, 16, 32, 48] + [16, 32, 48] * 2 + [16, 32]
    assert max(largest) <= 64 + 3
    assert all(chunk.offset + len(chunk) <= 64 for chunk in chunks)
    # the second window's first chunk was read behind the chunk before it
    behind = engine.add_document([random_ids(15, seed=3), random_ids(15, seed=4)])
    assert engine.chunk_key(behind[1]) == engine.chunk_key(chunks[4])


def test_windows_never_exceed_and_always_advance():
    for lengths in ([64] * 5, [1] * 200, [60, 3, 3, 60, 64, 1], [40, 40, 40]):
        chunks = with_window([Chunk(tuple(random_ids(n, seed=i))) for i, n in enumerate(lengths)], 64)
        assert [len(chunk) for chunk in chunks] == lengths
        assert all(chunk.offset + len(chunk) <= 64 for chunk in chunks)


def test_lost_chunks_are_read_again_in_their_context(engine):
    document = engine.add_document([random_ids(12), random_ids(20), random_ids(15)])
    chunks = [document[2], document[1]]
    want = engine.fuse(chunks, QUESTION)
    for lost in ([document[2]], [document[0], document[2]], document):
        for chunk in lost:
            engine.store.remove(engine.chunk_key(chunk))
        got = engine.fuse(chunks, QUESTION)
        assert got.report.hits.get("computed", 0) == sum(chunk in chunks for chunk in lost)
        torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    assert engine.fuse(chunks, QUESTION).report.hits == {"cpu": 2}


def test_a_record_that_breaks_its_promise_is_not_served(engine):
    chunk, other = engine.add([random_ids(20), random_ids(25)])
    want = engine.fuse([chunk], QUESTION)
    wrong = engine.store.get(engine.chunk_key(other))
    engine.store.remove(engine.chunk_key(chunk))
    engine.store.put(engine.chunk_key(chunk), wrong)
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
        ([[4, 128]], [4], "128 is out of the vocabulary"),
        ([[-1]], [4], "-1 is out of the vocabulary"),
        ([], [999], "999 is out of the vocabulary"),
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
        def start(self, layout):
            return layout.suffix

    class Growing(LegoLink):
        def checks(self, layers):
            return [1]

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


def test_greedy_answers_are_transformers_own(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    prompt = engine.fuse(chunks, QUESTION, method=FullPrefill())
    ids = prompt.input_ids
    want = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    answer = engine.generate(chunks, QUESTION, method=FullPrefill(), max_new_tokens=20, eos_token_id=None)
    assert answer.token_ids == want[0, ids.shape[1] :].tolist()
    assert answer.report.new_tokens == 20
    assert answer.text == ""


def test_decoding_grows_in_place_and_never_runs_the_prompt_again(engine, monkeypatch):
    chunks = engine.add([random_ids(40), random_ids(50)])
    sizes, run = [], engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda ids, *rest: (sizes.append(len(ids)), run(ids, *rest))[1])
    made = []
    make = engine.decoder.cache
    monkeypatch.setattr(engine.decoder, "cache", lambda capacity: made.append(make(capacity)) or made[-1])
    engine.generate(chunks, QUESTION, max_new_tokens=12, eos_token_id=None)
    assert sizes == [6] + [1] * 11
    assert made[0].layers[0].key_room.shape[2] == 3 + 92 + 6 + 12  # no room was added: nothing was copied


def test_the_cache_grows_beyond_its_room(engine):
    chunks = engine.add([random_ids(40)])
    prompt = engine.fuse(chunks, QUESTION, room_tokens=0)
    cache, ids = prompt.past_key_values, prompt.input_ids
    token = prompt.logits.argmax(-1, keepdim=True)
    with torch.no_grad():
        step = engine.model(input_ids=token, past_key_values=cache).logits[:, -1]
    want = full(engine.model, torch.cat([ids, token], dim=1))
    torch.testing.assert_close(step, want, atol=1e-4, rtol=1e-4)


def test_plain_generate_over_the_fused_cache(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    prompt = engine.fuse(chunks, QUESTION)
    first = prompt.logits.argmax(-1, keepdim=True)
    ids = torch.cat([prompt.input_ids, first], dim=1)
    out = engine.model.generate(
        ids,
        past_key_values=prompt.past_key_values,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    answer = engine.generate(chunks, QUESTION, max_new_tokens=10, eos_token_id=None)
    assert out[0, prompt.input_ids.shape[1] :].tolist() == answer.token_ids


def test_generation_arguments(engine):
    chunks = engine.add([random_ids(40)])
    greedy = engine.generate(chunks, QUESTION, max_new_tokens=8, eos_token_id=None).token_ids
    stopped = engine.generate(chunks, QUESTION, max_new_tokens=8, eos_token_id=greedy[3]).token_ids
    assert stopped == greedy[: greedy.index(greedy[3]) + 1]
    torch.manual_seed(0)
    one = engine.generate(chunks, QUESTION, max_new_tokens=8, do_sample=True, temperature=5.0, eos_token_id=None)
    torch.manual_seed(0)
    two = engine.generate(chunks, QUESTION, max_new_tokens=8, do_sample=True, temperature=5.0, eos_token_id=None)
    assert one.token_ids == two.token_ids != greedy
    never = engine.generate(
        chunks, QUESTION, max_new_tokens=8, eos_token_id=None, suppress_tokens=[greedy[0]], repetition_penalty=1.3
    )
    assert greedy[0] not in never.token_ids

    class Only7(LogitsProcessor):
        def __call__(self, input_ids, scores):
            out = torch.full_like(scores, -torch.inf)
            out[:, 7] = 0
            return out

    forced = engine.generate(
        chunks, QUESTION, max_new_tokens=3, eos_token_id=None, logits_processor=LogitsProcessorList([Only7()])
    )
    assert forced.token_ids == [7, 7, 7]
    with pytest.raises(TypeError, match="max_new_token"):
        engine.generate(chunks, QUESTION, max_new_token=3)
    with pytest.raises(ValueError, match="num_return_sequences"):
        engine.generate(chunks, QUESTION, num_return_sequences=2, do_sample=True)


def test_beams(engine):
    chunks = engine.add([random_ids(40), random_ids(50)])
    ids = engine.fuse(chunks, QUESTION, method=FullPrefill()).input_ids
    want = engine.model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    got = engine.generate(chunks, QUESTION, method=FullPrefill(), num_beams=3, max_new_tokens=6, eos_token_id=None)
    assert got.token_ids == want[0, ids.shape[1] :].tolist()


def test_several_threads(engine):
    chunks = engine.add([random_ids(n) for n in (20, 30, 40)])
    want = {i: engine.generate(chunks[i:], QUESTION, max_new_tokens=6).token_ids for i in range(3)}
    wrong = []

    def ask(i):
        for _ in range(5):
            method = LegoLink(k=4) if _ % 2 else Reuse()
            got = engine.generate(chunks[i:], QUESTION, max_new_tokens=6, method=method).token_ids
            if method == Reuse() and got != want[i]:
                wrong.append((i, got))

    threads = [threading.Thread(target=ask, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_beam_bookkeeping_of_the_cache(engine):
    cache: FusedCache = engine.decoder.cache(8)
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16))
    before = cache.layers[0].keys.clone()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(cache.layers[0].keys, before[:, :, :3].repeat(2, 1, 1, 1))
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    assert cache.layers[0].keys.shape == (1, 2, 0, 16)


def test_repair_with_everything_behind_is_exact(engine, monkeypatch):
    parts = [random_ids(n) for n in (12, 20, 15, 18)]
    old = engine.add_document(parts)
    for changed in (
        [parts[0], random_ids(9), parts[2], parts[3]],
        [parts[0], parts[2], parts[3]],
        [parts[0], parts[1], random_ids(7), parts[2], parts[3]],
        [random_ids(5), *parts],
    ):
        seen = reads(engine, monkeypatch)
        repaired = engine.repair_document(old, changed, behind_tokens=1000)
        assert not seen and engine.missing(repaired) == []
        exact = engine.cut_document(changed)
        first = next(i for i, (a, b) in enumerate(zip(repaired, exact, strict=True)) if a.context != b.context)
        assert [engine.chunk_key(c) for c in repaired[:first]] == [engine.chunk_key(c) for c in exact[:first]]
        prompt = engine.fuse(repaired, QUESTION, method=Reuse())
        assert float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max()) < 1e-4
        assert all(chunk.ids == want.ids for chunk, want in zip(repaired, exact, strict=True))
        monkeypatch.undo()


def test_repair_computes_little_and_says_so(engine, monkeypatch):
    parts = [random_ids(n) for n in (12, 20, 15, 40)]
    old = engine.add_document(parts)
    rows, step = [], engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
    repaired = engine.repair_document(old, [parts[0], random_ids(9), parts[2], parts[3]], behind_tokens=24)
    assert rows == [10 + 24]
    monkeypatch.undo()
    assert repaired[1].mark and engine.fuse(repaired, QUESTION, method=LegoLink(k=1)).report.budget > 0
    # an unrepaired copy of the same document is another variant, and exact
    exact = engine.add_document([parts[0], random_ids(9), parts[2], parts[3]])
    assert engine.chunk_key(exact[3]) != engine.chunk_key(repaired[3])
    # lost KV: read again; several windows, or nothing left of the old text: read as ever
    engine.store.remove(engine.chunk_key(old[2]))
    again = engine.repair_document(old, [parts[0], random_ids(8), parts[2], parts[3]])
    assert not any(chunk.mark for chunk in again) and engine.missing(again) == []
    assert not any(chunk.mark for chunk in engine.repair_document(old, [random_ids(30), random_ids(31)]))


def test_layer_by_layer_and_chunk_by_chunk_place_the_same(shared_model, tmp_path, monkeypatch):
    """Accelerators load by layer, the CPU by chunk: the bytes are the same, also where a check begins in the middle."""
    from ragkv import placement

    with Engine(shared_model, template=TEMPLATE, store=TieredStore(tmp_path / "kv", cpu_bytes=0)) as engine:
        chunks = engine.add([random_ids(20), random_ids(31), random_ids(7)])[::-1]
        init = placement.Placement.__init__
        for method in (Reuse(), LegoLink(k=4), CacheBlend(ratio=0.3, check_layer=2)):
            one = engine.fuse(chunks, QUESTION, method=method)
            with monkeypatch.context() as patch:
                patch.setattr(placement.Placement, "__init__", lambda *a: init(*a, by_layer=True))
                two = engine.fuse(chunks, QUESTION, method=method)
            assert torch.equal(one.logits, two.logits)
            for a, b in zip(one.past_key_values.layers, two.past_key_values.layers, strict=True):
                assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            assert one.report.hits == two.report.hits == {"disk": 3}
            assert one.report.bytes_read == two.report.bytes_read > 0
