"""Passages of other frameworks as chunks: a reference helps, and never misleads."""

import json

import pytest

from ragkv import RAG, ArgumentTypeError, Engine, PromptError
from ragkv.adapters.passages import Passage, engine_of, hand_over, metadata_of, reference
from ragkv.bundled import documents
from ragkv.retrieval import Retriever, TokenChunker
from ragkv.retrieval.records import source_id
from tests.rag.rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag, small_model
from tests.some_tokenizers import byte_level

TEXT = "Clearport lies on the river Exe."


def dicts(chunks):
    return [chunk.to_dict() for chunk in chunks]


def referring(hit):
    return Passage(hit.text, hit.source, json.loads(json.dumps(reference(hit))))


@pytest.fixture
def no_tokenizer(rag, monkeypatch):
    def refuse(text, **_):
        raise AssertionError(f"tokenised: {text}")

    return lambda: monkeypatch.setattr(rag.engine.encoder, "ids", refuse)


def test_frameworks_are_told_where_a_passage_stands():
    with open_rag() as rag:
        rag.add_texts(["# Harbours\n\n" + TEXT, TEXT], ["a.md", "b.md"], [{"year": 1911}, {}])
        told = {hit.source: metadata_of(hit) for hit in rag.retrieve(QUESTION)}
    assert told["a.md"] == {"source": "a.md", "heading": "Harbours", "year": 1911}
    assert told["b.md"] == {"source": "b.md"}


def test_a_reference_is_a_chunk_in_its_document(rag, no_tokenizer):
    hits = rag.retrieve(QUESTION, top_k=4)
    want = dicts(rag.chunks(hits))
    assert any(chunk["offset"] for chunk in want)
    no_tokenizer()
    handed = hand_over(rag.engine, map(referring, hits))
    assert dicts(handed.chunks) == want and handed.numbers == [0, 1, 2, 3] and not handed.left_out
    assert not rag.engine.documents.missing(handed.chunks)


def test_what_is_not_known_stands_alone_and_is_kept(rag, reads):
    seen = reads(rag.engine)
    for _ in range(2):
        (chunk,) = hand_over(rag.engine, [Passage(TEXT)]).chunks
        assert (chunk.text, chunk.document, chunk.offset) == (TEXT, "", 0)
        rag.engine.generate([chunk], QUESTION, max_new_tokens=1)
    assert seen == [len(chunk)]


@pytest.mark.parametrize("how", ["other_text", "other_place", "no_document", "negative", "nonsense", "types"])
def test_a_reference_that_does_not_hold_is_none(rag, how):
    hit = rag.retrieve(QUESTION, top_k=1)[0]
    name, text = hit.document_id, hit.text
    text, said = {
        "other_text": (TEXT, {"document": name, "passage": hit.position}),
        "other_place": (text, {"document": name, "passage": hit.position + 1}),
        "no_document": (text, {"document": source_id("gone.md"), "passage": 0}),
        "negative": (text, {"document": name, "passage": -1}),
        "nonsense": (text, "see above"),
        "types": (text, {"document": 5, "passage": True}),
    }[how]
    (chunk,) = hand_over(rag.engine, [Passage(text, reference=said)]).chunks
    assert chunk.to_dict() == rag.engine.documents.passage(text).to_dict()


def test_a_reference_of_another_folder(rag, model):
    """Equal names, other texts: the chunk is the text that was handed over."""
    others = dict(zip(DOCUMENTS, reversed(list(documents().values())), strict=False))
    with open_rag(model=model) as other:
        other.add_texts(list(others.values()), list(others))
        hits = other.retrieve(QUESTION, top_k=5)
    assert {hit.source for hit in hits} <= DOCUMENTS.keys()
    chunks = hand_over(rag.engine, map(referring, hits)).chunks
    assert dicts(chunks) == [rag.engine.documents.passage(hit.text).to_dict() for hit in hits]


def test_a_reference_of_another_model_and_tokenizer(rag):
    """The same documents, read by another model: ids and KV are those of the model that answers."""
    tokenizer = byte_level()
    engine = Engine(small_model(seed=1), tokenizer)
    with RAG(engine, Retriever.open(None, WordEmbedder()), TokenChunker(tokenizer, 48)) as other:
        other.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        hits = other.retrieve(QUESTION, top_k=4)
        theirs = other.chunks(hits)
    ours = hand_over(rag.engine, map(referring, hits)).chunks
    for chunk, hit, foreign in zip(ours, hits, theirs, strict=True):
        assert chunk.ids == rag.engine.documents.passage(hit.text).ids != foreign.ids


def test_what_has_no_text_is_left_out_by_name(rag, caplog):
    bad = ["", "  ", None, 7, [5, 6], "\ud800"]
    handed = hand_over(rag.engine, [Passage(text, f"number {n}") for n, text in enumerate([*bad, TEXT])])
    assert [chunk.text for chunk in handed.chunks] == [TEXT] and handed.numbers == [6]
    assert list(handed.left_out) == list(range(6))
    assert all(f"number {n}: " in caplog.text for n in range(6)) and "number 6" not in caplog.text


def test_what_is_too_long_is_left_out(model, caplog):
    with open_rag(model=model, document_tokens=64) as rag:
        handed = hand_over(rag.engine, [Passage(TEXT * 40, "the long one"), Passage(TEXT)])
        assert handed.numbers == [1] and "the long one: a passage of" in caplog.text
        with pytest.raises(PromptError, match=r"none of the 1 passages .*the long one: a passage of .* split it"):
            hand_over(rag.engine, [Passage(TEXT * 40, "the long one")])


def test_no_passages(rag):
    assert hand_over(rag.engine, []) == ([], [], {})


def test_engine_of(rag):
    assert engine_of(rag) is engine_of(rag.engine) is rag.engine
    with pytest.raises(ArgumentTypeError, match=r"must be a ragkv.RAG or a ragkv.Engine, got 'folder'"):
        engine_of("folder")
