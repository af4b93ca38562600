"""A folder whose documents are read behind their neighbours: kept up with, and without a trace of what was removed."""

import os

import numpy as np
import pytest

from ragkv import RAG, ArgumentError
from ragkv.exchange import export_folder, import_folder
from ragkv.library.document import ChunkedDocument
from ragkv.retrieval import Retrieval

from .rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag

SOURCES, TEXTS = list(DOCUMENTS), list(DOCUMENTS.values())


def opened(model, path=None, behind=2):
    rag = open_rag(path, model)
    rag.behind = behind
    return rag


def read(rag, source):
    """A document as the model reads it."""
    with rag.retriever.catalogue.snapshot() as view:
        reading = rag.finder.catalogued().read(view, view.get(source))
        return ChunkedDocument.from_bytes(reading.record), reading


def all_fronts(rag):
    return {source: read(rag, source)[0].fronts for source in SOURCES if source in rag.retriever.catalogue}


@pytest.fixture
def whole(model):
    with opened(model) as rag:
        rag.add_texts(TEXTS, SOURCES)
        yield rag


def test_each_document_stands_behind_the_nearest_passages_of_others(whole):
    catalogue = whole.retriever.catalogue
    for source in SOURCES:
        document, reading = read(whole, source)
        with catalogue.snapshot() as view:
            listed, vectors = view.get(source), {}
            for other in view.documents():
                for passage_id in other.passage_ids if other != listed else ():
                    vectors[passage_id] = view.vector(passage_id)
            mean = view.vectors(listed.passage_ids).mean(0)
            best = sorted(vectors, key=lambda passage_id: -float(vectors[passage_id] @ mean))[:2]
            texts = list(map(view.passage_text, best))
        assert reading.behind == tuple(best)
        assert document.fronts == {0: [whole.engine.encoder.chunk(text) for text in texts]}
    assert catalogue.check() == [] and whole.stale() == []
    assert whole.ask(QUESTION, max_new_tokens=2).report.fusion.hits.keys() == {"cpu"}
    assert all(chunk.front for chunk in whole.chunks(whole.retrieve(QUESTION)))
    elsewhere = whole.finder.catalogued(whole.engine.prompting.documents_for("Be brief.", None))
    assert not any(chunk.front for chunk in elsewhere.chunks(elsewhere.search(QUESTION, Retrieval())))


def test_it_is_read_once_and_the_same_in_whatever_calls(whole, model, reads):
    ran = reads(whole.engine)
    assert whole.refresh() == whole.add_texts(TEXTS, SOURCES).tokens_read == 0 and ran == []
    with opened(model) as one_by_one:
        told = []
        for source, text in zip(SOURCES, TEXTS, strict=True):
            one_by_one.add_texts([text], [source], progress=told.append)
        assert {step.reason for step in told} == {"found", "new"}
        fronts = all_fronts(whole)
        stale = [source for source in SOURCES if read(one_by_one, source)[0].fronts != fronts[source]]
        assert stale and one_by_one.stale() == sorted(stale)
        told = []
        tokens = one_by_one.refresh(told.append)
        assert {step.source for step in told if step.reason == "neighbours"} == set(stale)
        assert told[-1].done_tokens == told[-1].tokens > tokens > 0  # neighbours are run too, and not stored
        assert (one_by_one.stale(), one_by_one.refresh(), all_fronts(one_by_one)) == ([], 0, fronts)
        assert len(one_by_one.engine.store) == len(whole.engine.store)


def test_what_was_removed_leaves_no_trace_in_others(whole):
    behind = {source: read(whole, source)[1].behind for source in SOURCES}
    gone = whole.retriever.catalogue.passage(behind[SOURCES[0]][0]).document.source
    ids, passages = ids_of(whole, gone), read(whole, gone)[0].ids
    held = [source for source in SOURCES if source != gone and set(behind[source]) & set(ids)]
    keys = {key for source in held for key in read(whole, source)[1].keys}
    assert held and all(key in whole.engine.store for key in keys)
    whole.remove(gone)
    assert not any(key in whole.engine.store for key in keys)
    with whole.retriever.catalogue.snapshot() as view:
        records = [reading.record for listed in view.documents() for reading in view.readings(listed)]
    assert len(records) == len(SOURCES) - 1 - len(held)
    assert not any(np.asarray(passage, "<u4").tobytes() in record for record in records for passage in passages)
    assert whole.retriever.catalogue.check() == []
    assert whole.ask(QUESTION, max_new_tokens=2).text  # read alone where it must be
    assert set(held) <= set(whole.stale())
    whole.refresh()
    assert whole.stale() == [] and all(fronts for fronts in all_fronts(whole).values())


def ids_of(rag, source):
    return rag.retriever.catalogue.get(source).passage_ids


def test_a_changed_neighbour_is_one_no_more(whole, reads):
    whole._intake.repair_tokens, ran = 4, reads(whole.engine)
    passage = whole.retriever.catalogue.passage(read(whole, SOURCES[0])[1].behind[0])
    source, others = passage.document.source, [o for o in SOURCES if passage.id in read(whole, o)[1].behind]
    whole.add_texts([DOCUMENTS[source].replace(passage.text, passage.text.upper())], [source])
    assert passage.id not in ids_of(whole, source)
    assert SOURCES[0] in others and not any(read(whole, other)[0].fronts for other in others)
    changed = read(whole, source)[0]
    assert changed.fronts and sum(ran) == sum(
        map(len, changed.lineage(len(changed) - 1))
    )  # once, exactly, behind its own


def test_a_folder_in_step_with_the_disk_is_read_behind_what_is_left(model, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for source, text in list(DOCUMENTS.items())[:5]:
        (folder / source).write_text(text)
    with opened(model) as rag:
        rag.sync(folder)
        paths = {source: str(folder / source) for source in SOURCES}
        nearest = rag.retriever.catalogue.passage(read(rag, paths[SOURCES[0]])[1].behind[0]).document.source
        text = (folder / SOURCES[0]).read_text()
        (folder / SOURCES[0]).write_text(text + " And that is all there is to say.")
        os.remove(nearest)
        done = rag.sync(folder)
        assert done.removed == [nearest] and done.changed == [paths[SOURCES[0]]]
        assert read(rag, paths[SOURCES[0]])[1].behind  # not dropped again with what went
        rag.refresh()
        assert rag.stale() == [] and rag.sync(folder).removed == []


def test_without_neighbours_again(whole, model):
    alone = {source: read(whole, source)[0].read_behind({}) for source in SOURCES}
    whole.behind = 0
    assert whole.stale() == sorted(SOURCES)
    whole.refresh()
    assert not any(all_fronts(whole).values())
    assert all(
        key in whole.engine.store for document in alone.values() for key in whole.engine.documents.keys_of(document)
    )
    with pytest.raises(ArgumentError, match="behind must be >= 0"):
        whole.behind = -1


def test_the_folder_keeps_it(tmp_path):
    folder, own = tmp_path / "rag", {"embedder": WordEmbedder()}
    with RAG.from_pretrained("bundled", path=folder, behind=1, method="reuse", **own) as rag:
        rag.add_texts(TEXTS[:3], SOURCES[:3])
    with RAG.open(folder, **own) as rag:
        assert rag.behind == 1 and rag.refresh() == 0
        assert len(read(rag, SOURCES[0])[1].behind) == 1
        rag.behind = 2
        assert rag.stale() == sorted(SOURCES[:3])
        rag.refresh()
    with RAG.open(folder, **own) as rag:
        assert rag.behind == 2 and rag.stale() == []
        rag.behind = 1
        rag.add_texts(TEXTS[:1], SOURCES[:1])
        assert rag.retriever.catalogue.defaults["behind"] == 1


def test_each_namespace_has_its_own(whole):
    added = whole.add_texts(TEXTS[:2], SOURCES[:2], namespace="other")
    with whole.retriever.catalogue.snapshot() as view:
        own = {passage_id for listed in view.documents("other") for passage_id in listed.passage_ids}
        for change in added.changes:
            (reading,) = view.readings(view.get(change.document.source, "other"))
            assert reading.behind and set(reading.behind) <= own
    assert whole.stale() == []


def test_an_archive_has_no_passages_of_others(model, tmp_path):
    with opened(model, tmp_path / "one") as rag:
        rag.add_texts(TEXTS[:3], SOURCES[:3])
    done = export_folder(tmp_path / "one", tmp_path / "archive", sources=lambda source: source == SOURCES[0])
    assert done.documents == 1
    import_folder(tmp_path / "two", tmp_path / "archive", disk_bytes=1 << 30)
    with open_rag(tmp_path / "two", model) as rag:
        assert rag.retriever.catalogue.check() == []
        with rag.retriever.catalogue.snapshot() as view:
            assert view.readings(view.get(SOURCES[0])) == []
        assert rag.refresh() > 0 and rag.ask(QUESTION, max_new_tokens=2).text
