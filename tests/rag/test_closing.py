"""Closing ends, whoever waits: those in the line are told so, and a stream that nobody reads holds nobody up."""

import asyncio
import threading
import time

import pytest

from ragkv import Engine, Gate, LegoLink, PromptTemplate, RagKVError, Reuse, Scheduler, StoreError, TieredStore
from ragkv.folder import Environment
from ragkv.testing import random_ids, tiny_model

from .rags import DOCUMENTS, QUESTION, open_rag

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture
def rag(model):
    """One answer at a time: who asks behind a stream that is not read to its end waits."""
    opened = open_rag(model=model, scheduler=Scheduler(at_once=1))
    opened.add_texts(list(DOCUMENTS.values())[:1], list(DOCUMENTS)[:1])
    yield opened
    opened.close()


class Begun:
    """A call in a thread of its own."""

    def __init__(self, call):
        self.value = self.error = None
        self.thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self.thread.start()

    def _run(self, call):
        try:
            self.value = call()
        except Exception as error:
            self.error = error

    def ended(self):
        self.thread.join(30)
        assert not self.thread.is_alive(), "it waits for ever"
        return self


def waited_for(holds):
    while not holds():
        time.sleep(0.001)


def in_line(engine, call, many=1):
    begun = Begun(call)
    waited_for(lambda: engine.scheduler.stats().waiting == many or not begun.thread.is_alive())
    return begun


async def listened(stream):
    return [piece async for piece in stream]


WAITING = {
    "ask": lambda rag: rag.ask(QUESTION, **SHORT),
    "ask_many": lambda rag: rag.ask_many([QUESTION] * 3, **SHORT),
    "aask": lambda rag: asyncio.run(rag.aask(QUESTION, **SHORT)),
    "stream": lambda rag: "".join(rag.stream(QUESTION, **SHORT)[1]),
    "astream": lambda rag: asyncio.run(listened(rag.astream(QUESTION, **SHORT))),
    "session.ask": lambda rag: rag.session().ask(QUESTION, **SHORT),
    "session.aask": lambda rag: asyncio.run(rag.session().aask(QUESTION, **SHORT)),
    "fuse": lambda rag: rag.engine.fuse(["Clearport."], QUESTION),
    "fuse_many": lambda rag: rag.engine.fuse_many([(["Clearport."], QUESTION)] * 2),
}
CLOSING = {"engine": lambda rag: rag.engine.close(), "rag": lambda rag: rag.close(), "with": lambda rag: rag.__exit__()}


@pytest.mark.parametrize(
    ("waiting", "close"),
    [*((waiting, "rag") for waiting in WAITING), ("ask", "engine"), ("aask", "engine"), ("aask", "with")],
)
def test_who_waits_behind_a_stream_that_nobody_reads_is_told_of_the_end(rag, waiting, close):
    _, stream = rag.stream(QUESTION, **SHORT)
    next(stream)
    asked = in_line(rag.engine, lambda: WAITING[waiting](rag), 3 if waiting == "ask_many" else 1)
    closing = Begun(lambda: CLOSING[close](rag)).ended()
    assert closing.error is None
    assert type(asked.ended().error) is RagKVError and "closed" in str(asked.error)
    for _ in range(2):
        with pytest.raises(RagKVError, match="closed"):
            next(stream)
    line = rag.engine.scheduler.stats()
    assert (line.waiting, line.running, line.bytes) == (0, 0, 0)
    rag.close()


def test_what_is_asked_behind_the_end_is_told_so_too(rag):
    streams = [rag.stream(QUESTION, **SHORT)[1], rag.session().stream(QUESTION, **SHORT)[1]]
    rag.close()
    for call in (lambda: next(streams[0]), lambda: next(streams[1]), lambda: rag.engine.generate([], QUESTION)):
        with pytest.raises(RagKVError, match="closed"):
            call()


def test_another_engine_in_the_same_line_goes_on(rag):
    other = Engine(tiny_model(), template=TEMPLATE, method=Reuse(), scheduler=rag.engine.scheduler)
    want = other.generate([random_ids(9)], [7], max_new_tokens=3, eos_token_id=None).token_ids
    _, stream = rag.stream(QUESTION, **SHORT)
    next(stream)
    asked = in_line(rag.engine, lambda: other.generate([random_ids(9)], [7], max_new_tokens=3, eos_token_id=None))
    Begun(rag.close).ended()
    with pytest.raises(RagKVError, match="closed"):
        next(stream)
    assert asked.ended().value.token_ids == want


class Held(LegoLink):
    """Chooses when it is let go, with the prompt's chunks open in the store."""

    needs_sensitivity = True

    def __init__(self):
        super().__init__(4)
        self.begun, self.go = threading.Event(), threading.Event()

    def select(self, view):
        _ = view.sensitivity
        self.begun.set()
        assert self.go.wait(30)
        return super().select(view)


@pytest.mark.parametrize("ask", ["generate", "fuse_many"])
def test_a_prompt_that_is_computed_is_waited_for(ask):
    method = Held()
    engine = Engine(tiny_model(), template=TEMPLATE, method=method)
    chunks, asked = engine.add([random_ids(20)]), {"max_new_tokens": 3, "eos_token_id": None}
    calls = {
        "generate": lambda: engine.generate(chunks, [7], **asked).token_ids[0],
        "fuse_many": lambda: engine.fuse_many([(chunks, [7])] * 2)[1].logits.argmax().item(),
    }
    method.go.set()
    want = calls[ask]()
    method.go.clear()
    method.begun.clear()
    begun = Begun(calls[ask])
    assert method.begun.wait(30)
    closing = Begun(engine.close)
    waited_for(engine.closing.is_set)
    assert closing.thread.is_alive()
    method.go.set()
    assert closing.ended().error is None and begun.ended().value == want
    engine.close()


def test_an_answer_in_the_making_is_made(rag):
    """Of those in an event loop all: nobody else reads their pieces. A call's own thread goes on as well."""
    rag.engine.scheduler.at_once = None
    want, deciding, go = rag.ask(QUESTION, **SHORT).text, threading.Barrier(4), threading.Event()

    class Slow:
        def __init__(self):
            self.came = False

        def __call__(self, ids, scores):
            if not self.came:
                self.came = True
                deciding.wait(30)
                assert go.wait(30)
            return scores

    def options():
        return {**SHORT, "logits_processor": [Slow()]}

    begun = [
        Begun(lambda: rag.ask(QUESTION, **options()).text),
        Begun(lambda: asyncio.run(rag.aask(QUESTION, **options())).text),
        Begun(lambda: "".join(asyncio.run(listened(rag.astream(QUESTION, **options()))))),
    ]
    deciding.wait(30)
    closing = Begun(rag.close)
    waited_for(rag.engine.closing.is_set)
    go.set()
    assert closing.ended().error is None
    assert [each.ended().value for each in begun] == [want] * 3


def test_who_closes_within_its_own_prompt_is_told_so_and_waits_for_nobody():
    engine = Engine(tiny_model(), template=TEMPLATE)
    chunks, said = engine.add([random_ids(20)]), []

    class Closes(LegoLink):
        needs_sensitivity = True

        def select(self, view):
            _ = view.sensitivity
            with pytest.raises(StoreError, match="batches are open") as error:
                engine.close()
            said.append(error)
            return super().select(view)

    Begun(lambda: engine.fuse(chunks, [7], method=Closes(4))).ended()
    assert said
    engine.close()


def test_all_else_is_closed_where_something_cannot_be(model, tmp_path, monkeypatch):
    def fails():
        raise StoreError("the disk is full")

    opened, ended = open_rag(tmp_path, model=model, paths=TieredStore(cpu_bytes=1 << 20), gate=Gate()), []
    kept = [opened.retriever.catalogue.path, opened.engine.store.path]
    assert all(map(Environment.is_open, kept))
    monkeypatch.setattr(opened.engine.gate, "close", lambda: ended.append("gate"))
    monkeypatch.setattr(opened.engine.paths.store, "close", fails)
    monkeypatch.setattr(opened.finder, "close", fails)
    with pytest.raises(StoreError, match="the disk is full"):
        opened.close()
    assert ended == ["gate"] and not any(map(Environment.is_open, kept))
