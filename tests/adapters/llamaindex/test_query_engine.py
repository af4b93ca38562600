"""LlamaIndex's query engines over our synthesizer: nodes of ours, nodes of others, streamed, in an event loop."""

import asyncio
import json
import threading

import pytest
from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle, TextNode

from ragkv import ArgumentError, ArgumentTypeError, Engine, PromptError, PromptTooLongError, RagKVError
from ragkv.adapters.llamaindex import RagKVQueryEngine, RagKVRetriever, RagKVSynthesizer
from tests.rag.rags import QUESTION, TEMPLATE, TOKENIZER

FOREIGN = ["Clearport lies on the river Exe.", "Tar is sold in Clearport by the barrel."]
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}  # it ends by being stopped


class Found(BaseRetriever):
    """Somebody else's retriever."""

    def __init__(self, nodes):
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle):
        return [NodeWithScore(node=node, score=0.5) for node in self.nodes]


def texts(*given, **fields):
    return [TextNode(text=text, **fields) for text in given]


def others(rag, nodes, **options):
    return RetrieverQueryEngine(Found(nodes), RagKVSynthesizer(rag, **options))


def test_a_question_that_is_too_long_is_refused_before_it_is_looked_for(rag, monkeypatch):
    question = "word " * rag.engine.decoder.max_positions
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    for streaming in (False, True):
        ask = RagKVQueryEngine(rag, streaming=streaming, stop="x", method="reuse")
        with pytest.raises(PromptTooLongError, match="or a shorter question"):
            ask.query(question)
        with pytest.raises(PromptTooLongError, match="or a shorter question"):
            asyncio.run(ask.aquery(question))


def test_it_answers_as_rag_does(rag, reads):
    want = rag.ask(QUESTION, top_k=3, max_new_tokens=8)
    seen = reads(rag.engine)
    response = RagKVQueryEngine(rag, top_k=3, max_new_tokens=8).query(QUESTION)
    assert str(response) == want.text and seen == []
    assert [found.node.text for found in response.source_nodes] == [hit.text for hit in want.sources]
    assert [found.node.ref_doc_id for found in response.source_nodes] == [hit.source for hit in want.sources]
    report = response.metadata["ragkv"]["report"]
    assert report["fusion"]["hits"] == {"cpu": 3} == want.report.fusion.hits
    assert report["new_tokens"] == 8 and not response.metadata["ragkv"]["left_out"]


def test_nodes_travel_as_json(rag, reads):
    """A node that was sent somewhere and came back is the chunk in its document, not read again."""
    found = RagKVRetriever(rag, top_k=4).retrieve(QUESTION)
    want = [chunk.to_dict() for chunk in rag.chunks(rag.retrieve(QUESTION, 4))]
    assert any(chunk["offset"] for chunk in want)
    back = [TextNode.from_dict(json.loads(json.dumps(node.node.to_dict()))) for node in found]
    synthesizer = RagKVSynthesizer(rag, max_new_tokens=4)
    _, given = synthesizer._given([NodeWithScore(node=node) for node in back])
    seen = reads(rag.engine)
    assert [chunk.to_dict() for chunk in given["chunks"]] == want
    response = RetrieverQueryEngine(Found(back), synthesizer).query(QUESTION)
    assert str(response) == rag.ask(QUESTION, top_k=4, max_new_tokens=4).text and seen == []


@pytest.mark.parametrize("alone", [False, True], ids=["rag", "engine"])
def test_nodes_of_others_are_read_once(rag, model, reads, alone):
    answers = Engine(model, TOKENIZER, template=TEMPLATE) if alone else rag
    engine = answers if alone else rag.engine
    seen, nodes = reads(engine), texts(*FOREIGN)
    first = others(answers, nodes, max_new_tokens=6).query(QUESTION)
    assert str(first) == engine.generate(FOREIGN, QUESTION, max_new_tokens=6).text
    assert sum(seen) > 0
    del seen[:]
    assert str(others(answers, nodes, max_new_tokens=6).query(QUESTION)) == str(first) and seen == []


def test_the_model_is_shown_what_llama_index_shows(rag):
    node = TextNode(text=FOREIGN[0], metadata={"year": 1790, "path": "x"}, excluded_llm_metadata_keys=["path"])
    response = others(rag, [node], max_new_tokens=4).query(QUESTION)
    want = rag.engine.generate([f"year: 1790\n\n{FOREIGN[0]}"], QUESTION, max_new_tokens=4)
    assert str(response) == want.text and response.source_nodes[0].node.metadata == node.metadata


def test_a_changed_node_is_what_it_says_now(rag):
    """A postprocessor that writes another text into a node of ours: its reference holds no more."""
    node = RagKVRetriever(rag, top_k=1).retrieve(QUESTION)[0].node
    node.set_content(FOREIGN[0])
    _, given = RagKVSynthesizer(rag)._given([NodeWithScore(node=node)])
    assert [chunk.to_dict() for chunk in given["chunks"]] == [rag.engine.documents.passage(FOREIGN[0]).to_dict()]


def test_what_a_transform_says_is_looked_for(rag):
    """As HyDE does, which asks a model for an answer, to look for its like."""
    found = RagKVRetriever(rag, 3).retrieve(QueryBundle("What?", custom_embedding_strs=[QUESTION]))
    assert [hit.node.text for hit in found] == [hit.text for hit in rag.retrieve(QUESTION, 3)]


def test_streaming(rag):
    want = rag.ask(QUESTION, top_k=3, max_new_tokens=8)
    response = RagKVQueryEngine(rag, top_k=3, streaming=True, max_new_tokens=8).query(QUESTION)
    assert response.metadata["ragkv"]["report"] is None  # not yet
    pieces = list(response.response_gen)
    assert len(pieces) > 1 and "".join(pieces) == want.text
    assert response.metadata["ragkv"]["report"]["new_tokens"] == 8
    assert [found.node.text for found in response.source_nodes] == [hit.text for hit in want.sources]


async def test_in_an_event_loop(rag):
    want = rag.ask(QUESTION, top_k=3, max_new_tokens=8).text
    whole = RagKVQueryEngine(rag, top_k=3, max_new_tokens=8)
    pieces = RagKVQueryEngine(rag, top_k=3, max_new_tokens=8, streaming=True)
    answer, response = await asyncio.gather(whole.aquery(QUESTION), pieces.aquery(QUESTION))
    assert str(answer) == want and answer.metadata["ragkv"]["report"]["new_tokens"] == 8
    assert "".join([piece async for piece in response.async_response_gen()]) == want
    assert response.metadata["ragkv"]["report"]["new_tokens"] == 8


async def test_the_loop_goes_on(rag, held):
    asked = asyncio.ensure_future(
        others(rag, texts(*FOREIGN), max_new_tokens=3, stopping_criteria=[held]).aquery(QUESTION)
    )
    await held.let_go()
    assert (await asked).metadata["ragkv"]["report"]["new_tokens"] == 3


@pytest.mark.parametrize("how", ["close", "cancel", "leave the loop"])
def test_who_stops_listening_stops_the_model(rag, monkeypatch, how):
    streams, stream = [], rag.engine.stream

    def kept(*args, **options):
        streams.append(stream(*args, **options))
        return streams[-1]

    monkeypatch.setattr(rag.engine, "stream", kept)

    async def listen():
        response = await RagKVQueryEngine(rag, streaming=True, **LONG).aquery(QUESTION)
        if how == "cancel":
            waiting = asyncio.ensure_future(anext(response.response_gen))
            while not streams or not streams[0].token_ids:
                await asyncio.sleep(0.001)
            waiting.cancel()
        else:
            await anext(response.response_gen)
        if how == "close":
            await response.response_gen.aclose()
        return response  # held: the loop ends before it does

    response = asyncio.run(listen())
    rag.threads.close()  # waits for whatever still runs
    assert 0 < len(streams[0].token_ids) < LONG["max_new_tokens"] and response


async def test_a_task_that_is_cancelled_stops_the_model(rag):
    begun = threading.Event()
    engine = RagKVQueryEngine(rag, **LONG, stopping_criteria=[lambda *_, **__: begun.set() or False])
    asked = asyncio.ensure_future(engine.aquery(QUESTION))
    while not begun.is_set():
        await asyncio.sleep(0.001)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert asked.cancelled()
    rag.threads.close()
    with pytest.raises(RagKVError, match="it is closed"):
        await engine.aquery(QUESTION)


@pytest.mark.parametrize("streaming", [False, True])
async def test_nothing_was_found(rag, streaming):
    engine = others(rag, [], streaming=streaming, empty_response="Nothing there.")
    assert str(engine.query(QUESTION)) == "Nothing there."
    response = await engine.aquery(QUESTION)
    said = "".join([piece async for piece in response.response_gen]) if streaming else str(response)
    assert said == "Nothing there."


def test_what_has_no_text_is_left_out(rag, caplog):
    bad = [
        TextNode(id_="blank", text=" \n"),
        ImageNode(id_="picture", image="aGk="),
        TextNode(id_="half", text="\ud800"),
    ]
    response = others(rag, [*bad, *texts(FOREIGN[0])], max_new_tokens=4).query(QUESTION)
    assert [found.node.text for found in response.source_nodes] == FOREIGN[:1]
    assert response.metadata["ragkv"]["left_out"].keys() == {"blank", "picture", "half"}
    assert all(f"node {name}: " in caplog.text for name in ("blank", "picture", "half"))
    with pytest.raises(PromptError, match=r"none of the 3 passages .* node picture: it must have text"):
        others(rag, bad).query(QUESTION)


async def test_nodes_may_be_anything_that_can_be_gone_through(rag):
    nodes = Found(texts(*FOREIGN)).retrieve(QUESTION)
    synthesizer = RagKVSynthesizer(rag, max_new_tokens=2)
    assert synthesizer.synthesize(QUESTION, iter(nodes)).source_nodes == nodes
    assert (await synthesizer.asynthesize(QUESTION, iter(nodes))).source_nodes == nodes


@pytest.mark.parametrize("given", ["text", ["text"], texts("text"), None])
async def test_nodes_that_are_none(rag, given):
    with pytest.raises(ArgumentTypeError, match="nodes must be a list of NodeWithScore, got"):
        RagKVSynthesizer(rag).synthesize(QUESTION, given)
    with pytest.raises(ArgumentTypeError, match="nodes must be a list of NodeWithScore, got"):
        await RagKVSynthesizer(rag).asynthesize(QUESTION, given)


def test_metadata_that_json_cannot_hold_are_no_hindrance(rag):
    node = TextNode(text=FOREIGN[0], metadata={"seen": {1, 2}, "ragkv": object()})
    node.excluded_llm_metadata_keys = list(node.metadata)
    assert str(others(rag, [node], max_new_tokens=4).query(QUESTION))


def test_postprocessors(rag):
    engine = RagKVQueryEngine(
        rag, 4, max_new_tokens=2, node_postprocessors=[SimilarityPostprocessor(similarity_cutoff=2.0)]
    )
    assert str(engine.query(QUESTION)) == "Empty Response"


def test_generation_arguments_of_a_call(rag):
    synthesizer, nodes = RagKVSynthesizer(rag, max_new_tokens=9), Found(texts(*FOREIGN)).retrieve(QUESTION)
    response = synthesizer.synthesize(QUESTION, nodes, max_new_tokens=2)
    assert response.metadata["ragkv"]["report"]["new_tokens"] == 2
    with pytest.raises(TypeError, match="max_new_tokenz"):
        synthesizer.synthesize(QUESTION, nodes, max_new_tokenz=2)


def test_texts_without_nodes(rag):
    want = rag.engine.generate(FOREIGN, QUESTION, max_new_tokens=4).text
    synthesizer = RagKVSynthesizer(rag, max_new_tokens=4)
    assert synthesizer.get_response(QUESTION, FOREIGN) == want
    assert asyncio.run(synthesizer.aget_response(QUESTION, FOREIGN)) == want


def test_prompts_are_the_engines(rag):
    engine = RagKVQueryEngine(rag)
    assert engine.get_prompts() == {}
    with pytest.raises(ArgumentError, match=r"text_qa_template: the prompt is the engine's own"):
        engine.update_prompts({"response_synthesizer:text_qa_template": None})


def test_no_other_model_and_no_network(rag, monkeypatch):
    """LlamaIndex's settings would load OpenAI's models, and its counter tiktoken's words."""

    def refuse(*_, **__):
        raise AssertionError("fetched")

    monkeypatch.setattr("llama_index.core.utils.get_tokenizer", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    RagKVQueryEngine(rag, max_new_tokens=2).query(QUESTION)
    assert Settings._llm is None and Settings._embed_model is None
