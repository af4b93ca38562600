"""The chain: documents reach the model as documents, whoever found them."""

import asyncio
import json

import pytest
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import JsonOutputParser, StrOutputParser
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough

from ragkv import ArgumentTypeError, PromptError, PromptTooLongError, UnknownArgumentError
from ragkv.adapters.langchain import RagKVRetriever, RagKVVectorStore, create_ragkv_chain
from tests.rag.rags import QUESTION

TEXTS = ["Clearport lies on the river Exe.", "Mira Lund runs the mill."]


class Found(BaseRetriever):
    """A retriever that knows nothing of ragkv."""

    documents: list = []

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


def foreign(*texts):
    return Found(documents=[Document(page_content=text) for text in texts])


def test_documents_of_ours_are_stored_chunks(rag, reads):
    want = rag.ask(QUESTION, top_k=4, max_new_tokens=8)
    retriever, seen = RagKVRetriever(rag=rag, k=4), reads(rag.engine)
    result = create_ragkv_chain(retriever, rag, max_new_tokens=8).invoke(QUESTION)
    assert list(result) == ["question", "context", "answer", "report"]
    assert (result["question"], result["context"]) == (QUESTION, retriever.invoke(QUESTION))
    assert result["answer"] == want.text and not seen
    assert result["report"]["fusion"]["hits"] == want.report.fusion.hits == {"cpu": 4}
    assert json.dumps(result["report"])


def test_a_question_that_is_too_long_is_refused_before_it_is_looked_for(rag, monkeypatch):
    question = "word " * rag.engine.decoder.max_positions
    monkeypatch.setattr(rag.retriever.embedder, "encode_query", lambda text: pytest.fail("it was looked for"))
    chain = create_ragkv_chain(RagKVRetriever(rag=rag), rag, stop="x", method="reuse", k=2, top_k=4)
    with pytest.raises(PromptTooLongError, match="or a shorter question"):
        chain.invoke(question)
    with pytest.raises(PromptTooLongError, match="or a shorter question"):
        asyncio.run(chain.ainvoke(question))


def test_documents_of_the_vector_store_are_stored_chunks(rag, reads):
    store = RagKVVectorStore(rag)
    store.add_texts(TEXTS, ids=["a", "b"])
    seen = reads(rag.engine)
    retriever = store.as_retriever(search_kwargs={"k": 2, "filter": lambda d: d.id in "ab"})
    result = create_ragkv_chain(retriever, rag.engine, max_new_tokens=2).invoke(TEXTS[0])
    assert [document.id for document in result["context"]] == ["a", "b"] and not seen
    assert result["report"]["fusion"]["hits"] == {"cpu": 2}


def test_documents_of_others_are_read_once(rag, reads):
    seen, chain = reads(rag.engine), create_ragkv_chain(foreign(*TEXTS), rag, max_new_tokens=4)
    first, again = chain.invoke(QUESTION), chain.invoke({"question": QUESTION})
    lengths = [len(rag.engine.documents.passage(text)) for text in TEXTS]
    assert sorted(seen) == sorted(lengths) and again["report"]["fusion"]["hits"] == {"cpu": 2}
    assert first["answer"] == again["answer"] == rag.engine.generate(TEXTS, QUESTION, max_new_tokens=4).text


def test_it_streams(rag):
    chain = create_ragkv_chain(RagKVRetriever(rag=rag, k=3), rag, max_new_tokens=8)
    parts = list(chain.stream(QUESTION))
    assert [list(part) for part in parts[:2]] == [["question"], ["context"]]
    pieces = [part["answer"] for part in parts[2:]]
    assert "".join(pieces) == chain.invoke(QUESTION)["answer"] and len(pieces) > 3


async def test_it_answers_in_an_event_loop(rag):
    chain = create_ragkv_chain(RagKVRetriever(rag=rag, k=3), rag, max_new_tokens=8)
    want = chain.invoke(QUESTION)
    got = await chain.ainvoke(QUESTION)
    assert (got["context"], got["answer"]) == (want["context"], want["answer"])
    pieces = [part.get("answer", "") async for part in chain.astream(QUESTION)]
    assert "".join(pieces) == want["answer"] and len(pieces) > 3
    plain = create_ragkv_chain(foreign(*TEXTS), rag.engine, max_new_tokens=2)
    assert (await plain.ainvoke(QUESTION))["answer"] == plain.invoke(QUESTION)["answer"]


def test_a_stream_that_is_closed_stops_the_model(rag):
    chain = create_ragkv_chain(foreign(*TEXTS), rag, max_new_tokens=400, min_new_tokens=400)
    stream = chain.stream(QUESTION)
    while not next(stream).get("answer"):
        pass
    stream.close()
    assert rag.ask(QUESTION, max_new_tokens=1).text is not None  # the model is free
    assert not rag.engine.documents.missing(rag.engine.add(TEXTS)), "what was read for it is kept"


async def test_a_task_that_is_cancelled_stops_the_model(rag):
    steps = []
    chain = create_ragkv_chain(
        foreign(*TEXTS),
        rag,
        max_new_tokens=400,
        min_new_tokens=400,
        stopping_criteria=[lambda ids, scores, **_: steps.append(1) or ids.new_zeros(len(ids)).bool()],
    )

    async def ask():
        async for part in chain.astream(QUESTION):
            if part.get("answer"):
                task.cancel()

    task = asyncio.ensure_future(ask())
    with pytest.raises(asyncio.CancelledError):
        await task
    rag.threads.close()  # waits for what is worked on
    assert len(steps) < 100


def test_what_a_call_says_goes_before(rag):
    chain = create_ragkv_chain(foreign(*TEXTS), rag, max_new_tokens=2)
    assert chain.invoke(QUESTION)["report"]["new_tokens"] == 2
    assert chain.invoke(QUESTION, max_new_tokens=3)["report"]["new_tokens"] == 3
    assert chain.invoke(QUESTION, method="full-prefill")["report"]["fusion"]["method"] == "FullPrefill()"
    with pytest.raises(UnknownArgumentError, match="nonsense"):
        chain.invoke(QUESTION, nonsense=1)


def test_a_system_message(rag):
    """Passages are read behind it, once, and stay in the context of their document."""
    options = {"system": "Be brief.", "max_new_tokens": 3}
    chain = create_ragkv_chain(RagKVRetriever(rag=rag, k=3), rag, **options)
    first, again = chain.invoke(QUESTION), chain.invoke(QUESTION)
    assert first["answer"] == again["answer"] == rag.ask(QUESTION, top_k=3, **options).text
    assert again["report"]["fusion"]["hits"] == {"cpu": 3}


def test_it_is_a_part_of_longer_chains(rag):
    chain = {"question": RunnablePassthrough()} | create_ragkv_chain(foreign(*TEXTS), rag, max_new_tokens=3)
    text = chain | RunnableLambda(lambda result: result["answer"].upper())
    assert text.invoke(QUESTION) == chain.invoke(QUESTION)["answer"].upper()
    answers = chain.batch([QUESTION, "Who runs the mill?"])
    assert [answer["question"] for answer in answers] == [QUESTION, "Who runs the mill?"]


REWRITTEN = FakeListChatModel(responses=[QUESTION]) | StrOutputParser()


@pytest.mark.parametrize(
    "front",
    [
        REWRITTEN,
        RunnableParallel(question=REWRITTEN, language=RunnableLambda(lambda _: "en")),
        FakeListChatModel(responses=[json.dumps({"question": QUESTION})]) | JsonOutputParser(),  # all so far, each time
    ],
    ids=["text", "dict", "json"],
)
async def test_what_comes_in_pieces_is_one_question(rag, front):
    whole = front | (chain := create_ragkv_chain(foreign(*TEXTS), rag, max_new_tokens=3))
    want = chain.invoke(QUESTION)["answer"]
    assert [part["question"] for part in whole.stream("?") if "question" in part] == [QUESTION]
    assert "".join(part.get("answer", "") for part in whole.stream("?")) == want
    assert "".join([part.get("answer", "") async for part in whole.astream("?")]) == want


def test_what_has_no_text_is_left_out(rag, caplog):
    found = [Document(page_content=""), Document(page_content=TEXTS[0], metadata={"ragkv": "nonsense"}), "no document"]
    result = create_ragkv_chain(Found(documents=found), rag, max_new_tokens=2).invoke(QUESTION)
    assert result["context"] == found[1:2]
    assert "document 1 (without id): " in caplog.text and "document 3 (without id): " in caplog.text
    with pytest.raises(PromptError, match="none of the 1 passages"):
        create_ragkv_chain(foreign(" "), rag).invoke(QUESTION)


def test_nothing_found_is_answered_without_documents(rag):
    result = create_ragkv_chain(foreign(), rag, max_new_tokens=3).invoke(QUESTION)
    assert result["context"] == [] and result["report"]["fusion"]["chunk_tokens"] == 0
    assert result["answer"] == rag.engine.generate([], QUESTION, max_new_tokens=3).text


def test_wrong_types_are_told(rag):
    with pytest.raises(ArgumentTypeError, match="retriever must be a retriever"):
        create_ragkv_chain("folder", rag)
    with pytest.raises(ArgumentTypeError, match=r"ragkv\.RAG or a ragkv\.Engine"):
        create_ragkv_chain(foreign(), "folder")
    chain = create_ragkv_chain(foreign(*TEXTS), rag)
    for question in ("", None, {"input": QUESTION}, [QUESTION]):
        with pytest.raises(ArgumentTypeError, match="give a question, or a dict with one under 'question'"):
            chain.invoke(question)
    with pytest.raises(ArgumentTypeError, match="must give a list of documents"):
        create_ragkv_chain(RunnableLambda(lambda question: "text"), rag).invoke(QUESTION)


async def test_a_retriever_may_give_anything_that_can_be_gone_through(rag):
    found = foreign(*TEXTS).documents
    chain = create_ragkv_chain(RunnableLambda(lambda question: map(found.__getitem__, (1, 0))), rag, max_new_tokens=2)
    assert chain.invoke(QUESTION)["context"] == (await chain.ainvoke(QUESTION))["context"] == found[::-1]
