"""The engine's model and the folder's embedder as LlamaIndex's own kinds of model."""

import asyncio

import numpy as np
import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode

from ragkv import ArgumentTypeError, Engine, PromptError
from ragkv.adapters.llamaindex import RagKVEmbedding, RagKVLLM
from tests.rag.rags import QUESTION, TEMPLATE, TOKENIZER

ANSWER = {"max_new_tokens": 8}
LONG = {"max_new_tokens": 400, "min_new_tokens": 400}


@pytest.fixture
def llm(rag):
    return RagKVLLM(rag, ANSWER)


@pytest.fixture
def want(rag):
    return rag.engine.generate([], QUESTION, **ANSWER)


def test_complete(llm, want):
    answer = llm.complete(QUESTION)
    assert answer.text == want.text
    assert answer.raw["usage"]["completion_tokens"] == 8
    assert answer.raw["report"]["fusion"]["chunk_tokens"] == 0
    assert llm.predict(PromptTemplate("{question}"), question=QUESTION) == want.text


def test_stream_complete(llm, want):
    pieces = list(llm.stream_complete(QUESTION))
    assert len(pieces) > 1 and pieces[-1].text == want.text == "".join(piece.delta for piece in pieces)
    assert pieces[-1].raw["usage"]["completion_tokens"] == 8


def test_a_stream_counts_what_the_whole_answer_counts(llm, want):
    for options in ({}, {"stop": want.text[2:5]}, {"stop": want.text[0]}):  # the last one leaves no text
        whole, pieces = llm.complete(QUESTION, **options), list(llm.stream_complete(QUESTION, **options))
        assert (pieces[-1].text, pieces[-1].raw["usage"]) == (whole.text, whole.raw["usage"])
        assert "".join(piece.delta for piece in pieces) == whole.text

        async def same(options=options):
            return [piece async for piece in await llm.astream_complete(QUESTION, **options)]

        assert [piece.delta for piece in asyncio.run(same())] == [piece.delta for piece in pieces]
        said = list(llm.stream_chat([ChatMessage(content=QUESTION)], **options))
        assert said[-1].message.content == whole.text and said[-1].raw["usage"] == whole.raw["usage"]


def test_chat(llm, rag):
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Where is Clearport?"),
        ChatMessage(role="assistant", content="By a river."),
        ChatMessage(role="user", content=QUESTION),
    ]
    said = [{"role": message.role.value, "content": message.content} for message in messages]
    want = rag.engine.generate([], said, **ANSWER).text
    assert llm.chat(messages).message.content == want
    assert list(llm.stream_chat(messages))[-1].message.content == want

    async def both():
        pieces = [piece async for piece in await llm.astream_chat(messages)]
        return (await llm.achat(messages)).message.content, pieces[-1].message.content

    assert asyncio.run(both()) == (want, want)
    assert llm.chat(messages[-1:]).message.content == llm.complete(QUESTION).text


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (ChatMessage(role="tool", content="5"), "a role must be one of"),
        (
            ChatMessage(role="user", blocks=[TextBlock(text="See:"), ImageBlock(image=b"aGk=")]),
            "content must be a text",
        ),
        (ChatMessage(role="assistant", content="By a river."), "the last message must be the user's question"),
        (ChatMessage(role="user", content="Go.", additional_kwargs={"tool_calls": [1]}), "got tool_calls at 0"),
    ],
    ids=["tool", "picture", "answer", "calls"],
)
def test_messages_that_it_cannot_read(llm, message, said):
    with pytest.raises(PromptError, match=said):
        llm.chat([message])


async def test_in_an_event_loop(llm, want):
    assert (await llm.acomplete(QUESTION)).text == want.text
    pieces = [piece async for piece in await llm.astream_complete(QUESTION)]
    assert pieces[-1].text == want.text == "".join(piece.delta for piece in pieces)


async def test_the_loop_goes_on(llm, held):
    asked = asyncio.ensure_future(llm.achat([ChatMessage(content=QUESTION)], stopping_criteria=[held]))
    await held.let_go()
    assert (await asked).message.content


async def test_a_stream_that_is_closed_stops_the_model(rag, monkeypatch):
    streams, stream = [], rag.engine.stream
    monkeypatch.setattr(
        rag.engine, "stream", lambda *args, **options: streams.append(stream(*args, **options)) or streams[-1]
    )
    pieces = await RagKVLLM(rag, LONG).astream_complete(QUESTION)
    await anext(pieces)
    await pieces.aclose()
    await asyncio.to_thread(rag.threads.close)
    assert 0 < len(streams[0].token_ids) < LONG["max_new_tokens"]


def test_arguments_of_a_call_come_first(llm):
    assert llm.complete(QUESTION, max_new_tokens=2).raw["usage"]["completion_tokens"] == 2
    with pytest.raises(TypeError, match="max_tokenz"):
        llm.complete(QUESTION, max_tokenz=2)
    with pytest.raises(PromptError, match="the question is empty"):
        llm.complete("")


def test_metadata(llm, rag):
    about, engine = llm.metadata, rag.engine
    assert about.num_output == 8 and about.model_name == "LlamaForCausalLM" and not about.is_chat_model
    longest = about.context_window - about.num_output
    engine.fuse([], [5] * longest, room_tokens=about.num_output)  # fits
    with pytest.raises(PromptError):
        engine.fuse([], [5] * (longest + 2), room_tokens=about.num_output)


def test_tokens_are_counted_by_the_model(rag, want):
    counter = TokenCountingHandler(tokenizer=lambda text: 1 / 0)
    RagKVLLM(rag, ANSWER, callback_manager=CallbackManager([counter])).complete(QUESTION)
    fusion = want.report.fusion
    assert counter.prompt_llm_token_count == fusion.prefix_tokens + fusion.suffix_tokens
    assert counter.completion_llm_token_count == 8


def test_an_engine_does_too(model, rag, want):
    assert RagKVLLM(Engine(model, TOKENIZER, template=TEMPLATE), ANSWER).complete(QUESTION).text == want.text
    for adapter in (RagKVLLM, RagKVEmbedding):
        with pytest.raises(ArgumentTypeError, match=r"rag must be a ragkv.RAG.* got 'kv/'"):
            adapter("kv/")


def test_what_is_logged_of_it_is_plain(llm):
    assert llm.to_dict()["generation"] == ANSWER and "engine" not in str(llm.to_dict())


def test_embedding(rag):
    embedding, embedder = RagKVEmbedding(rag), rag.retriever.embedder
    np.testing.assert_allclose(embedding.get_query_embedding(QUESTION), embedder.encode_query(QUESTION))
    vectors = embedder.encode_documents(["a b", "c"])
    np.testing.assert_allclose(embedding.get_text_embedding_batch(["a b", "c"]), vectors)

    async def both():
        return await embedding.aget_query_embedding(QUESTION), await embedding.aget_text_embedding_batch(["a b", "c"])

    asked, texts = asyncio.run(both())
    np.testing.assert_allclose(asked, embedder.encode_query(QUESTION))
    np.testing.assert_allclose(texts, vectors)
    assert embedding.model_name == "words"


def test_both_in_an_index_of_llama_indexes_own(rag, llm):
    """Not the way to stored KV, but it works, and asks nobody else."""
    nodes = [TextNode(text="Clearport lies on the river Exe."), TextNode(text="Tar is sold by the barrel.")]
    index = VectorStoreIndex(nodes, embed_model=RagKVEmbedding(rag))
    response = index.as_query_engine(llm=llm, similarity_top_k=1).query(QUESTION)
    assert response.source_nodes[0].node.text == nodes[0].text and str(response)
    assert Settings._llm is None and Settings._embed_model is None
