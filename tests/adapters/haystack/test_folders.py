"""Haystack's components over a path: written into a file and loaded back, opened once and closed."""

import gc

import pytest
from haystack import Pipeline

from ragkv import RAG, ArgumentError, ArgumentTypeError, StoreError
from ragkv.adapters.haystack import RagKVGenerator, RagKVRetriever
from ragkv.adapters.haystack.folder import Folder, _opened
from tests.rag.rags import DOCUMENTS, QUESTION, WordEmbedder, open_rag

from .pipelines import ANSWER, asked, joined

told = []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The path of a folder that the bundled model has read, opened with the words' embedder."""
    monkeypatch.setattr("ragkv.opening.load_embedder", lambda *_: WordEmbedder())
    with RAG.from_pretrained(path=tmp_path / "kv") as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = rag.ask(QUESTION, top_k=3, **ANSWER).text
    return tmp_path / "kv", want


def tell(piece):
    """A callback that a file can name."""
    told.append(piece.content)


def test_a_pipeline_in_a_file(folder):
    """Written, loaded back and run: both components share one folder, and one model, until the pipeline is closed."""
    path, want = folder
    method = {"method": "reuse"}
    filters = {"field": "meta.source", "operator": "in", "value": list(DOCUMENTS)}
    retriever = RagKVRetriever(path, top_k=3, filters=filters, options=method)
    text = joined(retriever, RagKVGenerator(path, ANSWER, tell, options=method)).dumps()
    assert not _opened  # nothing was loaded to write it
    loaded = Pipeline.loads(text, allowed_modules=["ragkv.*", "tests.*", __name__])
    assert loaded.dumps() == text
    said = asked(loaded)
    assert len(_opened) == 1
    fusion = said["meta"][0]["report"]["fusion"]
    assert fusion["method"] == "Reuse()" and fusion["hits"] == {"disk": 3}
    assert "".join(told) == said["replies"][0] == want
    generator = loaded.get_component("generator")
    loaded.get_component("retriever").close()
    assert len(_opened) == 1 and generator.run(QUESTION, said["documents"])["replies"] == said["replies"]
    loaded.close()
    loaded.close()
    assert not _opened
    assert asked(loaded)["replies"] == said["replies"]  # opened again
    del loaded, generator
    gc.collect()
    assert not _opened


async def test_a_folder_is_opened_beside_the_loop(folder):
    path, want = folder
    pipeline = joined(RagKVRetriever(path, top_k=3), RagKVGenerator(path, ANSWER))
    said = await pipeline.run_async({"retriever": {"query": QUESTION}, "generator": {"query": QUESTION}})
    assert said["generator"]["replies"] == [want] and len(_opened) == 1
    await pipeline.close_async()
    assert not _opened


def test_a_fork_beside_somebody_who_opens_a_folder(tmp_path, monkeypatch, forked_amid):
    monkeypatch.setattr(RAG, "from_pretrained", lambda **_: open_rag(tmp_path, None, WordEmbedder()))
    folders = [Folder("one"), Folder("other")]
    opened = forked_amid(folders[0].open, RAG, "from_pretrained", lambda: type(folders[1].open()).__name__)
    assert opened == "RAG" and len(_opened) == 1
    folders[0].close()


def test_what_cannot_be_written(rag):
    for made in (RagKVRetriever(rag), RagKVGenerator(rag), RagKVGenerator(rag.engine)):
        with pytest.raises(ArgumentError, match=r"cannot be written into a file: give the path of its folder"):
            made.to_dict()


def test_what_they_cannot_be_made_of(rag):
    with pytest.raises(ArgumentTypeError, match="rag must be the path of a folder"):
        RagKVGenerator(5)
    with pytest.raises(ArgumentTypeError, match=r"rag must be the path of a folder, or a ragkv.RAG, got"):
        RagKVRetriever(rag.engine)
    with pytest.raises(ArgumentError, match=r"options \['device'\] are for a folder"):
        RagKVGenerator(rag, options={"device": "cpu"})
    with pytest.raises(ArgumentError, match="options must be what JSON can hold"):
        RagKVGenerator("kv/", options={"store": object()})
    with pytest.raises(ArgumentError, match="the path of the folder is rag"):
        RagKVGenerator("kv/", options={"path": "other/"})
    for nowhere in ("", "k\0v"):
        with pytest.raises(StoreError, match="path must be the path of a folder, got"):
            RagKVRetriever(nowhere)


def test_closing_leaves_a_rag_that_was_given(rag):
    pipeline = joined(RagKVRetriever(rag), RagKVGenerator(rag, ANSWER))
    pipeline.close()
    assert asked(pipeline)["replies"]


def test_telemetry_is_off():
    from haystack.telemetry import _telemetry

    assert _telemetry.telemetry is None
