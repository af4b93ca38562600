"""Documents that are read behind passages of others: exact there, never taken for what was read alone, and read again so."""

from contextlib import closing

import pytest
import torch

from ragkv import Chunk, Engine, FullPrefill, PromptTemplate, PromptTooLongError, Reuse, SensitiveTokens, TieredStore
from ragkv.errors import PromptError
from ragkv.library.document import ChunkedDocument
from ragkv.library.neighbours import Neighbours
from ragkv.retrieval import Retriever
from ragkv.testing import random_ids, tiny_model
from tests.evaluation.test_neighbours import Embedder
from tests.rag.rags import TOKENIZER

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], before_chunk=[9], after_chunk=[10])
A, B, X, Y = (random_ids(12, seed=seed) for seed in range(4))
QUESTION = random_ids(6, seed=9)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    with Engine(model, store=TieredStore(), template=TEMPLATE, method=Reuse(), document_tokens=64) as made:
        yield made


def logits(engine, chunks, method=None):
    return engine.fuse(chunks, QUESTION, method=method).logits


def facts(chunk):
    return chunk.to_dict()


def test_a_chunk_is_exact_behind_what_it_was_read_behind(engine, reads):
    pair = engine.add_document([A, B])
    (x,) = engine.add_document([X], behind=pair)
    assert (x.offset, x.front, x.number) == (28, 28, 0)
    assert engine.fuse([*pair, x], QUESTION).report.budget == 0
    torch.testing.assert_close(logits(engine, [*pair, x]), logits(engine, [*pair, x], FullPrefill()))
    ran = reads(engine)
    third = engine.add_document([A, B, X])[2]
    assert engine.documents.key(third) == engine.documents.key(x) and ran == []


def test_it_is_not_what_was_read_alone(engine):
    (alone,), (behind,), (other) = engine.add([X]), engine.add_document([X], behind=[A]), engine.add_document([X])[0]
    (turned,) = engine.add_document([X], behind=[A, B])
    chunks = [alone, behind, turned]
    assert len({engine.documents.key(chunk) for chunk in chunks}) == 3
    assert len({chunk.document for chunk in (behind, turned, other)}) == 3
    assert engine.documents.key(other) == engine.documents.key(alone)
    assert logits(engine, [alone]).sub(logits(engine, [behind])).abs().max() > 1e-3
    torch.testing.assert_close(logits(engine, [alone]), logits(engine, [alone], FullPrefill()))


def test_lost_kv_are_read_again_behind_the_same(engine):
    chunks = engine.add_document([X, Y], behind=[A, B])
    before = logits(engine, chunks)
    kept = [Chunk.from_dict(chunk.to_dict()) for chunk in chunks]
    engine.store.remove_many([engine.documents.key(chunk) for chunk in chunks])
    prompt = engine.fuse(kept, QUESTION)
    assert prompt.report.hits == {"computed": 2} and prompt.report.read_tokens == 28
    torch.testing.assert_close(prompt.logits, before)
    former = {name: value for name, value in engine.add([Y])[0].to_dict().items() if name != "front"}
    assert Chunk.from_dict(former).front == 0
    with pytest.raises(PromptError, match="-1 is no whole number"):
        Chunk.from_dict({**former, "front": -1})


@pytest.mark.parametrize("context", ["document", "chunk"])
def test_every_window_stands_behind_them(model, context):
    parts = [random_ids(12, seed=seed) for seed in range(20, 28)]
    with Engine(model, template=TEMPLATE, method=Reuse(), document_tokens=64, context=context) as engine:
        document = engine.documents.cut(parts, behind=[A])
        assert len(set(document.firsts)) > 1 and set(document.fronts) == set(document.firsts)
        repaired = document.with_mark(1, "repaired")
        assert repaired.read_behind({}).marks == {} and repaired.read_behind(document.fronts) is repaired
        again = ChunkedDocument.from_bytes(document.to_bytes())
        assert list(map(facts, again)) == list(map(facts, document))
        for number, chunk in enumerate(again):
            chain = chunk.lineage()
            assert chain[0].ids == engine.encoder.chunk(A) and chain[0].context == b""
            assert [each.number for each in chain[1:]] == list(range(document.firsts[number], number + 1))
            assert facts(chain[-1]) == facts(chunk) and sum(map(len, chain)) == chunk.offset + len(chunk) <= 64
            assert [list(map(facts, each.lineage())) for each in chain] == [
                list(map(facts, chain[: length + 1])) for length in range(len(chain))
            ]
        read = engine.add_document(parts, behind=[A])
        exact = engine.documents.reader.read([read[-1]], lambda chunk: chunk.lineage(), lambda chunk: None)
        kept = engine.store.get(engine.documents.key(read[-1]))
        torch.testing.assert_close(next(iter(exact))[1].keys, kept.keys)


def test_what_leaves_no_room_is_refused(engine):
    with pytest.raises(PromptTooLongError, match="a passage of 14 tokens with 56 in front of it is 6 more"):
        engine.add_document([X], behind=[A, B, Y, random_ids(12, seed=5)])
    with pytest.raises(PromptError, match="behind must be a list"):
        engine.add_document([X], behind="text")
    assert len(engine.store) == 0


def test_a_method_that_keeps_what_documents_told_repairs_it_in_front_of_others(model):
    """Its own document's text stands in front of it, be it none: neighbours that are not there are no reason to spare it."""
    with Engine(model, template=TEMPLATE, method=SensitiveTokens(0.2, keep_document=True)) as engine:
        (other,) = engine.add([B])
        x, y = engine.add_document([X, Y], behind=[A])
        assert engine.fuse([other, x, y], QUESTION).report.budget > 0.1
        assert engine.fuse([other, y], QUESTION).report.budget == 0  # the text before it is missing


def test_no_text_stands_there_twice_however_far_the_next_one_is():
    """More copies than are looked at: of its own text, and of the nearest."""
    texts = ["A river."] * 9 + ["A river, a river and a harp."] * 12 + ["A harp."]
    with closing(Retriever.open(embedder=Embedder())) as retriever:
        retriever.add_many([(str(number), [text], None) for number, text in enumerate(texts)])
        with retriever.catalogue.snapshot() as view:
            found = list(Neighbours(retriever, view, "").of(view.get("0"), [0]))
            assert [view.passage_text(passage_id) for passage_id in found] == [texts[9], texts[-1]]


def test_each_window_has_neighbours_of_its_own_as_far_as_there_is_room():
    parts, others = ["River " * 12, "Glass " * 12], {"river": "A river.", "glass": "Of glass.", "long": "River " * 20}
    with (
        closing(Retriever.open(embedder=Embedder())) as retriever,
        Engine(tiny_model(vocab_size=1792), TOKENIZER, document_tokens=80) as engine,
    ):
        retriever.add_many([("own", parts, None), *((name, [text], None) for name, text in others.items())])
        document = engine.documents.cut(parts)
        river, glass = (engine.encoder.chunk(others[name]) for name in ("river", "glass"))
        with retriever.catalogue.snapshot() as view:
            neighbours, listed = Neighbours(retriever, view, ""), view.get("own")
            fronts = [neighbours.behind(document, listed, engine.documents, most).fronts for most in (1, 2)]
    assert document.firsts == [0, 1]
    assert fronts == [
        {1: [glass]},
        {0: [river], 1: [glass, river]},
    ]  # "long" is nearest to the first, and too long for it
