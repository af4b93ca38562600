"""Haystack's generator: what it answers over, piece by piece, in an event loop, and what it refuses."""

import asyncio
import threading

import pytest
from haystack import Document
from haystack.components.builders import AnswerBuilder
from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
from haystack.dataclasses import ByteStream, StreamingChunk
from haystack.document_stores.in_memory import InMemoryDocumentStore

from ragkv import ArgumentTypeError, Engine, PromptError, RagKVError
from ragkv.adapters.haystack import RagKVGenerator, RagKVRetriever
from tests.rag.rags import QUESTION, TEMPLATE, TOKENIZER

from .pipelines import ANSWER, asked, joined

FOREIGN = ["Clearport lies on the river Exe.", "Tar is sold in Clearport by the barrel."]
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}  # it ends by being stopped


def documents(*texts):
    return [Document(content=text) for text in texts]


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

    with pytest.raises(OSError, match="gone") as failed:
        RagKVGenerator(rag, LONG, fail).run(QUESTION, documents(*FOREIGN))
    assert rag.engine.stats().line.running == 0, "though the error is at hand, with all that stood on the stack"
    del failed
    assert RagKVGenerator(rag, ANSWER).run(QUESTION, documents(*FOREIGN))["replies"]


async def test_documents_may_be_anything_that_can_be_gone_through(rag):
    given, generator = documents(*FOREIGN), RagKVGenerator(rag, ANSWER)
    assert generator.run(QUESTION, iter(given))["documents"] == given
    assert (await generator.run_async(QUESTION, iter(given)))["documents"] == given


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
    assert [RagKVGenerator(rag).run(QUESTION, none) for none in ([], iter(()), None)] == [nothing] * 3
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
    for wrong in ("x", [1], 5):
        with pytest.raises(ArgumentTypeError, match="generation_kwargs must be a dict"):
            RagKVGenerator(rag, wrong)
        with pytest.raises(ArgumentTypeError, match="generation_kwargs must be a dict"):
            generator.run(QUESTION, documents(*FOREIGN), wrong)


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
