"""What a document is: windows and contexts, its record, and chunks that an application keeps."""

import json

import pytest
import torch

from ragkv import Auto, Chunk, DocumentError, Engine, PromptError, PromptTemplate, Reuse, TieredStore
from ragkv.errors import RecordError
from ragkv.fusion.layout import lay_out
from ragkv.library.document import ChunkedDocument, windows
from ragkv.library.records import StoreRecords
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(6)
PARTS = [random_ids(15, seed=number) for number in range(12)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def long():
    return ChunkedDocument("a document", [tuple(part) for part in PARTS], windows([15] * 12, 64), {5: "repaired"})


def facts(chunk):
    return chunk.ids, chunk.document, chunk.number, chunk.offset, chunk.context, chunk.mark


def test_a_record_whose_bytes_changed_is_none(long):
    with TieredStore() as store:
        kept = StoreRecords(store, "setting")
        kept.put(long)
        assert list(map(facts, kept.find(long.id))) == list(map(facts, long))
        data = bytearray(store.meta_get(kept.name(long.id)))
        at = data.index(torch.tensor(PARTS[3][:4], dtype=torch.int32).numpy().tobytes())
        data[at] ^= 1  # another token, and still a document
        assert ChunkedDocument.from_bytes(bytes(data[16:]))[3].ids != long[3].ids
        store.meta_put(kept.name(long.id), bytes(data))
        assert kept.find(long.id) is None


def test_its_record_holds_all_of_it(long):
    again = ChunkedDocument.from_bytes(long.to_bytes())
    assert list(map(facts, again)) == list(map(facts, long))
    for chunk, other in zip(again, long, strict=True):
        assert list(map(facts, chunk.lineage())) == list(map(facts, other.lineage()))
        assert facts(chunk.lineage()[-1]) == facts(chunk)
        assert sum(map(len, chunk.lineage()[:-1])) == chunk.offset


def test_each_chunk_of_a_lineage_knows_its_own(long):
    chain = long.lineage(11)
    assert [chunk.number for chunk in chain] == [9, 10, 11]
    for length, chunk in enumerate(chain, 1):
        assert list(map(facts, chunk.lineage())) == list(map(facts, chain[:length]))


def test_a_damaged_record_is_refused(long):
    data = long.to_bytes()
    with pytest.raises(RecordError, match="this version reads 'ragkv document 1'"):
        ChunkedDocument.from_bytes(data.replace(b"ragkv document 1", b"ragkv document 7"))
    for wrong in (b"", data[:-8], data[:40], b"x" * 100, data.replace(b"firsts", b"fastsx")):
        with pytest.raises(RecordError, match="damaged"):
            ChunkedDocument.from_bytes(wrong)


def test_a_chunk_goes_through_json(long):
    for chunk in long:
        again = Chunk.from_dict(json.loads(json.dumps(chunk.to_dict())))
        assert facts(again) == facts(chunk) and again.to_dict() == chunk.to_dict()
        assert (again.lineage() is None) == bool(chunk.offset)


@pytest.mark.parametrize(
    "change",
    [
        {"ids": []},
        {"ids": "text"},
        {"ids": [1.5]},
        {"ids": [True]},
        {"ids": [-1]},
        {"offset": -3},
        {"context": "zz"},
        {"context": ""},
        {"number": None},
        {"span": [1]},
        {"metadata": 3},
    ],
)
def test_what_is_no_chunk_is_refused(long, change):
    with pytest.raises(PromptError, match="a chunk"):
        Chunk.from_dict({**long[2].to_dict(), **change})
    with pytest.raises(PromptError, match="KeyError"):
        Chunk.from_dict({})


def test_an_application_keeps_chunks(model, tmp_path):
    """Handed back in another process they are found, and read again in their context where their KV are lost."""
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        chunks = engine.add_document(PARTS[:4])
        kept = json.dumps([chunk.to_dict() for chunk in chunks[2:]])
        want = engine.fuse(chunks[2:], QUESTION)
    with Engine(model, template=TEMPLATE, method=Reuse(), store=TieredStore(tmp_path)) as engine:
        again = [Chunk.from_dict(fields) for fields in json.loads(kept)]
        for lost in (False, True, False):
            if lost:
                engine.store.remove_many(engine.documents.keys(again))
            got = engine.fuse(again, QUESTION)
            assert ("computed" in got.report.hits) == lost
            torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
        engine.forget(again)
        with pytest.raises(DocumentError, match=r"chunk \d of document .* add the document again"):
            engine.fuse(again, QUESTION)


def test_a_document_is_told_by_its_id(model):
    """Not by its first chunk: two documents begin alike, and one of several windows is one."""
    engine = Engine(model, template=TEMPLATE, document_tokens=64)
    header = random_ids(9)
    one, two = engine.add_document([header, PARTS[0]]), engine.add_document([header, PARTS[1]])
    assert one[0].document != two[0].document
    prompt = [*one, *two]
    layout = lay_out([1, 5, 6], [1, 5, 6], prompt, QUESTION, torch.device("cpu"))
    assert [placed.behind_another for placed in layout.chunks] == [False, False, True, True]
    assert "Reuse" not in engine.fuse(prompt, QUESTION, method=Auto()).report.method
    long = engine.add_document(PARTS)
    layout = lay_out([1, 5, 6], [1, 5, 6], long, QUESTION, torch.device("cpu"))
    assert len({chunk.offset for chunk in long}) < len(long)
    assert not any(placed.behind_another for placed in layout.chunks)
    assert [placed.continues for placed in layout.chunks] == [False] + [True] * 11
    assert all(placed.rooted for placed in layout.chunks), "each one's context stands right in front of it"
    apart = lay_out([1, 5, 6], [1, 5, 6], [long[4], long[6], long[7]], QUESTION, torch.device("cpu"))
    assert [placed.rooted for placed in apart.chunks] == [False, False, True]
    assert "Reuse" in engine.fuse(long, QUESTION, method=Auto()).report.method
