"""Reading: what is read when, in which context, and what an edit costs."""

import copy

import torch
from transformers import DynamicCache

from ragkv import Engine, LegoLink, Reuse
from ragkv.library.document import ChunkedDocument, windows
from ragkv.testing import as_cache, random_ids

from .conftest import QUESTION, TEMPLATE, full


def test_each_chunk_is_read_once(engine, reads):
    seen = reads(engine)
    first = engine.add([random_ids(20), random_ids(30)])
    assert sum(seen) == 21 + 31
    again = engine.add([random_ids(30), random_ids(20)])
    assert sum(seen) == 21 + 31
    assert [chunk.id for chunk in again] == [first[1].id, first[0].id]


def test_a_document_is_read_as_a_whole_in_pieces(shared_model, reads):
    engine = Engine(shared_model, template=TEMPLATE, method=Reuse(), piece_tokens=16)
    seen = reads(engine)
    document = engine.add_document([random_ids(n) for n in (12, 40, 3, 3, 3)])
    assert sum(seen) == sum(len(chunk) for chunk in document)
    assert max(seen) <= 16
    prompt = engine.fuse(document, QUESTION, method=Reuse())
    assert float((prompt.logits - full(shared_model, prompt.input_ids)).abs().max()) < 1e-4


def test_a_changed_document_is_read_from_the_change_on(engine, reads):
    parts = [random_ids(n) for n in (12, 40, 13, 14)]
    engine.add_document(parts)
    seen = reads(engine)
    changed = engine.add_document([*parts[:2], random_ids(9), parts[3]])
    assert sum(seen) == 10 + 15
    prompt = engine.fuse(changed, QUESTION, method=Reuse())
    assert float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max()) < 1e-4


def test_context_is_part_of_the_key(engine):
    document = engine.add_document([random_ids(12), random_ids(20)])
    alone = engine.add([random_ids(20)])[0]
    assert document[1].ids == alone.ids and document[1].id == alone.id
    assert engine.documents.key(document[1]) != engine.documents.key(alone)
    chunkwise = Engine(engine.model, template=TEMPLATE, method=Reuse(), context="chunk")
    parts = chunkwise.add_document([random_ids(12), random_ids(20)])
    assert chunkwise.documents.key(parts[1]) == engine.documents.key(alone)


def test_a_chunk_of_a_document_is_what_the_whole_pass_computed(engine):
    """Wherever its neighbours are: the KV of a chunk read in its document is a slice of the pass over the document."""
    document = engine.add_document([random_ids(12), random_ids(20), random_ids(15)])
    ids = torch.tensor([[1, 5, 6, *(i for chunk in document for i in chunk.ids)]])
    cache = DynamicCache()
    with torch.no_grad():
        engine.model(input_ids=ids, **as_cache(cache))
    kv = engine.store.get(engine.documents.key(document[2]))
    assert kv.base == 3 + 13 + 21
    for layer, (keys, values) in zip(cache.layers, kv, strict=True):
        torch.testing.assert_close(keys, layer.keys[0, :, kv.base : kv.base + 16], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, layer.values[0, :, kv.base : kv.base + 16], atol=1e-5, rtol=1e-4)


def test_a_document_is_read_by_one_model(shared_model):
    """Weights that change between two pieces: it is read anew, and nothing of the new model's is kept as the old one's."""
    model = copy.deepcopy(shared_model)
    engine = Engine(model, template=TEMPLATE, piece_tokens=16)

    def changes(*_):
        hook.remove()
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(-1)

    hook = model.model.register_forward_hook(changes)
    document = engine.add_document([random_ids(n) for n in (12, 14, 13)])
    other = Engine(copy.deepcopy(model), template=TEMPLATE, piece_tokens=16)
    for chunk, want in zip(document, other.add_document([random_ids(n) for n in (12, 14, 13)]), strict=True):
        got = engine.store.get(engine.documents.key(chunk))
        torch.testing.assert_close(got.values, other.store.get(other.documents.key(want)).values)


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
    assert engine.documents.key(behind[1]) == engine.documents.key(chunks[4])


def test_windows_never_exceed_and_always_advance():
    for lengths in ([64] * 5, [1] * 200, [60, 3, 3, 60, 64, 1], [40, 40, 40]):
        ids = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
        chunks = list(ChunkedDocument("", ids, windows(lengths, 64)))
        assert all(chunk.offset + len(chunk) <= 64 for chunk in chunks)


def test_repair_with_everything_behind_is_exact(engine, reads, monkeypatch):
    parts = [random_ids(n) for n in (12, 20, 15, 18)]
    old = engine.add_document(parts)
    for changed in (
        [parts[0], random_ids(9), parts[2], parts[3]],
        [parts[0], parts[2], parts[3]],
        [parts[0], parts[1], random_ids(7), parts[2], parts[3]],
        [random_ids(5), *parts],
    ):
        seen = reads(engine)
        repaired = engine.repair_document(old, changed, behind_tokens=1000)
        assert not seen and engine.documents.missing(repaired) == []
        exact = list(engine.documents.cut(changed))
        first = next(i for i, (a, b) in enumerate(zip(repaired, exact, strict=True)) if a.context != b.context)
        assert [engine.documents.key(c) for c in repaired[:first]] == [engine.documents.key(c) for c in exact[:first]]
        prompt = engine.fuse(repaired, QUESTION, method=Reuse())
        assert float((prompt.logits - full(engine.model, prompt.input_ids)).abs().max()) < 1e-4
        assert all(chunk.ids == want.ids for chunk, want in zip(repaired, exact, strict=True))
        monkeypatch.undo()


def test_repair_computes_little_and_says_so(engine, monkeypatch):
    parts = [random_ids(n) for n in (12, 20, 15, 40)]
    old = engine.add_document(parts)
    rows, step = [], engine.decoder.step
    monkeypatch.setattr(
        engine.decoder, "step", lambda ids, *rest, **more: (rows.append(len(ids)), step(ids, *rest, **more))[1]
    )
    repaired = engine.repair_document(old, [parts[0], random_ids(9), parts[2], parts[3]], behind_tokens=24)
    assert rows == [10 + 24]
    monkeypatch.undo()
    assert repaired[1].mark and engine.fuse(repaired, QUESTION, method=LegoLink(k=1)).report.budget > 0
    # an unrepaired copy of the same document is another variant, and exact
    exact = engine.add_document([parts[0], random_ids(9), parts[2], parts[3]])
    assert engine.documents.key(exact[3]) != engine.documents.key(repaired[3])
    # lost KV: read again; several windows, or nothing left of the old text: read as ever
    engine.store.remove(engine.documents.key(old[2]))
    again = engine.repair_document(old, [parts[0], random_ids(8), parts[2], parts[3]])
    assert not any(chunk.mark for chunk in again) and engine.documents.missing(again) == []
    assert not any(chunk.mark for chunk in engine.repair_document(old, [random_ids(30), random_ids(31)]))
