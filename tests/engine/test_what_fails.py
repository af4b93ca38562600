"""An error does not hold what computed it: the memory of a prompt that failed is free for the next one, no collection needed."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import ref

import pytest

from ragkv import Engine, LegoLink, PromptTemplate, QuestionAware, RecordError
from ragkv.fusion.placement import Placement
from ragkv.model.cache import FusedCache
from ragkv.streaming import AsyncAnswerStream, in_thread, side_by_side, stoppable
from ragkv.testing import random_ids, tiny_model
from tests.model.test_graphs import Recorder

TEMPLATE, QUESTION = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10]), random_ids(6)
GENERATED = {"max_new_tokens": 4, "eos_token_id": None}


class BrokenError(Exception):
    pass


@pytest.fixture
def uncollected():
    """References alone tell when something goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def made(monkeypatch):
    """The caches of all prompts from here on, as long as somebody holds them."""
    caches, init = [], FusedCache.__init__

    def noted(cache, *args):
        caches.append(ref(cache))
        init(cache, *args)

    monkeypatch.setattr(FusedCache, "__init__", noted)
    return lambda rooms: [one for one in caches if one() is not None and all(one() is not room.cache for room in rooms)]


def rooms_of(engine):
    graphs = engine.documents.steps.graphs
    return [] if graphs is None else graphs._rooms._rooms


def opened(model, graphs, method):
    engine = Engine(model, template=TEMPLATE, kernels="reference", graphs=graphs, method=method)
    if graphs:
        engine.documents.steps.graphs.early = True
    return engine, engine.add([random_ids(n) for n in (30, 17, 41)])[::-1]


CALLS = {
    "fuse": lambda engine, chunks: engine.fuse(chunks, QUESTION),
    "generate": lambda engine, chunks: engine.generate(chunks, QUESTION, **GENERATED),
    "beams": lambda engine, chunks: engine.generate(chunks, QUESTION, num_beams=2, **GENERATED),
    "fuse_many": lambda engine, chunks: engine.fuse_many([(chunks, QUESTION), (chunks[:1], QUESTION)]),
    "generate_many": lambda engine, chunks: engine.generate_many(
        [(chunks, QUESTION), (chunks[:1], QUESTION)], **GENERATED
    ),
}


@pytest.mark.parametrize("graphs", [False, True], ids=["as it is", "fixed"])
@pytest.mark.parametrize("runs", [0, 2])  # of the model, before it breaks
@pytest.mark.parametrize("call", CALLS)
def test_no_prompt_is_left_where_the_model_raises(call, runs, graphs, made, uncollected, monkeypatch):
    model, ran = tiny_model(), []
    engine, chunks = opened(model, graphs, QuestionAware(0.3) if runs else LegoLink(3))
    mlp = model.model.layers[2].mlp
    forward = mlp.forward

    def broken(hidden):
        if len(ran) == runs:
            raise BrokenError
        ran.append(1)
        return forward(hidden)

    monkeypatch.setattr(mlp, "forward", broken)
    try:
        CALLS[call](engine, chunks)
    except BrokenError:
        pass
    assert not made(rooms_of(engine)) and len(ran) == runs


@pytest.mark.parametrize("graphs", [False, True], ids=["as it is", "fixed"])
@pytest.mark.parametrize("before", [0, 2])  # prompts
def test_what_is_made_again_finds_the_place_of_what_was_damaged(before, graphs, made, uncollected, monkeypatch):
    """Also where layers are placed while others compute."""
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
    engine, chunks = opened(tiny_model(), graphs, LegoLink(3))
    if graphs:
        engine.documents.steps.graphs._capture = Recorder()
    for _ in range(before):
        CALLS["generate"](engine, chunks)
    place, hurt, forward, seen = Placement._place_layer, [], engine.documents.steps.forward, []

    def damaged(self, layer):
        if layer == 3 and not hurt:
            hurt.append(1)
            raise RecordError("a bit was flipped")
        place(self, layer)

    def run(rows):
        seen.append(len(made(rooms_of(engine))))
        return forward(rows)

    monkeypatch.setattr(Placement, "_place_layer", damaged)
    monkeypatch.setattr(engine.documents.steps, "forward", run)
    CALLS["generate"](engine, chunks)
    assert hurt and set(seen) == {1} and not made(rooms_of(engine)) and len(rooms_of(engine)) == graphs


class Held:
    pass


@pytest.fixture
def fails():
    """What raises, and whether what it had is gone."""
    seen = []

    def fail(*items, **options):
        held = Held()
        seen.append(ref(held))
        raise BrokenError

    fail.gone = lambda: seen and all(one() is None for one in seen)
    return fail


def test_who_waits_for_several_holds_no_error(fails, uncollected):
    with pytest.raises(BrokenError):
        side_by_side(fails, [1, 2, 3], 2)
    assert fails.gone()


async def read(pool, start):
    async for _ in AsyncAnswerStream(start, pool):
        pass


@pytest.mark.parametrize("wait_for", [in_thread, stoppable, read])
def test_who_waits_in_an_event_loop_holds_no_error(wait_for, fails, uncollected):
    async def wait(pool):
        with pytest.raises(BrokenError):
            await wait_for(pool, fails)
        pool.submit(int).result()  # whoever worked has let go,
        await asyncio.sleep(0)  # and so has the loop
        assert fails.gone()

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(wait(pool))
