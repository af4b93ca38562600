"""Chunks on their way from a pool: what needs none of them is computed meanwhile, and what is late is computed, exactly."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Timer
from time import perf_counter

import pytest
import torch

from ragkv import (
    Auto,
    CacheBlend,
    Engine,
    FullPrefill,
    LegoLink,
    PromptTemplate,
    Selection,
    SensitiveTokens,
    TieredStore,
    Union,
)
from ragkv.fusing import to_load
from ragkv.fusion.arriving import Arriving
from ragkv.fusion.course import Course
from ragkv.fusion.layout import Layout, lay_out
from ragkv.fusion.placement import Placement
from ragkv.methods.base import Method
from ragkv.model.turns import looking
from ragkv.store import CostProfile, Loading, Rates, RemoteTier
from ragkv.store.remote.pool import PoolError
from ragkv.testing import random_ids, tiny_model
from tests.scripts import load

simulation, links = load("simulation"), load("links")

TEMPLATE = PromptTemplate(prefix=[1, 5, 6], after_chunk=[10])
QUESTION = random_ids(9)
#: A tenth of a second a token, so that nothing is late but what never comes; and nearly nothing.
SLOW, QUICK = (CostProfile((0, 1000), (0, 1000), ((0.0, s), (0.0, s))) for s in (100.0, 0.01))


@pytest.mark.parametrize("speed", simulation.SPEEDS.values(), ids=simulation.SPEEDS)
@pytest.mark.parametrize("known", [True, False], ids=["known", "not known"])
@pytest.mark.parametrize(("chunks", "tokens"), [(16, 256), (4, 128)])
def test_within_both_bounds_over_links_that_drop(chunks, tokens, speed, known):
    """On a clock of its own: 10 % of computing, and of long prompts 15 % of the better of loading and computing."""
    tokens_per_s, token_bytes = simulation.MACHINES["small"]
    rates, layout = simulation.figures(tokens_per_s, token_bytes), simulation.prompt(chunks, tokens)
    full_s = rates.compute_s(layout.tokens)
    same = layout, rates, token_bytes
    steady = simulation.simulate(SensitiveTokens(), *same, simulation.Link([(0.0, speed)]), None)
    for kind, trace in simulation.traces(speed, full_s).items():
        loaded = simulation.simulate(SensitiveTokens(), *same, simulation.Link(trace), None)
        own = simulation.simulate(
            Auto(), *same, simulation.Link(trace), *((steady.seen, steady.start_s) if known else (None,))
        )
        assert own.seconds <= 1.1 * full_s, (kind, own)
        if chunks > 4 and kind != "ten times as fast":  # which the next prompt knows
            assert own.seconds <= 1.15 * min(loaded.seconds, full_s), (kind, own)
        if known and not trace[-1][1] and kind == "to nothing at once":
            assert own.late + own.method.startswith("Full") and own.seen <= steady.seen


def test_where_loading_and_computing_are_equally_fast_it_is_faster_than_both():
    tokens_per_s, token_bytes = simulation.MACHINES["small"]
    rates, layout = simulation.figures(tokens_per_s, token_bytes), simulation.prompt(16, 256)
    full_s = rates.compute_s(layout.tokens)
    speed = token_bytes * layout.tokens / full_s
    own = simulation.simulate(Auto(), layout, rates, token_bytes, simulation.Link([(0.0, speed)]), speed)
    assert own.seconds < 0.75 * full_s
    assert own.seconds == pytest.approx(own.reckoned["chosen"] / 1e3, rel=0.1), "it is what was reckoned"
    assert own.reckoned["computed"] == pytest.approx(full_s * 1e3) and own.reckoned["loaded"] > own.reckoned["chosen"]


@dataclass(frozen=True)
class These(Method):
    """Computes just these slots."""

    slots: tuple[int, ...]

    def select(self, view):
        return torch.tensor(self.slots, dtype=torch.long)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def parts():
    return [random_ids(64, seed=number) for number in range(4)]


@pytest.fixture
def ready(model, parts, tmp_path, monkeypatch):
    """A machine that has the chunks, and makes others that have them over a link, of which little comes with the header."""
    monkeypatch.setattr("ragkv.methods.auto.patience_s", lambda *_: 10.0)
    monkeypatch.setattr("ragkv.store.remote.records._HEAD_BYTES", 2_000)
    url, opened = f"memory://{tmp_path}", []
    one = Engine(model, template=TEMPLATE, store=TieredStore(remote=url))
    chunks = [chunk for pair in (parts[:2], parts[2:]) for chunk in one.add_document(pair)]
    one.store.flush()

    def make(trace, costs, paths=False, **tiers):
        pool = links.LinkPool.open(url, 3.0, 16)
        pool.trace = trace
        tier = RemoteTier(pool, range_bytes=8_000)
        store = TieredStore(tmp_path / f"machine{len(opened)}", cpu_bytes=0, remote=tier)
        opened.append(Engine(model, template=TEMPLATE, store=store, paths=paths))
        return opened[-1], Auto(SensitiveTokens(0.2), Rates(costs, tiers))

    yield one, chunks[2:] + chunks[:2], make
    for engine in (*opened, one):
        engine.close()


def exact(one, chunks, prompt):
    """What was computed is as if nothing else had been there to choose."""
    slots = tuple(slot for slot in prompt.recomputed.tolist() if slot < prompt.input_ids.shape[1] - len(QUESTION))
    want = one.fuse(chunks, QUESTION, method=These(slots))
    torch.testing.assert_close(prompt.logits, want.logits, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(prompt.past_key_values.layers, want.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_what_never_comes_is_computed(ready, reads):
    """Nothing was damaged: the chunks are where they were, for a better day, and nothing is read or stored anew."""
    one, chunks, make = ready
    two, method = make([(0.0, 1e9), (8_000.0, 0.0)], QUICK)
    read = reads(two)
    prompt = two.fuse(chunks, QUESTION, method=method)
    assert prompt.report.hits == {"late": 4} and not read and len(two.store) == 0
    assert prompt.report.why == "4 chunks came too slowly and were computed"
    stats = two.store.stats()
    assert (stats.pools["remote"].late, stats.pools["remote"].unanswered) == (4, 0) and not stats.evictions["remote"]
    assert two.store.loading()["remote"].bytes_per_s < 1e9, "the next prompt knows how slow it is"
    torch.testing.assert_close(
        prompt.logits, one.fuse(chunks, QUESTION, method="full-prefill").logits, atol=1e-4, rtol=1e-4
    )
    exact(one, chunks, prompt)
    assert not two.store.missing(one.documents.keys(chunks))


def test_what_is_computed_is_not_even_opened(ready, monkeypatch):
    """Nor moved to memory for a prompt that waits for its turn."""
    one, chunks, make = ready
    size = one.store.stats().bytes["cpu"] / 256
    slow = Loading(10 * size, size, 0.0, beside=True)  # as fast as computing
    two, method = make([(0.0, 1e9)], SLOW)
    pool, asked = two.store.remote._pool, set()
    begin = pool.begin
    monkeypatch.setattr(pool, "begin", lambda name, *place: asked.add(name) or begin(name, *place))
    monkeypatch.setattr(two.store.remote, "loading", lambda: slow)
    method = Auto(SensitiveTokens(0.2), Rates(SLOW, {"remote": slow}))
    layout = lay_out((1, 5, 6), (), chunks, QUESTION, torch.device("cpu"))
    keys = [two.documents.key(chunk) for chunk in chunks]
    methods = [method, Union(LegoLink(2), method), CacheBlend(0.2), FullPrefill()]
    moved = [to_load(two.documents, layout, each) for each in methods]
    prompt = two.fuse(chunks, QUESTION, method=method)
    hits = prompt.report.hits
    assert set(hits) == {"remote", "unused"} and len(asked) == hits["remote"]
    exact(one, chunks, prompt)
    assert moved == [keys[hits["unused"] :]] * 2 + [keys, []]


def test_headers_that_do_not_come_are_not_waited_for(ready, monkeypatch, reads, unwritten):
    one, chunks, make = ready
    monkeypatch.setattr("ragkv.methods.auto.patience_s", lambda *_: 0.02)
    two, method = make([(0.0, 1e9), (5_000.0, 0.0)], SLOW)
    read = reads(two)
    unwritten(two)
    prompt = two.fuse(chunks, QUESTION, method=method)
    assert prompt.report.sources[-1] == "late" and not read and not two.store.stats().pools["remote"].unanswered
    exact(one, chunks, prompt)


def test_a_chunk_that_stands_twice_is_given_up_at_both_places(ready):
    one, chunks, make = ready
    two, method = make([(0.0, 1e9), (8_000.0, 0.0)], QUICK)
    twice = [*chunks, chunks[0]]
    prompt = two.fuse(twice, QUESTION, method=method)
    assert prompt.report.sources == ["late"] * 5 and two.store.stats().pools["remote"].late == 4
    exact(one, twice, prompt)


def test_a_link_that_ends_in_the_middle(ready, unwritten, monkeypatch):
    """The last chunks have come and stay loaded, those in front are computed, whatever stood in the cache's memory."""
    one, chunks, make = ready
    two, method = make([(0.0, 1e9), (100_000.0, 0.0)], QUICK)
    unwritten(two)
    begin = Arriving.begin
    monkeypatch.setattr(Arriving, "begin", lambda self: begin(self) or self.here(len(chunks) - 1, 10))
    prompt = two.fuse(chunks, QUESTION, method=method)
    assert prompt.report.sources[0] == "late" and prompt.report.sources[-1] == "remote", prompt.report.sources
    exact(one, chunks, prompt)


def test_what_comes_while_its_chunk_is_begun_is_placed(ready, monkeypatch, unwritten):
    """Tokens that were computed meanwhile are then as they are stored, and no part is shown what nobody wrote."""
    one, chunks, make = ready
    two, _ = make([(0.0, 1e9)], SLOW)
    method = These(
        tuple(slot for slot in range(3, 263) if (slot - 3) % 65 % 30 < 20)
    )  # of each enough for a part of its own
    unwritten(two)
    asked = Counter()
    here = Arriving.here

    def late(self, number, limit_s):  # comes once its chunk was begun twice
        return asked[number] > 1 and here(self, number, 10)

    def begins(self, away, begun):
        asked[away[0]] += 1
        return 17, 0.0

    monkeypatch.setattr(Arriving, "here", late)
    monkeypatch.setattr(Course, "_meanwhile", begins)
    prompt = two.fuse(chunks, QUESTION, method=method)
    assert prompt.report.hits == {"remote": 4} and set(asked.values()) == {2}
    exact(one, chunks, prompt)


def test_what_is_computed_anyway_is_computed_while_the_others_come(ready):
    """By what was reckoned: the chunks in front, without a word from the pool."""
    one, chunks, make = ready
    size = sum(spec.token_bytes for spec in one.decoder.specs)
    two, method = make([(0.0, 1e9)], SLOW, remote=Loading(10 * size, size, 0.0, True))
    prompt = two.fuse(chunks, QUESTION, method=method)
    report = prompt.report
    assert report.sources[0] == "unused" and report.sources[-1] == "remote" and " of 4 from remote" in report.method
    assert report.reckoned["chosen"] < 0.8 * min(report.reckoned["loaded"], report.reckoned["computed"])
    assert report.as_dict()["reckoned"] == report.reckoned
    exact(one, chunks, prompt)


def test_a_method_that_was_asked_for_waits(ready):
    one, chunks, make = ready
    two, _ = make([(0.0, 2e6)], QUICK)
    prompt = two.fuse(chunks, QUESTION, method=SensitiveTokens(0.2))
    assert prompt.report.hits == {"remote": 4} and prompt.report.reckoned == {}
    exact(one, chunks, prompt)


@pytest.mark.parametrize("auto", [True, False], ids=["auto", "by name"])
def test_who_waits_ends_when_nobody_wants_the_prompt_any_more(ready, auto):
    """Though nothing comes: requests are cancelled, and all is there for the next one."""
    _, chunks, make = ready
    two, method = make([(0.0, 1e9), (8_000.0, 0.0)], SLOW)
    begin = perf_counter()

    def unwanted():
        if perf_counter() > begin + 0.3:
            raise KeyboardInterrupt

    with looking(unwanted), pytest.raises(KeyboardInterrupt):
        two.fuse(chunks, QUESTION, method=method if auto else SensitiveTokens(0.2))
    assert perf_counter() < begin + 2
    two.store.remote._pool.trace = [(0.0, 1e9)]
    assert two.fuse(chunks, QUESTION, method=SensitiveTokens(0.2)).report.hits == {"remote": 4}


def test_who_waits_ends_when_the_pool_gives_up(ready, monkeypatch, reads):
    """A request that its client ends, as it does at its limit, makes a chunk a miss: it is read, and the rest loaded."""
    one, chunks, make = ready
    two, _ = make([(0.0, 1e9)], QUICK)
    pool, read = two.store.remote._pool, reads(two)
    begin, failed = pool.begin, list[str]()

    def ends(name, start, stop):
        if start and not failed:
            failed.append(name)
            future = Future()
            Timer(0.2, future.set_exception, [PoolError("no answer for 0.2 s")]).start()
            return future
        return begin(name, start, stop)

    monkeypatch.setattr(pool, "begin", ends)
    prompt = two.fuse(chunks, QUESTION, method=SensitiveTokens(0.2))
    assert failed and read and prompt.report.hits["computed"] >= 1
    assert two.store.stats().pools["remote"].unanswered == 1
    exact(one, chunks, prompt)


@dataclass(frozen=True)
class Apart(Method):
    """Computes all but one token, and shows chunks nothing of each other."""

    def select(self, view):
        return Selection(view.layout.reusable[1:], context=torch.tensor([], dtype=torch.long))


@pytest.mark.parametrize("why", ["nothing", "many", "checks", "context", "positions", "layers", "paths"])
def test_what_cannot_go_on_meanwhile_waits(ready, monkeypatch, why):
    """Others, layers or positions that do not rise: all is loaded then, as docs/advise.md says."""
    _, chunks, make = ready
    two, method = make([(0.0, 1e9)], SLOW, **({"paths": True} if why == "paths" else {}))
    made = list[Layout]()
    monkeypatch.setattr("ragkv.fusing.Course", lambda layout, *rest: (made.append(layout), Course(layout, *rest))[1])
    if why == "layers":
        monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=True))
    method = {"checks": CacheBlend(0.2, check_layer=1), "context": Apart()}.get(why, method)
    starts = (400, 300, 200, 100) if why == "positions" else None
    if why == "many":
        prompts = two.fuse_many([(chunks, QUESTION), (chunks[:2], QUESTION)], method=method)
    else:
        prompts = [two.fuse(chunks, QUESTION, method=method, starts=starts)]
    assert bool(made) == (why == "nothing")
    assert all(not {"late", "computed"} & prompt.report.hits.keys() for prompt in prompts)


def test_what_a_path_settles_is_loaded_though_computing_it_is_faster(ready, unwritten):
    """It is never computed, so that it must be opened."""
    one, chunks, make = ready
    size = one.store.stats().bytes["cpu"] / 256
    two, _ = make([(0.0, 1e9)], SLOW, paths=True)
    unwritten(two)
    rates = Rates(SLOW, {"remote": Loading(5 * size, size, 0.0, beside=True)})
    order = [chunks[2], chunks[3], chunks[0], chunks[1]]  # the first document stands where it was read
    prompt = two.fuse(order, QUESTION, method=Auto(SensitiveTokens(0.2), rates))
    assert "of 4 from remote" in prompt.report.method
    exact(one, order, prompt)
