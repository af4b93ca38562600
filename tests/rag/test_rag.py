"""RAG end to end: documents in, questions answered, what changes and what is lost."""

from itertools import pairwise
from pathlib import Path

import pytest

from ragkv import RAG, DocumentError, Engine, RagKVError, StoreFullError, TieredStore
from ragkv.errors import RetrievalError
from ragkv.retrieval import Retriever

from .rags import DOCUMENTS, QUESTION, TOKENIZER, WordEmbedder, keys, open_rag, small_model, tokens_of


def test_ask(rag):
    answer = rag.ask(QUESTION, top_k=3, max_new_tokens=5)
    assert "clearport.md" in [hit.source for hit in answer.sources]
    assert len(answer.sources) == 3
    assert answer.report.fusion.sources == ["cpu"] * 3
    chunks = rag.chunks(answer.sources)
    assert [chunk.text for chunk in chunks] == [hit.text for hit in answer.sources]
    want = rag.engine.generate(chunks, QUESTION, max_new_tokens=5)
    assert (answer.text, answer.token_ids) == (want.text, want.token_ids)


def test_stream_joins_to_the_answer(rag):
    hits, pieces = rag.stream(QUESTION, top_k=3, max_new_tokens=8)
    want = rag.ask(QUESTION, top_k=3, max_new_tokens=8)
    assert hits == want.sources
    assert "".join(pieces) == want.text


def test_a_smaller_model_proposes(rag):
    asked = {"max_new_tokens": 12, "eos_token_id": None}
    want = rag.ask(QUESTION, **asked)
    assistant = small_model()
    for answer in (
        rag.ask(QUESTION, assistant_model=assistant, **asked),
        *rag.ask_many([QUESTION], assistant_model=assistant, **asked),
        rag.session().ask(QUESTION, assistant_model=assistant, **asked),
    ):
        assert answer.text == want.text
    stream = rag.stream(QUESTION, assistant_model=assistant, stop=[want.text[9:14]], **asked)[1]
    assert "".join(stream) == rag.ask(QUESTION, stop=[want.text[9:14]], **asked).text != want.text


def test_passages_of_a_document_stand_in_its_order(rag):
    hits = rag.retrieve(QUESTION, top_k=12)
    assert len({hit.passage_id for hit in hits}) == 12
    for one, next_one in pairwise(hits):
        assert one.source != next_one.source or one.position < next_one.position
    sources = [hit.source for hit in hits]
    assert all(
        sources[i:].index(sources[i]) == 0 and sources.index(sources[i]) + sources.count(sources[i]) > i
        for i in range(12)
    )


def test_adding_again_reads_nothing(rag, reads):
    seen = reads(rag.engine)
    again = rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
    assert (again.tokens_read, seen) == (0, [])
    assert all(change.first_changed is None and not change.new for change in again.changes)
    copy = rag.add_texts([DOCUMENTS["clearport.md"]], ["a copy of it"])
    assert (copy.tokens_read, seen) == (0, [])
    assert copy.changes[0].embedded == 0


def test_a_source_that_is_given_twice_is_one_document(rag):
    for kind in ("added", "changed"):
        added = rag.add_texts(["The first text.", f"The {kind} text."], sources=["a", "a"])
        assert getattr(added, kind) == ["a"] and len(added.changes) == 2


def test_a_changed_file_is_read_from_the_change_on(model, tmp_path, reads):
    file = tmp_path / "notes.md"
    file.write_text("\n\n".join(DOCUMENTS.values()))
    with open_rag(model=model) as rag:
        first = rag.add_files(file)
        passages = rag.chunker.split(file.read_text())
        assert first.tokens_read == tokens_of(rag, file.read_text())
        file.write_text(file.read_text().replace(passages[-2], passages[-2].replace(".", " indeed.")))
        seen = reads(rag.engine)
        changed = rag.add_files(file)
        begin = changed.changes[0].first_changed
        assert begin > len(passages) - 6
        assert changed.tokens_read == sum(seen) == tokens_of(rag, file.read_text(), begin)
        assert 0 < changed.tokens_read < first.tokens_read / 3
        assert len(rag.engine.store) == len(rag.chunker.split(file.read_text()))  # the old version's KV are gone


def test_removal_drops_what_nothing_else_uses(rag):
    text = DOCUMENTS["clearport.md"]
    rag.add_texts([text + " And then it was sold, as all the harbours were."], ["longer"])
    shared = set(keys(rag, text)) & set(keys(rag, text + " And then it was sold, as all the harbours were."))
    assert shared
    rag.remove("clearport.md")
    assert all(key in rag.engine.store for key in shared)
    assert all(key not in rag.engine.store for key in set(keys(rag, text)) - shared)
    rag.remove("longer")
    assert not any(key in rag.engine.store for key in shared)
    assert "clearport.md" not in {hit.source for hit in rag.retrieve(QUESTION, 50)}
    with pytest.raises(DocumentError, match="no document is called 'longer'"):
        rag.remove("longer")
    for name in set(DOCUMENTS) - {"clearport.md"}:
        rag.remove(name)
    assert len(rag.engine.store) == len(rag.retriever.catalogue) == 0


def test_what_is_read_is_what_sources_show(rag):
    """One snapshot a question: a document that changes behind the search is read as it was found."""
    hits = rag.retrieve(QUESTION, 6)
    assert "clearport.md" in {hit.source for hit in hits}
    rag.add_texts(["Clearport was given up."], ["clearport.md"])
    rag.remove("blackfield.md")
    chunks = rag.chunks(hits)
    assert [chunk.ids for chunk in chunks] == [rag.engine.encoder.chunk(hit.text) for hit in hits]
    assert rag.engine.fuse(chunks, QUESTION).report.sources.count("computed") > 0


def test_removed_while_it_is_added(rag, monkeypatch):
    """A removal that comes between a document's entry in the catalogue and the writing of its KV is not undone."""
    put, entries = rag.engine.store.put_many, len(rag.engine.store)

    def late(items, **more):
        monkeypatch.setattr(rag.engine.store, "put_many", put)
        rag.remove("late")
        return put(items, **more)

    monkeypatch.setattr(rag.engine.store, "put_many", late)
    rag.add_texts(["A text that nobody wants to keep."], ["late"])
    assert len(rag.engine.store) == entries


def test_what_was_removed_stays_removed(rag):
    """Chunks that somebody still holds are computed for a prompt, and not stored."""
    hits = [hit for hit in rag.retrieve(QUESTION, 20) if hit.source == "clearport.md"]
    chunks = rag.chunks(hits)
    rag.remove("clearport.md")
    entries = len(rag.engine.store)
    for _ in range(2):
        assert rag.engine.fuse(chunks, QUESTION).report.hits == {"computed": len(chunks)}
        assert len(rag.engine.store) == entries
    rag.add_texts([DOCUMENTS["clearport.md"] + " It was sold."], ["clearport.md"])
    stored = len(rag.engine.store)
    rag.engine.fuse(chunks, QUESTION)  # of the version before, as far as it differs
    assert len(rag.engine.store) == stored


def test_passages_read_alone_are_dropped_by_their_text(model):
    """With context="chunk" a passage's KV serve every document that has its text."""
    with open_rag(model=model, context="chunk") as rag:
        rag.add_texts(["One sentence. " * 12 + "\n\n# Second\n\n" + "Another one. " * 12], ["one"])
        rag.add_texts(["# Second\n\n" + "Another one. " * 12], ["two"])
        kept = keys(rag, "# Second\n\n" + "Another one. " * 12)
        rag.remove("one")
        assert all(key in rag.engine.store for key in kept)
        assert len(rag.engine.store) == len(set(kept))


def test_lost_kv_are_read_again(rag):
    want = rag.ask(QUESTION, max_new_tokens=5)
    every = sum(tokens_of(rag, text) for text in DOCUMENTS.values())
    for text in DOCUMENTS.values():
        for key in keys(rag, text):
            rag.engine.store.remove(key)
    got = rag.ask(QUESTION, max_new_tokens=5)
    assert got.report.fusion.hits == {"computed": 5}
    assert got.token_ids == want.token_ids
    named = []
    assert 0 < rag.refresh(named.append) < every
    assert [step.source for step in named if step.reason == "found"] == sorted(DOCUMENTS)
    assert rag.refresh() == 0


def test_unreadable_files_are_named_and_skipped(model, tmp_path):
    (tmp_path / "a.md").write_text(DOCUMENTS["clearport.md"])
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.pdf").write_bytes(b"no PDF at all")
    (tmp_path / "e.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "g.txt").write_text(DOCUMENTS["blackfield.md"])
    seen = []
    with open_rag(model=model) as rag:
        added = rag.add_files([tmp_path, tmp_path / "missing.txt"], progress=seen.append)
        assert [Path(change.document.source).name for change in added.changes] == ["a.md", "e.txt", "g.txt"]
        assert [Path(skipped.source).name for skipped in added.skipped] == [
            "b.bin",
            "c.txt",
            "d.pdf",
            "missing.txt",
        ]
        assert all(skipped.reason for skipped in added.skipped)
        assert len([step for step in seen if step.reason == "found"]) == 7
        assert "Clearport" in rag.ask(QUESTION, top_k=1, max_new_tokens=2).sources[0].text


def test_bad_input(model):
    with open_rag(model=model) as rag:
        for ask in (rag.ask, rag.stream):
            with pytest.raises(RagKVError, match="no documents yet"):
                ask(QUESTION)
        with pytest.raises(RetrievalError, match="blank"):
            rag.ask("  ")
        with pytest.raises(DocumentError, match="got one str: write"):
            rag.add_texts("one text")
        with pytest.raises(DocumentError, match="2 texts, 1 sources"):
            rag.add_texts(["one", "two"], ["one"])
        with pytest.raises(DocumentError, match="blank"):
            rag.add_texts(["good", "  "], ["good", "blank"])
        assert not len(rag.retriever.catalogue)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        RAG(Engine(model), Retriever.open(None, WordEmbedder()))


def test_a_full_store_loses_no_document(model):
    with open_rag(model=model, store=TieredStore(cpu_bytes=1000)) as rag:
        with pytest.raises(StoreFullError):
            rag.add_texts([DOCUMENTS["clearport.md"]], ["clearport.md"])
        answer = rag.ask(QUESTION, top_k=2, max_new_tokens=3)
        assert answer.report.fusion.hits == {"computed": 2}


def test_from_pretrained(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for tier in ("cpu", "disk"):
        with RAG.from_pretrained(
            tmp_path / "model", path=tmp_path / "kept", embedder=WordEmbedder(), dtype="float32"
        ) as rag:
            added = rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
            assert (added.tokens_read > 0) == (tier == "cpu")
            assert rag.chunker.chunk_tokens == 256
            assert rag.ask(QUESTION, max_new_tokens=2).report.fusion.hits == {tier: 5}
    with RAG.from_pretrained(embedder=WordEmbedder()) as rag:
        assert rag.chunker.chunk_tokens == 96
    with pytest.raises(OSError):
        RAG.from_pretrained(tmp_path / "no model", path=tmp_path / "kept", embedder=WordEmbedder())
