"""``priority=`` and ``deadline_s=`` reach the line from every framework: where an adapter is made, and for one call."""

import asyncio
import math

import pytest

from ragkv import DeadlineError, Scheduler
from ragkv.adapters import haystack, langchain, llamaindex
from ragkv.scheduling.policies import FirstComeFirstServed
from tests.rag.rags import DOCUMENTS, QUESTION, open_rag

SHORT = {"max_new_tokens": 1}


class Noting(FirstComeFirstServed):
    """Notes the priority of whoever comes, and whether there is a deadline."""

    def __init__(self):
        self.came = []

    def joined(self, ticket, others):
        self.came.append((ticket.priority, ticket.deadline_s < math.inf))


def chain(rag, **made):
    return langchain.create_ragkv_chain(langchain.RagKVRetriever(rag=rag, k=1), rag, **SHORT, **made)


def nodes(rag):
    return llamaindex.RagKVRetriever(rag, top_k=1).retrieve(QUESTION)


def documents(rag):
    return haystack.RagKVRetriever(rag, top_k=1).run(QUESTION)["documents"]


async def haystack_pieces(rag, given):
    async def heard(chunk):
        pass

    return await haystack.RagKVGenerator(rag, SHORT).run_async(QUESTION, documents(rag), given, heard)


CALLS = {
    "LangChain's chain, made": lambda rag, given: chain(rag, **given).invoke(QUESTION),
    "LangChain's chain": lambda rag, given: chain(rag).invoke(QUESTION, **given),
    "LangChain's chain, awaited": lambda rag, given: asyncio.run(chain(rag).ainvoke(QUESTION, **given)),
    "LangChain's chat model, made": lambda rag, given: langchain.ChatRagKV(
        rag=rag, max_tokens=1, generation=given
    ).invoke(QUESTION),
    "LangChain's chat model": lambda rag, given: langchain.ChatRagKV(rag=rag, max_tokens=1).invoke(QUESTION, **given),
    "LangChain's chat model, streamed": lambda rag, given: list(
        langchain.ChatRagKV(rag=rag, max_tokens=1).stream(QUESTION, **given)
    ),
    "LangChain's chat model, awaited": lambda rag, given: asyncio.run(
        langchain.ChatRagKV(rag=rag, max_tokens=1).ainvoke(QUESTION, **given)
    ),
    "LlamaIndex's query engine, made": lambda rag, given: llamaindex.RagKVQueryEngine(
        rag, top_k=1, **SHORT, **given
    ).query(QUESTION),
    "LlamaIndex's synthesizer": lambda rag, given: llamaindex.RagKVSynthesizer(rag, **SHORT).synthesize(
        QUESTION, nodes(rag), **given
    ),
    "LlamaIndex's synthesizer, awaited": lambda rag, given: asyncio.run(
        llamaindex.RagKVSynthesizer(rag, **SHORT).asynthesize(QUESTION, nodes(rag), **given)
    ),
    "LlamaIndex's language model, made": lambda rag, given: llamaindex.RagKVLLM(rag, {**SHORT, **given}).complete(
        QUESTION
    ),
    "LlamaIndex's language model": lambda rag, given: llamaindex.RagKVLLM(rag, SHORT).complete(QUESTION, **given),
    "Haystack's generator, made": lambda rag, given: haystack.RagKVGenerator(rag, {**SHORT, **given}).run(
        QUESTION, documents(rag)
    ),
    "Haystack's generator": lambda rag, given: haystack.RagKVGenerator(rag, SHORT).run(QUESTION, documents(rag), given),
    "Haystack's generator, awaited piece by piece": lambda rag, given: asyncio.run(haystack_pieces(rag, given)),
}


@pytest.fixture(scope="module")
def rag(model):
    with open_rag(model=model) as opened:
        opened.add_texts(list(DOCUMENTS.values())[:1], list(DOCUMENTS)[:1])
        yield opened


@pytest.mark.parametrize("how", CALLS)
def test_they_reach_the_line(rag, how):
    policy = Noting()
    rag.engine.scheduler = Scheduler(policy)
    CALLS[how](rag, {"priority": 3, "deadline_s": 60})
    assert policy.came == [(3, True)]
    CALLS[how](rag, {})
    assert policy.came == [(3, True), (0, False)]
    with pytest.raises(DeadlineError):
        CALLS[how](rag, {"deadline_s": 1e-9})
