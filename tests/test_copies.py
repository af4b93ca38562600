"""What is copied, and what goes to another process: plain values do, and what holds threads and files says what to do instead."""

import pickle  # noqa: TID251 - as multiprocessing does it
from copy import copy, deepcopy
from dataclasses import replace

import pytest
import torch

import ragkv
from ragkv import Fair, Scheduler
from ragkv.errors import ArgumentTypeError, IncompleteAnswerError
from ragkv.fusion.timing import Timer
from ragkv.retrieval import FaissIndex, Retrieval, SentenceTransformerEmbedder
from ragkv.store.remote import RemoteTier

from .rag.rags import QUESTION, open_rag

WAYS = {"pickled": lambda thing: pickle.loads(pickle.dumps(thing)), "deep-copied": deepcopy}


@pytest.fixture(scope="module")
def rag():
    with open_rag(scheduler=Scheduler(Fair({"paying": 3.0}), wait_s=7)) as rag:
        rag.add_texts(["Clearport lies on the Aire. She runs it.", "Mills stand on the Calder."], ["a", "b"])
        yield rag


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def copied(request):
    return request.param


def test_what_is_of_one_process_says_what_to_do(rag, copied):
    engine, answer = rag.engine, rag.ask(QUESTION, max_new_tokens=2, keep_past=True)
    told = {
        r"RAG cannot be .*ragkv\.RAG\.open\(path\)": (rag, {"rag": rag}),
        r"Engine cannot be .*store=ragkv\.TieredStore\(path\)": (engine,),
        r"TieredStore cannot be .*open its folder": (engine.store,),
        r"Retriever cannot be .*open its folder": (rag.retriever,),
        r"Catalogue cannot be .*open its folder": (rag.retriever.catalogue,),
        r"Index cannot be .*catalogue": (rag.retriever.index, FaissIndex(3)),
        r"RemoteTier cannot be .*RemoteTier\(url\)": (RemoteTier("memory://x"),),
        r"Session cannot be .*messages": (rag.session(),),
        r"Past cannot be .*past=None": (answer, answer.past),
        r"Stream cannot be .*read it where it was begun": (rag.stream(QUESTION)[1],),
        r"Embedder cannot be .*name or folder": (object.__new__(SentenceTransformerEmbedder),),
    }
    for match, things in told.items():
        for thing in things:
            with pytest.raises(ArgumentTypeError, match=match):
                copied(thing)
    assert copied(replace(answer, past=None)).text == answer.text
    assert copy(rag).ask(QUESTION, max_new_tokens=2).text == answer.text  # which is no other object behind it


def test_an_async_stream_is_of_one_process_too(rag, copied):
    with pytest.raises(ArgumentTypeError, match="AsyncAnswerStream cannot be"):
        copied(rag.astream(QUESTION))


def test_plain_values_are_copied(rag, copied):
    answer, hits = rag.ask(QUESTION, max_new_tokens=2, logprobs=1), rag.retrieve(QUESTION)
    plain = [
        answer,
        answer.report,
        hits,
        rag.documents(),
        rag.engine.stats(),
        rag.engine.template,
        rag.plan_files([__file__]),
    ]
    plain += [
        rag.add_texts(["A third."], ["c"]),
        rag.remove("c"),
        Retrieval(top_k=3, where={"a": 1}),
        ragkv.Gate(share=0.1, kl=1.0),
    ]
    plain += [
        getattr(ragkv, name)() for name in ("Auto", "CacheBlend", "FullPrefill", "LegoLink", "RelevantTokens", "Reuse")
    ]
    plain += [ragkv.Union(ragkv.Reuse(), ragkv.LegoLink(4)), ragkv.PromptTemplate(prefix=[1])]
    for value in plain:
        assert copied(value) == value
    chunks = rag.chunks(hits)
    for twin, chunk in zip(copied(chunks), chunks, strict=True):
        assert twin.to_dict() == chunk.to_dict() and [one.ids for one in twin.lineage()] == [
            one.ids for one in chunk.lineage()
        ]
    parts = rag.engine.add_document(["One part.", "Another."])
    assert rag.engine.generate(copied(parts), "Which?", max_new_tokens=2).report.fusion.hits == {"cpu": 2}
    assert copied(Fair({"a": 2.0})).shares == {"a": 2.0}


def test_a_prompt_is_decoded_from_its_copy(rag, copied):
    prompt = rag.engine.fuse(rag.chunks(rag.retrieve(QUESTION)), QUESTION)
    twin = copied(prompt)
    assert torch.equal(twin.logits, prompt.logits)
    rows = torch.zeros(1, 2, 1, 16)
    twin.past_key_values.layers[0].update(rows, rows)
    assert twin.past_key_values.get_seq_length(0) == prompt.past_key_values.get_seq_length(0) + 1
    twin.spoken(1)
    assert twin.report.milliseconds == prompt.report.milliseconds


def test_the_times_of_a_device_are_copied_and_not_its_events(copied):
    class Events:
        def mark(self):
            return lambda: None  # as an event, it cannot be pickled

        def between(self, begin, end):
            return 1.0

    timer = Timer(Events(), None)
    with timer.stage("place"):
        pass
    assert copied(timer).milliseconds() == timer.milliseconds()
    assert timer.milliseconds()["place"] == 1e3


def test_a_scheduler_is_copied_as_it_was_made(rag, copied):
    rag.ask(QUESTION, max_new_tokens=2)
    scheduler = copied(rag.engine.scheduler)
    assert (scheduler.wait_s, scheduler.at_once, scheduler.memory_bytes) == (7, None, None)
    assert scheduler.policy is not rag.engine.scheduler.policy and scheduler.policy.shares == {"paying": 3.0}
    assert scheduler.stats().namespaces == {}


def test_an_error_keeps_what_it_says(copied):
    error = IncompleteAnswerError('{"a": ')
    assert (str(copied(error)), copied(error).text) == (str(error), error.text)
