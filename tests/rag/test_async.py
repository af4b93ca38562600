"""Questions in an event loop, and through a web service: the loop goes on, and who stops listening stops the model."""

import asyncio
import json
import runpy
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from ragkv import RagKVError, prompting
from ragkv.streaming import _AT_ONCE

from .rags import QUESTION, open_rag

WEB = Path(__file__).parents[2] / "examples" / "web.py"
LONG = {"max_new_tokens": 400, "min_new_tokens": 400, "top_k": 2}  # it ends by being stopped


@pytest.fixture
def held(rag, monkeypatch):
    """Every prompt that is computed waits until it is let go."""
    go, begun, fuse = threading.Event(), threading.Event(), prompting.fuse

    def waiting(*args, **kwargs):
        begun.set()
        assert go.wait(60)
        return fuse(*args, **kwargs)

    monkeypatch.setattr(prompting, "fuse", waiting)
    yield begun, go
    go.set()


def test_the_answer_is_that_of_ask(rag):
    want = rag.ask(QUESTION, top_k=3, max_new_tokens=8)

    async def both():
        stream = rag.astream(QUESTION, top_k=3, max_new_tokens=8)
        return await rag.aask(QUESTION, top_k=3, max_new_tokens=8), [piece async for piece in stream], stream

    answer, pieces, stream = asyncio.run(both())
    assert (answer.text, answer.token_ids, answer.sources) == (want.text, want.token_ids, want.sources)
    assert ("".join(pieces), stream.token_ids, stream.sources) == (want.text, want.token_ids, want.sources)
    assert answer.report.fusion.hits == want.report.fusion.hits


def test_beams(rag):
    options = {"top_k": 2, "max_new_tokens": 4, "num_beams": 2}
    assert asyncio.run(rag.aask(QUESTION, **options)).token_ids == rag.ask(QUESTION, **options).token_ids


def test_the_loop_goes_on(rag, held):
    """The model is let go by the loop: if that waited for the model, both would wait for ever."""
    begun, go = held

    async def ask():
        asked = asyncio.ensure_future(rag.aask(QUESTION, max_new_tokens=3))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        go.set()
        return await asked

    assert len(asyncio.run(ask()).token_ids) == 3


def test_many_at_once_are_those_one_by_one(rag):
    questions = [f"{QUESTION} {number}" for number in range(20)]

    async def all_at_once():
        return await asyncio.gather(*[rag.aask(question, max_new_tokens=4) for question in questions])

    for question, answer in zip(questions, asyncio.run(all_at_once()), strict=True):
        assert answer.token_ids == rag.ask(question, max_new_tokens=4).token_ids


@pytest.mark.parametrize("how", ["aclose", "cancel", "leave the loop"])
def test_who_stops_listening_stops_the_model(rag, how):
    async def listen():
        stream = rag.astream(QUESTION, **LONG)
        if how == "cancel":
            waiting = asyncio.ensure_future(anext(stream))
            while not stream.token_ids:
                await asyncio.sleep(0.001)
            waiting.cancel()
        else:
            await anext(stream)
        if how == "aclose":
            await stream.aclose()
            await stream.aclose()
        return stream

    stream = asyncio.run(listen())
    rag.close()  # waits for whatever still runs
    assert 0 < len(stream.token_ids) < LONG["max_new_tokens"]


def test_a_loop_that_is_left_stops_the_model(rag):
    """While the event loop goes on, and nobody closes the stream."""

    async def left():
        session = rag.session()
        await session.aask(QUESTION, max_new_tokens=2)
        async for _ in session.astream(QUESTION, **LONG):
            break
        answer = await session.aask(QUESTION, max_new_tokens=2)  # behind what was left, which is waited for
        async for _ in rag.astream(QUESTION, **LONG):
            break
        await asyncio.to_thread(rag.threads.close)
        return answer

    assert asyncio.run(left()).text
    assert 0 < rag.engine.stats().line.namespaces[""].output_tokens < LONG["max_new_tokens"]


def test_a_stream_that_nobody_holds_stops_the_model_at_once(rag):
    """Not only when the event loop comes to close its generator: whoever goes on behind it may be there before."""

    async def dropped():
        stream = rag.astream(QUESTION, **LONG)
        await anext(stream)
        stop = stream._making.stop
        del stream
        return stop.is_set()

    assert asyncio.run(dropped())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio's own, of what waits for ever
@pytest.mark.parametrize("how", ["aask", "astream", "session"])
def test_a_loop_that_is_closed_stops_the_model(rag, how):
    """Without a task that is cancelled, or a generator that is closed; by tokens that have no text, so that no piece is said."""
    silent = {"stopping_criteria": [lambda *_, **__: begun.set() or False], "suppress_tokens": list(range(3, 1792))}
    loop, begun = asyncio.new_event_loop(), threading.Event()

    async def begin():
        asks = {"aask": rag.aask, "astream": lambda *given, **options: anext(rag.astream(*given, **options))}
        asked = asyncio.ensure_future(asks.get(how, rag.session().aask)(QUESTION, **LONG, **silent))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        return asked

    asked = loop.run_until_complete(begin())
    loop.close()
    rag.threads.close()  # waits for whatever still runs
    assert 0 < rag.engine.stats().line.namespaces[""].output_tokens < LONG["max_new_tokens"]
    asked._log_destroy_pending = False


def test_an_answer_that_nobody_waits_for_is_given_up(rag, monkeypatch):
    found, ask = [], rag.ask

    def kept(*args, **options):
        found.append(ask(*args, **options))
        return found[-1]

    monkeypatch.setattr(rag, "ask", kept)
    begun = threading.Event()

    async def cancelled():
        asked = asyncio.ensure_future(
            rag.aask(QUESTION, **LONG, stopping_criteria=[lambda *_, **__: begun.set() or False])
        )
        while not begun.is_set():
            await asyncio.sleep(0.001)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert asked.cancelled()

    asyncio.run(cancelled())
    rag.close()
    assert 0 < len(found[0].token_ids) < LONG["max_new_tokens"]


@pytest.mark.parametrize("readers", [1, 2])
def test_a_piece_that_is_awaited_ends_with_the_stream(rag, held, readers):
    begun, go = held

    async def closed():
        stream = rag.astream(QUESTION, **LONG)
        waiting = asyncio.ensure_future(anext(stream))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        if readers > 1:
            with pytest.raises(RuntimeError, match="already running"):
                await anext(stream)
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(waiting, 60)
        go.set()

    asyncio.run(closed())


def test_questions_not_begun_are_told_of_the_end(rag, held):
    """Be they in the line, or not even that; the two that are computed are answered."""
    _, go = held

    async def closed():
        asked = [asyncio.ensure_future(rag.aask(QUESTION, max_new_tokens=2)) for _ in range(_AT_ONCE + 1)]
        asked += [asyncio.ensure_future(anext(rag.astream(QUESTION, max_new_tokens=2))) for _ in range(2)]
        while rag.engine.scheduler.stats().waiting < _AT_ONCE - 2:
            await asyncio.sleep(0.001)
        closing = asyncio.ensure_future(asyncio.to_thread(rag.close))
        late = await asyncio.wait_for(asyncio.gather(*asked[_AT_ONCE:], return_exceptions=True), 60)
        go.set()
        await closing
        return late, await asyncio.gather(*asked[:_AT_ONCE], return_exceptions=True)

    late, begun = asyncio.run(closed())
    assert [type(error) for error in late] == [RagKVError] * 3
    assert [len(each.token_ids) for each in begun if not isinstance(each, RagKVError)] == [2, 2]


def test_a_fork_has_threads_of_its_own(rag, forked):
    rag.threads.pool().submit(int).result()
    assert forked(lambda: rag.threads.pool().submit(int).result(60)) == "0"


def test_cancelled_before_it_begins(rag, held):
    begun, go = held

    async def cancelled():
        running = [
            asyncio.ensure_future(rag.aask(QUESTION, max_new_tokens=2)) for _ in range(9)
        ]  # one more than begin at once
        while not begun.is_set():
            await asyncio.sleep(0.001)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        go.set()
        return await rag.aask(QUESTION, max_new_tokens=2)

    assert len(asyncio.run(cancelled()).token_ids) == 2


def test_errors_come_through(model):
    with open_rag(model=model) as rag, pytest.raises(RagKVError, match="no documents yet"):
        asyncio.run(rag.aask(QUESTION))
    with pytest.raises(RagKVError, match="closed"):
        asyncio.run(rag.aask(QUESTION))


@contextmanager
def served(app):
    """The address at which an app answers."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def events(text):
    """Names and values of server-sent events."""
    found = [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.strip().split("\n\n")]
    return [(event.get("event", "message"), json.loads(event["data"])) for event in found]


def test_a_web_service(rag):
    questions = [f"{QUESTION} {number}" for number in range(20)]

    async def all_at_once(address):
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            return await asyncio.gather(*[client.get("/ask", params={"question": question}) for question in questions])

    with served(runpy.run_path(str(WEB))["web"](rag, 4)) as address:
        replies = asyncio.run(all_at_once(address))
    for question, reply in zip(questions, replies, strict=True):
        *pieces, (name, sources) = events(reply.text)
        want = rag.ask(question, max_new_tokens=4)
        assert "".join(piece["text"] for _, piece in pieces) == want.text
        assert name == "sources"
        assert sources == [{"source": hit.source, "passage": hit.position + 1} for hit in want.sources]


def test_a_connection_that_is_closed_stops_the_model(rag, monkeypatch):
    streams, astream = [], rag.astream

    def long(question, **options):
        streams.append(astream(question, **LONG))
        return streams[-1]

    monkeypatch.setattr(rag, "astream", long)
    app = runpy.run_path(str(WEB))["web"](rag)
    with served(app) as address, httpx.stream("GET", f"{address}/ask?question=Where", timeout=120) as reply:
        next(reply.iter_lines())
    rag.close()
    assert 0 < len(streams[0].token_ids) < LONG["max_new_tokens"]
