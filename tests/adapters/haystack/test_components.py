"""Haystack's components over a folder: by themselves, in pipelines, written into a file and loaded back."""

import asyncio
import gc
import threading

import pytest
from haystack import Document, Pipeline, component
from haystack.components.builders import AnswerBuilder
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.core.component import Component
from haystack.dataclasses import ByteStream, StreamingChunk
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.errors import FilterError

from ragkv import RAG, ArgumentError, ArgumentTypeError, Engine, PromptError, RagKVError, RetrievalError
from ragkv.adapters.haystack import RagKVGenerator, RagKVRetriever
from ragkv.adapters.haystack.folder import Folder, _opened
from tests.rag.rags import DOCUMENTS, QUESTION, TEMPLATE, TOKENIZER, WordEmbedder, open_rag

FOREIGN = ["Clearport lies on the river Exe.", "Tar is sold in Clearport by the barrel."]
ANSWER = {"max_new_tokens": 8}
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}  # it ends by being stopped


def documents(*texts):
    return [Document(content=text) for text in texts]


def asked(pipeline, **more):
    data = {"query": QUESTION} | more
    return pipeline.run({"retriever": {"query": QUESTION}, "generator": data})["generator"]


def joined(retriever, generator):
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("generator", generator)
    pipeline.connect("retriever.documents", "generator.documents")
    return pipeline


def test_it_answers_as_rag_does(rag, reads):
    want = rag.ask(QUESTION, top_k=3, **ANSWER)
    seen = reads(rag.engine)
    said = asked(joined(RagKVRetriever(rag, top_k=3), RagKVGenerator(rag, ANSWER)))
    assert said["replies"] == [want.text] and seen == []
    assert [document.content for document in said["documents"]] == [hit.text for hit in want.sources]
    assert [document.meta["source"] for document in said["documents"]] == [hit.source for hit in want.sources]
    (meta,) = said["meta"]
    assert meta["report"]["fusion"]["hits"] == {"cpu": 3} == want.report.fusion.hits
    assert meta["usage"]["completion_tokens"] == 8 and meta["model"] == "LlamaForCausalLM" and not meta["left_out"]


def test_documents_travel_as_dicts(rag, reads):
    found = RagKVRetriever(rag, top_k=4).run(QUESTION)["documents"]
    back = [Document.from_dict(document.to_dict()) for document in found]
    seen = reads(rag.engine)
    assert RagKVGenerator(rag, ANSWER).run(QUESTION, back)["replies"] == [rag.ask(QUESTION, top_k=4, **ANSWER).text]
    assert seen == []


@pytest.mark.parametrize("alone", [False, True], ids=["rag", "engine"])
def test_a_retriever_of_others(rag, model, reads, alone):
    answers = Engine(model, TOKENIZER, template=TEMPLATE) if alone else rag
    engine = answers if alone else rag.engine
    store = InMemoryDocumentStore()
    store.write_documents(documents(*FOREIGN))
    seen, pipeline = reads(engine), joined(InMemoryBM25Retriever(store), RagKVGenerator(answers, ANSWER))
    first = asked(pipeline)
    found = [document.content for document in first["documents"]]
    assert sorted(found) == sorted(FOREIGN) and sum(seen) > 0
    assert first["replies"] == [engine.generate(found, QUESTION, **ANSWER).text]
    del seen[:]
    assert asked(pipeline)["replies"] == first["replies"] and seen == []


def test_a_document_of_another_folder_and_model_is_its_text(rag, model):
    with open_rag(model=model) as other:
        other.add_texts(["Clearport has a harbour.\n\nIt lies on the river Exe."], ["clearport.md"])
        found = RagKVRetriever(other).run(QUESTION)["documents"]
    texts = [document.content for document in found]
    want = rag.engine.generate(texts, QUESTION, **ANSWER)
    assert RagKVGenerator(rag, ANSWER).run(QUESTION, found)["replies"] == [want.text]


def test_a_changed_document_is_what_it_says_now(rag):
    found = RagKVRetriever(rag, top_k=1).run(QUESTION)["documents"]
    changed = [Document(content=FOREIGN[0], meta=document.meta) for document in found]
    said = RagKVGenerator(rag, ANSWER).run(QUESTION, changed)
    assert said["replies"] == [rag.engine.generate(FOREIGN[:1], QUESTION, **ANSWER).text]


def test_filters_and_top_k(model):
    with open_rag(model=model) as rag:
        texts = [*(f"{FOREIGN[0]} Number {n}." for n in range(12)), "Something else.", "Another thing."]
        extras = [{"wanted": 0}] * 12 + [{"wanted": 1}, {"wanted": 2}]
        rag.add_texts(texts, [str(n) for n in range(14)], extras)
        one = {"field": "meta.wanted", "operator": ">=", "value": 1}
        retriever = RagKVRetriever(rag, top_k=2, filters=one)

        def found(**more):
            return {document.meta["wanted"] for document in retriever.run(QUESTION, **more)["documents"]}

        assert found() == {1, 2}
        assert found(filters={"field": "meta.wanted", "operator": "==", "value": 2}) == {2}
        assert found(filters={"field": "meta.source", "operator": "in", "value": ["12"]}) == {1}
        assert found(filters={}) == {0}
        assert len(retriever.run(QUESTION, {}, 5)["documents"]) == 5
        with pytest.raises(FilterError):
            found(filters={"operator": "AND"})
        with pytest.raises(RetrievalError, match="at least 1, got 0"):
            found(top_k=0)


def test_neighbours(rag):
    plain = RagKVRetriever(rag, 1, neighbours=1).run(QUESTION)["documents"]
    assert [document.content for document in plain] == [hit.text for hit in rag.retrieve(QUESTION, 1, 1)]
    assert len(plain) > 1
    among = {"field": "meta.source", "operator": "in", "value": list(DOCUMENTS)}
    assert RagKVRetriever(rag, 1, neighbours=1, filters=among).run(QUESTION)["documents"] == plain
    other = {"field": "meta.source", "operator": "!=", "value": plain[0].meta["source"]}
    found = RagKVRetriever(rag, 1, neighbours=1, filters=other).run(QUESTION)["documents"]
    assert (
        len({document.meta["source"] for document in found}) == 1 and found[0].meta["source"] != plain[0].meta["source"]
    )


def test_streaming(rag):
    pieces: list[StreamingChunk] = []
    pipeline = joined(RagKVRetriever(rag, top_k=3), RagKVGenerator(rag, ANSWER, pieces.append))
    said = asked(pipeline)
    assert "".join(piece.content for piece in pieces) == said["replies"][0] == rag.ask(QUESTION, top_k=3, **ANSWER).text
    assert [piece.start for piece in pieces] == [True] + [False] * (len(pieces) - 1) and len(pieces) > 1
    assert pieces[0].component_info.name == "generator"
    assert said["meta"][0]["usage"]["completion_tokens"] == 8
    own = []
    count = len(pieces)
    assert asked(pipeline, streaming_callback=own.append)["replies"] == said["replies"]
    assert len(own) == count == len(pieces)


async def test_in_an_event_loop(rag):
    pipeline, pieces = joined(RagKVRetriever(rag, top_k=3), RagKVGenerator(rag, ANSWER)), []

    async def tell(piece):
        pieces.append(piece.content)

    def run(**more):
        return pipeline.run_async({"retriever": {"query": QUESTION}, "generator": {"query": QUESTION} | more})

    for more in ({}, {"streaming_callback": tell}, {"streaming_callback": lambda piece: None}):
        assert (await run(**more))["generator"]["replies"] == [rag.ask(QUESTION, top_k=3, **ANSWER).text]
    assert "".join(pieces) == rag.ask(QUESTION, top_k=3, **ANSWER).text


async def test_the_loop_goes_on(rag, held):
    running = asyncio.ensure_future(
        RagKVGenerator(rag, {**ANSWER, "stopping_criteria": [held]}).run_async(QUESTION, documents(*FOREIGN))
    )
    await held.let_go()
    assert (await running)["replies"]


async def test_adapters_over_one_engine_share_its_threads(model):
    engine, worked = Engine(model, TOKENIZER, template=TEMPLATE), []

    def note(*_, **__):
        worked.append(threading.current_thread())
        return False

    for _ in range(6):
        await RagKVGenerator(engine, {**ANSWER, "stopping_criteria": [note]}).run_async(QUESTION, documents(*FOREIGN))
    assert len(set(worked)) < 6  # a pool takes a second thread where the first has not come back yet


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_task_that_is_cancelled_stops_the_model(rag, streamed):
    begun, ran = threading.Event(), []

    def count(*_, **__):
        begun.set()
        ran.append(1)
        return False

    generator = RagKVGenerator(rag, {**LONG, "stopping_criteria": [count]}, (lambda piece: None) if streamed else None)
    running = asyncio.ensure_future(generator.run_async(QUESTION, documents(*FOREIGN)))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert running.cancelled()
    rag.threads.close()
    assert 0 < len(ran) < LONG["max_new_tokens"]
    with pytest.raises(RagKVError, match="it is closed"):
        await generator.run_async(QUESTION, documents(*FOREIGN))


def test_a_callback_that_fails_stops_the_answer(rag):
    def fail(piece):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        RagKVGenerator(rag, LONG, fail).run(QUESTION, documents(*FOREIGN))
    assert RagKVGenerator(rag, ANSWER).run(QUESTION, documents(*FOREIGN))["replies"]


def test_a_callback_that_fails_leaves_nothing_behind(rag):
    def fail(piece):
        raise OSError("gone")

    try:
        RagKVGenerator(rag, LONG, fail).run(QUESTION, documents(*FOREIGN))
    except OSError:  # at hand, it holds all that stood on the stack
        assert rag.engine.stats().line.running == 0


async def test_documents_may_be_anything_that_can_be_gone_through(rag):
    given, generator = documents(*FOREIGN), RagKVGenerator(rag, ANSWER)
    assert generator.run(QUESTION, iter(given))["documents"] == given
    assert (await generator.run_async(QUESTION, iter(given)))["documents"] == given
    assert not generator.run(QUESTION, iter(()))["replies"] and not generator.run(QUESTION, None)["replies"]


@pytest.mark.parametrize("given", ["text", ["text"], [{"content": "text"}], 5])
async def test_documents_that_are_none(rag, given):
    with pytest.raises(ArgumentTypeError, match="documents must be a list of Haystack's documents, got"):
        RagKVGenerator(rag).run(QUESTION, given)
    with pytest.raises(ArgumentTypeError, match="documents must be a list of Haystack's documents, got"):
        await RagKVGenerator(rag).run_async(QUESTION, given)


@pytest.mark.parametrize("query", [" ", "", None])
async def test_a_query_that_is_none(rag, query):
    with pytest.raises(ArgumentTypeError, match="the question must be a str that is not blank"):
        RagKVGenerator(rag).run(query, documents(*FOREIGN))
    with pytest.raises(ArgumentTypeError, match="the question must be a str that is not blank"):
        await RagKVGenerator(rag).run_async(query, documents(*FOREIGN))


async def test_nothing_was_found(rag, caplog):
    nothing = {"replies": [], "meta": [], "documents": []}
    assert RagKVGenerator(rag).run(QUESTION, []) == nothing
    assert "there are no documents" in caplog.text
    assert await RagKVGenerator(rag).run_async(QUESTION, []) == nothing


def test_what_has_no_text_is_left_out(rag, caplog):
    bad = [Document(id="blank", content=" "), Document(id="picture", blob=ByteStream(b"x")), Document(id="none")]
    said = RagKVGenerator(rag, ANSWER).run(QUESTION, [*bad, *documents(FOREIGN[0])])
    assert [document.content for document in said["documents"]] == FOREIGN[:1]
    assert said["meta"][0]["left_out"].keys() == {"blank", "picture", "none"}
    assert "document picture: it must have text" in caplog.text
    with pytest.raises(PromptError, match="none of the 3 passages"):
        RagKVGenerator(rag).run(QUESTION, bad)


def test_ids_that_clash_and_metadata_that_json_cannot_hold(rag):
    same = [Document(id="same", content=text, meta={"ragkv": {1, 2}}) for text in FOREIGN]
    said = RagKVGenerator(rag, ANSWER).run(QUESTION, same)
    assert said["replies"] == [rag.engine.generate(FOREIGN, QUESTION, **ANSWER).text]


def test_generation_arguments(rag):
    generator = RagKVGenerator(rag, {"max_new_tokens": 9})
    said = generator.run(QUESTION, documents(*FOREIGN), {"max_new_tokens": 2})
    assert said["meta"][0]["usage"]["completion_tokens"] == 2
    with pytest.raises(TypeError, match="max_new_tokenz"):
        generator.run(QUESTION, documents(*FOREIGN), {"max_new_tokenz": 2})


def test_answers(rag):
    """Haystack's own builder makes them of what the generator gives."""
    pipeline = joined(RagKVRetriever(rag, top_k=3), RagKVGenerator(rag, ANSWER))
    pipeline.add_component("answers", AnswerBuilder())
    for name in ("replies", "meta", "documents"):
        pipeline.connect(f"generator.{name}", f"answers.{name}")
    data = {name: {"query": QUESTION} for name in ("retriever", "generator", "answers")}
    (answer,) = pipeline.run(data)["answers"]["answers"]
    assert answer.data == rag.ask(QUESTION, top_k=3, **ANSWER).text and len(answer.documents) == 3
    assert answer.meta["usage"]["completion_tokens"] == 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The path of a folder that the bundled model has read, opened with the words' embedder."""
    monkeypatch.setattr("ragkv.opening.load_embedder", lambda *_: WordEmbedder())
    with RAG.from_pretrained(path=tmp_path / "kv") as rag:
        rag.add_texts(list(DOCUMENTS.values()), list(DOCUMENTS))
        want = rag.ask(QUESTION, top_k=3, **ANSWER).text
    return tmp_path / "kv", want


told = []


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


@pytest.mark.parametrize("wrong", ["x", 5])
def test_filters_and_options_of_another_type(rag, wrong):
    for found in (
        lambda: RagKVRetriever(rag, filters=wrong).run(QUESTION),
        lambda: RagKVRetriever(rag).run(QUESTION, filters=wrong),
        lambda: RagKVRetriever(rag).run(QUESTION, retrieval=wrong),
    ):
        with pytest.raises(ArgumentTypeError, match="must be a dict"):
            found()


def test_closing_leaves_a_rag_that_was_given(rag):
    pipeline = joined(RagKVRetriever(rag), RagKVGenerator(rag, ANSWER))
    pipeline.close()
    assert asked(pipeline)["replies"]


def test_they_are_components(rag):
    for made in (RagKVRetriever(rag), RagKVGenerator(rag)):
        assert isinstance(made, Component) and type(made).__name__ in str(component.registry)


def test_telemetry_is_off():
    from haystack.telemetry import _telemetry

    assert _telemetry.telemetry is None
