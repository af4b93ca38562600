"""Calls that are made at the same time stand in a line, and each answer is what it would be alone."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from ragkv import (
    ArgumentError,
    ArgumentTypeError,
    DeadlineError,
    Engine,
    LegoLink,
    OverloadedError,
    PromptTemplate,
    Reuse,
    Scheduler,
    TieredStore,
    bundled,
)
from ragkv.library.watching import watched
from ragkv.metrics import EngineCollector
from ragkv.scheduling import memory
from ragkv.scheduling import scheduler as module
from ragkv.scheduling.policies import FirstComeFirstServed
from ragkv.scheduling.ticket import Ticket
from ragkv.store.metrics import StoreCollector
from ragkv.streaming import stoppable
from ragkv.testing import random_ids, tiny_model

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10], before_question=[11], after_question=[12, 13])
QUESTION = random_ids(5)
NO_END = {"max_new_tokens": 6, "eos_token_id": None}
TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, fp32


class Noting(FirstComeFirstServed):
    """Notes who came, who began, and what each was served."""

    looks = True

    def __init__(self):
        self.began_in_order, self.served = [], {}

    def began(self, ticket, waiting):
        self.began_in_order.append(ticket)
        self.served[ticket] = [ticket.computed, 0]

    def spent(self, ticket, computed=0.0, output=0):
        self.served[ticket][0] += computed
        self.served[ticket][1] += output


def engine_with(store=None, **options):
    return Engine(tiny_model(), template=TEMPLATE, method=LegoLink(4), store=store, scheduler=Scheduler(**options))


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch):
    monkeypatch.setattr(module, "_COMPUTED", 1)


@contextmanager
def line_held(scheduler):
    """A block in which nobody begins."""
    with ExitStack() as stack, scheduler.turn(Ticket("", 1), stack):
        yield


def at_once(engine, calls):
    """Makes calls that stand in line in this order, and returns what they return or raise."""
    found = [None] * len(calls)

    def make(number):
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=make, args=(number,), daemon=True) for number in range(len(calls))]
    with line_held(engine.scheduler):
        for number, thread in enumerate(threads):
            thread.start()
            while engine.scheduler.stats().waiting < number + 1 and thread.is_alive():
                time.sleep(0.001)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize("policy", ["fcfs", "cached-first", "fair"])
@pytest.mark.parametrize("options", [{}, {"at_once": 2}, {"memory_bytes": 120 * TOKEN_BYTES}], ids=str)
def test_whoever_goes_first_each_answer_is_its_own(policy, options):
    engine = engine_with(policy=policy, **options)
    passages = [random_ids(n) for n in (17, 20, 31)]
    engine.add(passages[:1])
    asked = [([passages[n % 3], passages[(n + 1) % 3]], random_ids(5 + n), str(n % 2)) for n in range(6)]

    def ask(one):
        chunks, question, namespace = one
        return engine.generate(chunks, question, namespace=namespace, **NO_END).token_ids

    want = [ask(one) for one in asked]
    assert at_once(engine, [lambda one=one: ask(one) for one in asked]) == want
    stats = engine.scheduler.stats()
    assert (stats.waiting, stats.running, stats.bytes) == (0, 0, 0)
    assert [stats.namespaces[name].done for name in "01"] == [6, 6]
    assert stats.namespaces["0"].output_tokens == 6 * 6 and stats.namespaces["0"].waited_s > 0


def test_what_the_policy_is_told_is_what_was_done():
    policy = Noting()
    engine = engine_with(policy=policy)
    (first,) = engine.add([random_ids(30)], namespace="mine")
    answer = engine.generate([first, random_ids(20)], QUESTION, namespace="mine", **NO_END)
    (ticket,) = policy.began_in_order
    fusion = answer.report.fusion
    assert ticket.namespace == "mine"
    assert ticket.tokens == fusion.prefix_tokens + fusion.chunk_tokens + fusion.suffix_tokens
    assert ticket.reused == fusion.reused_tokens + len(first) and fusion.reused_tokens == 3
    assert policy.served[ticket] == [fusion.computed_tokens, 6]
    assert fusion.computed_tokens == ticket.computed + 4  # LegoLink's; the first chunk stands where it was read
    assert ticket.needs_bytes == (ticket.tokens + 6) * TOKEN_BYTES and ticket.answer_bytes == 6 * TOKEN_BYTES
    service = engine.scheduler.stats().namespaces["mine"]
    assert (service.output_tokens, service.computed_tokens) == (6, fusion.computed_tokens)
    assert service.reused_tokens == ticket.tokens - service.computed_tokens


def test_a_passage_that_stands_twice_is_read_once():
    engine, passage = engine_with(), random_ids(20)
    report = engine.fuse([passage, passage], QUESTION, method="reuse").report
    assert report.read_tokens == 21 and report.sources == ["computed"] * 2
    assert report.computed_tokens == report.prefix_tokens - report.reused_tokens + report.suffix_tokens + 21
    service = engine.stats().line.namespaces[""]
    assert (service.computed_tokens, service.reused_tokens) == (report.computed_tokens, 3 + 21)
    assert engine.fuse([passage, passage], QUESTION, method="reuse").report.read_tokens == 0


def test_priorities_and_what_is_stored():
    policy = Noting()
    engine = engine_with(policy=policy)
    calls = [
        lambda p=p: engine.generate([random_ids(20)], QUESTION, priority=p, max_new_tokens=1) for p in (0, -1, 3, 0)
    ]
    at_once(engine, calls)
    assert [ticket.priority for ticket in policy.began_in_order[1:]] == [3, 0, 0, -1]

    engine = engine_with(policy="cached-first")
    began, real = [], engine.scheduler.policy.began
    engine.scheduler.policy.began = lambda ticket, waiting: (began.append(ticket.reused), real(ticket, waiting))[1]
    stored = engine.add([random_ids(40)])
    at_once(
        engine,
        [lambda chunks=chunks: engine.generate(chunks, QUESTION, **NO_END) for chunks in ([random_ids(41)], stored)],
    )
    assert began[1] > 40 > began[2]


def test_what_waits_is_moved_to_memory_meanwhile(tmp_path):
    with engine_with(store=TieredStore(tmp_path, cpu_bytes=1 << 20)) as engine:
        chunks = engine.add([random_ids(40)])
        want = engine.generate(chunks, QUESTION, **NO_END).token_ids
    with engine_with(store=TieredStore(tmp_path, cpu_bytes=1 << 20)) as engine:
        key = engine.documents.key(chunks[0])
        assert engine.store.where([key]) == {key: "disk"}
        found = []
        with line_held(engine.scheduler):
            asking = threading.Thread(target=lambda: found.append(engine.generate(chunks, QUESTION, **NO_END)))
            asking.start()
            begin = time.monotonic()
            while engine.store.where([key]) == {key: "disk"} and time.monotonic() < begin + 30:
                time.sleep(0.001)
            assert engine.store.where([key]) == {key: "cpu"}
        asking.join(30)
        assert found[0].token_ids == want


def test_deadlines():
    engine = engine_with()
    chunks = engine.add([random_ids(20)])
    engine.generate(chunks, QUESTION, deadline_s=60, **NO_END)

    def slowly(ids, scores):
        time.sleep(0.05)
        return scores

    with pytest.raises(DeadlineError, match="not done at its deadline"):
        engine.generate(
            chunks, QUESTION, deadline_s=1, logits_processor=[slowly], max_new_tokens=200, eos_token_id=None
        )
    with line_held(engine.scheduler), pytest.raises(DeadlineError, match="turn had not come"):
        in_thread(lambda: engine.generate(chunks, QUESTION, deadline_s=0.05))
    ran = []
    with pytest.raises(DeadlineError, match="not done at its deadline"):
        slow = [lambda ids, scores: (ran.append(1), slowly(ids, scores))[1]]
        engine.generate(
            *(chunks, QUESTION),
            deadline_s=1,
            num_beams=2,
            logits_processor=slow,
            max_new_tokens=200,
            eos_token_id=None,
        )
    assert len(ran) < 100  # at the next token
    assert engine.scheduler.stats().running == engine.scheduler.stats().waiting == 0
    assert not engine.runner.steps()._seats


def test_a_deadline_counts_from_the_call():
    """Also where a thread of the event loop has to become free, and a stream is not read at once."""
    engine, free = engine_with(), threading.Event()

    async def ask():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(free.wait, 60)
            asked = asyncio.ensure_future(
                stoppable(pool, engine.generate, chunks=[], question=QUESTION, deadline_s=0.05)
            )
            await asyncio.sleep(0.1)
            free.set()
            await asked

    with pytest.raises(DeadlineError, match="turn had not come"):
        asyncio.run(ask())
    engine = Engine(*bundled.load())
    stream = engine.stream([], "Where?", deadline_s=0.01)
    time.sleep(0.02)
    with pytest.raises(DeadlineError, match="turn had not come"):
        next(stream)


def in_thread(call):
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def test_all_that_is_begun_gives_back_what_it_holds(engine_of_bundled):
    engine, line = engine_of_bundled, engine_of_bundled.scheduler
    chunks = engine.add(["Clearport lies on the river Arn."])
    engine.fuse(chunks, "Where?")
    assert line.stats().running == 0
    engine.generate(chunks, "Where?", num_beams=2, max_new_tokens=3)
    assert line.stats().running == 0
    stream = engine.stream(chunks, "Where?", max_new_tokens=5, eos_token_id=None)
    assert line.stats().running == 0  # nothing is computed yet
    next(stream)
    assert line.stats().running == 1
    stream.close()
    assert line.stats().running == 0
    stream = engine.stream(chunks, "Where?", max_new_tokens=5, eos_token_id=None)
    next(stream)
    del stream
    assert line.stats().running == 0
    past = engine.generate(chunks, "Where?", max_new_tokens=3, keep_past=True).past
    assert "".join(engine.stream([], "And?", past=past, max_new_tokens=3)) is not None
    assert line.stats().running == 0
    with pytest.raises(ZeroDivisionError):
        engine.generate(chunks, "Where?", logits_processor=[lambda ids, scores: 1 / 0])
    assert line.stats().running == 0


@pytest.fixture
def engine_of_bundled():
    return Engine(*bundled.load())


def test_a_call_within_a_turn_of_the_model_does_not_wait():
    """Whoever holds the model would wait for those who wait for it."""
    engine = engine_with()
    chunks = engine.add([random_ids(20)])
    want = engine.generate(chunks, QUESTION, **NO_END).token_ids
    with line_held(engine.scheduler), engine.runner.turn():
        assert engine.generate(chunks, QUESTION, **NO_END).token_ids == want
        assert len(engine.fuse_many([(chunks, QUESTION)] * 2)) == 2


class Asks(Reuse):
    """A method that asks the engine itself."""

    def __init__(self, ask):
        super().__init__()
        self.ask = ask

    def select(self, view):
        self.ask()
        return super().select(view)


def test_a_call_within_a_turn_of_the_line_does_not_wait():
    """A method of one's own, or whoever is told how far reading is, may ask: it would wait for itself."""
    engine = engine_with(wait_s=1)
    chunks, found = engine.add([random_ids(20)]), []
    want = engine.generate(chunks, QUESTION, **NO_END).token_ids

    def ask():
        found.append(engine.generate(chunks, QUESTION, **NO_END).token_ids)
        (prompt,) = engine.fuse_many([(chunks, QUESTION)])
        found.append([prompt.logits.argmax().item(), *want[1:]])

    engine.generate(chunks, QUESTION, method=Asks(ask), **NO_END)
    assert found == [want] * 2
    engine.fuse_many([(chunks, QUESTION), (chunks, random_ids(7))], method=Asks(ask))
    assert found == [want] * 6
    with watched(lambda *_: ask()):
        engine.generate([random_ids(11)], QUESTION, **NO_END)
    assert len(found) > 6 and found == [want] * len(found)
    assert engine.scheduler.stats().running == 0


def test_a_line_for_several_engines():
    line = Scheduler(at_once=1)
    one, other = (
        Engine(tiny_model(seed=seed), template=TEMPLATE, method=LegoLink(4), scheduler=line) for seed in (0, 1)
    )
    calls = [lambda engine=engine: engine.generate([random_ids(20)], QUESTION, **NO_END) for engine in (one, other)]
    want = [call().token_ids for call in calls]
    line.at_once = 2
    assert [answer.token_ids for answer in at_once(one, calls)] == want
    assert line.stats().namespaces[""].done == 5


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": "high"}, ArgumentTypeError),
        ({"deadline_s": 0}, ArgumentError),
        ({"deadline_s": "soon"}, ArgumentError),
        ({"deadline_s": 10**400}, ArgumentError),  # beyond all floats
    ],
)
def test_bad_arguments_are_named(engine, options, error):
    with pytest.raises(error, match=next(iter(options))):
        engine.stream([random_ids(5)], QUESTION, **options)


def test_what_never_fits_is_refused(engine):
    engine.scheduler = Scheduler(memory_bytes=30 * TOKEN_BYTES)
    assert engine.generate([random_ids(5)], QUESTION, max_new_tokens=5)
    with pytest.raises(OverloadedError, match="give fewer chunks"):
        engine.generate([random_ids(30)], QUESTION, max_new_tokens=5)
    with pytest.raises(ArgumentTypeError, match="must be a ragkv"):
        Engine(engine.model, scheduler="fair")


def test_what_takes_all_memory_is_refused(monkeypatch):
    """Without a bound of one's own, too, and before anything is computed."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 20)
    engine = engine_with()
    chunks = engine.add([random_ids(20)])
    with engine.runner.turn():  # nothing would be computed now
        for options in ({"num_beams": 10_000}, {"max_new_tokens": 1900}):
            with pytest.raises(OverloadedError, match="more than the 1,048,576 there are"):
                in_thread(lambda options=options: engine.generate(chunks, QUESTION, **options))
        with pytest.raises(OverloadedError, match="there are"):
            in_thread(lambda: engine.fuse(chunks, QUESTION, room_tokens=1900))
    assert engine.generate(chunks, QUESTION, **NO_END).token_ids
    assert engine.scheduler.stats().waiting == engine.scheduler.stats().running == 0


def test_a_past_is_in_memory_already(monkeypatch):
    engine = engine_with()
    past = engine.generate([random_ids(200)], QUESTION, keep_past=True, **NO_END).past
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100 * TOKEN_BYTES)
    assert engine.generate([], QUESTION, past=past, **NO_END).token_ids
    with pytest.raises(OverloadedError, match="there are"):
        engine.generate([random_ids(200)], QUESTION, **NO_END)


def test_figures(engine):
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    EngineCollector(engine, registry)
    chunks = engine.add([random_ids(20)])
    for _ in range(2):
        engine.generate(chunks, QUESTION, namespace="mine", **NO_END)
    stats = engine.stats()
    assert stats.line.namespaces["mine"].done == 2 and stats.store.puts > 0
    assert sum(stats.forwards.values()) > 10 and min(stats.forwards) == 1
    value = registry.get_sample_value
    assert value("ragkv_output_tokens_total", {"namespace": "mine"}) == 12
    assert value("ragkv_requests_done_total", {"namespace": "mine"}) == 2
    assert value("ragkv_requests_waiting", {"namespace": "mine"}) == 0
    assert value("ragkv_service_seconds_total", {"namespace": "mine"}) > 0
    assert value("ragkv_prompts_bytes") == 0
    assert value("ragkv_forward_prompts_count") == sum(stats.forwards.values())
    assert value("ragkv_forward_prompts_bucket", {"le": "1"}) == stats.forwards[1]
    assert value("ragkv_forward_prompts_sum") == sum(size * n for size, n in stats.forwards.items())


def test_a_registry_takes_one_engine_and_one_store_and_outlives_both(engine):
    client = pytest.importorskip("prometheus_client")
    from prometheus_client.parser import text_string_to_metric_families

    registry, names = client.CollectorRegistry(), ('a"b', "a\nb\\", "é{}", "")
    EngineCollector(engine, registry)
    StoreCollector(engine.store, registry)
    for namespace in names:
        engine.generate(engine.add([random_ids(9)], namespace=namespace), QUESTION, namespace=namespace, **NO_END)
    other = engine_with()
    for collector, its in ((EngineCollector, other), (StoreCollector, other.store)):
        with pytest.raises(ArgumentError, match="needs a registry of its own"):
            collector(its, registry)
    engine.close()
    text = client.generate_latest(registry).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert {one.labels["namespace"] for one in found["ragkv_requests_done"].samples} >= set(names)
    assert not any("store" in name for name in found)
