"""A folder's questions over what was computed before: in an order that is known, and never of what was removed."""

import time

import torch
from transformers import DynamicCache

from ragkv import FullPrefill, TieredStore
from ragkv.exchange import export_folder, import_folder
from ragkv.retrieval import Retrieval
from ragkv.store.keys import PATH
from ragkv.store.maintenance import entries
from ragkv.testing import as_cache

from .rags import DOCUMENTS, QUESTION, open_rag

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "method": FullPrefill()}


def test_an_order_that_was_computed_before_is_chosen(model):
    with open_rag(model=model, paths=64 << 20, context="chunk") as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        hits = rag.retrieve(QUESTION, top_k=4)
        rag.ask(QUESTION, top_k=4, **OPTIONS)
        rag.engine.paths.wait()
        known = [hit.passage_id for hit in rag.retrieve(QUESTION, top_k=4)]
        chunks = dict(zip(known, rag.finder.found(QUESTION, Retrieval(top_k=4)).chunks, strict=True))
        shuffled = [hits[at].passage_id for at in (2, 0, 3, 1)]
        order = rag.engine.paths.order(
            rag.engine.documents,
            rag.engine.documents.reader,
            rag.engine.documents.anchor,
            [chunks[each] for each in shuffled],
            FullPrefill(),
        )
        assert [shuffled[at] for at in order] == known
        answer = rag.ask(QUESTION, top_k=4, order="cache", **OPTIONS)
        assert [hit.passage_id for hit in answer.sources] == known
        assert answer.report.fusion.hits == {"cpu": 1, "path": 3}


def test_what_is_known_goes_in_front_and_the_rest_stays_as_it_was_found(model):
    with open_rag(model=model, paths=64 << 20) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        first = rag.ask(QUESTION, top_k=2, order="cache", **OPTIONS)
        rag.engine.paths.wait()
        found = [hit.passage_id for hit in rag.retrieve(QUESTION, top_k=6)]
        answer = rag.ask(QUESTION, top_k=6, order="cache", **OPTIONS)
        ids, known = [hit.passage_id for hit in answer.sources], [hit.passage_id for hit in first.sources]
        assert ids[:2] == known and sorted(ids) == sorted(found)
        assert ids[2:] == [each for each in found if each not in known]
        assert answer.report.fusion.sources[1] == "path"


def test_an_order_by_what_is_kept_is_that_of_documents_where_nothing_is(rag):
    plain = rag.ask(QUESTION, top_k=4, **OPTIONS)
    assert [hit.passage_id for hit in rag.ask(QUESTION, top_k=4, order="cache", **OPTIONS).sources] == [
        hit.passage_id for hit in plain.sources
    ]


def test_what_was_computed_right_before_closing_is_kept(model, tmp_path, monkeypatch):
    with open_rag(tmp_path, model, paths=True) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        put = rag.engine.documents.put
        for documents in rag.engine.documents.everywhere():
            monkeypatch.setattr(documents, "put", lambda *given: (time.sleep(0.2), put(*given))[1])
        rag.ask(QUESTION, **OPTIONS)
    assert any(entry.key.startswith(PATH) for entry in entries(tmp_path / "kv"))


def test_a_document_that_changes_or_goes_leaves_no_path(model, tmp_path):
    with open_rag(model=model, paths=TieredStore(tmp_path / "paths")) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        answer = rag.ask(QUESTION, top_k=5, **OPTIONS)
        rag.engine.paths.wait()
        store, middle = rag.engine.paths.store, answer.sources[1].source
        kept = len(store)
        assert kept >= 2
        rag.add_texts(["Quite another text about a river, and nothing of what stood here."], [middle])
        assert len(store) < kept
        again = rag.ask(QUESTION, top_k=5, **OPTIONS)
        rag.engine.paths.wait()
        assert exact(rag, again)
        for source in DOCUMENTS:
            rag.remove(source)
        assert len(store) == 0


def test_a_document_that_an_archive_replaces_leaves_no_path(model, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    with open_rag(there, model=model) as rag:
        rag.add_texts(["Quite another text about a river."], [next(iter(DOCUMENTS))])
    export_folder(there, tmp_path / "file")
    with open_rag(here, model=model, paths=True) as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        rag.ask(QUESTION, top_k=9, order="retrieved", **OPTIONS)
        rag.engine.paths.wait()
        behind = rag.engine.store.path
    kept = len(list(pieces(behind)))
    import_folder(here, tmp_path / "file", disk_bytes=1 << 30, replace=True)
    assert kept > len(list(pieces(behind)))


def pieces(folder):
    return [entry for entry in entries(folder) if entry.key.startswith(PATH)]


def exact(rag, answer):
    """Whether an answer is what the model says by itself."""
    chunks = rag.finder.catalogued().chunks(answer.sources)
    prompt = rag.engine.fuse(chunks, QUESTION, method=FullPrefill())
    with torch.no_grad():
        there = rag.engine.model(input_ids=prompt.input_ids, **as_cache(DynamicCache())).logits[:, -1]
    return float((there - prompt.logits).abs().max()) < 1e-4
