"""Rooms of fixed shapes: one prompt at a time has one, and leaves nothing of itself to the next."""

from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod
from time import sleep
from weakref import ref

import pytest
import torch

from ragkv import CacheBlend, LegoLink, QuestionAware, Reuse, TieredStore
from ragkv.fusion import placement
from ragkv.model import rooms
from ragkv.model.cache import FusedCache
from ragkv.model.graphs import row_bucket
from ragkv.model.rooms import Room, Rooms, room_bucket
from ragkv.model.rows import Rows
from ragkv.testing import random_ids, tiny_model

from .test_graphs import Recorder, close, engine, fused, said, same


def steps_of(capture=None):
    return engine(tiny_model(), True, capture).documents.steps


def alike(cache, other):
    for a, b in zip(cache.layers, other.layers, strict=True):
        close(a.values, b.values)


@pytest.fixture
def small(monkeypatch):
    """Rooms that are soon too small."""
    monkeypatch.setattr(rooms, "_SMALLEST", 4)


def entered(capacity=40):
    decoder = engine(tiny_model(), False).decoder
    found, cache = Rooms(lambda room: None), decoder.cache(capacity)
    return found, cache, found.enter(cache, 0, capacity, decoder.specs), decoder


def run(steps, cache, ids, first, forward=None):
    rows = Rows(ids[first:], torch.arange(first, len(ids)), cache, first=first)
    return (forward or steps.forward)(rows), rows.ran


def test_rooms_are_taken_by_one_at_a_time():
    decoder, dropped = engine(tiny_model(), False).decoder, []
    found = Rooms(dropped.append)
    caches = [decoder.cache(40) for _ in range(4)]
    first = found.enter(caches[0], 0, 40, decoder.specs)
    assert first.slots == 256 and first.hosts(caches[0]) and found.find(caches[0]) is first
    second = found.enter(caches[1], 0, 300, decoder.specs)
    assert second.slots == 320
    assert found.enter(caches[2], 0, 40, decoder.specs) is None
    found.leave(caches[0])
    assert caches[0].layers[0].key_room.shape[2] == 40 and found.find(caches[0]) is None
    assert found.enter(caches[2], 0, 40, decoder.specs) is first and not dropped
    del caches[2:]  # nobody says that it leaves
    larger = found.enter(caches[0], 0, 2000, decoder.specs)
    assert larger.slots == 2048 and dropped == [first]


def test_who_grew_out_of_a_room_in_part_shares_nothing_behind_it():
    found, cache, room, _ = entered()
    cache.layers[0]._grow(400)  # and the pass failed in the next layer
    found.leave(cache)
    assert room.guest is None
    for layer, shared in zip(cache.layers, room.cache.layers, strict=True):
        assert layer.key_room is not shared.key_room and layer.value_room is not shared.value_room


def test_what_ran_as_it_is_in_a_room_is_cleared_too():
    found, cache, room, decoder = entered()
    for layer, spec in zip(cache.layers, decoder.specs, strict=True):
        layer.update(*(torch.full((1, spec.heads, 60, dim), torch.nan) for dim in (spec.key_dim, spec.value_dim)))
    found.leave(cache)
    for layer in room.cache.layers:
        layer.key_room[:, :, room.spare] = layer.value_room[:, :, room.spare] = torch.nan
    assert found.enter(decoder.cache(40), 0, 40, decoder.specs) is room
    assert all(layer.key_room.isfinite().all() and layer.value_room.isfinite().all() for layer in room.cache.layers)


def test_who_finds_no_memory_stays(monkeypatch):
    """It keeps what it has, and nobody else enters."""
    found, cache, room, decoder = entered()

    def full(*size, **more):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(rooms, "in_blocks", full)
        found.leave(cache)
    assert room.guest is cache
    other = found.enter(cache, 0, 40, decoder.specs)
    assert other is not room and other.hosts(cache)
    found.leave(cache)
    assert room.guest is None and other.guest is None
    assert cache.layers[-1].key_room is not other.cache.layers[-1].key_room


def counted(monkeypatch):
    """The moves of caches, in and out."""
    calls, place, blocks = [], rooms.place_layers, rooms.in_blocks
    monkeypatch.setattr(rooms, "place_layers", lambda *args, **more: calls.append("in") or place(*args, **more))
    monkeypatch.setattr(rooms, "in_blocks", lambda *args: calls.append("out") or blocks(*args))
    return calls


def test_a_move_is_one_call_and_leaves_nothing_behind(monkeypatch):
    """What a cache had before it entered is held by nobody; and the memory that it leaves with is made at once."""
    calls, placing = counted(monkeypatch), placement.place_layers
    monkeypatch.setattr(placement.Placement, "__init__", partialmethod(placement.Placement.__init__, by_layer=True))
    with engine(tiny_model(), True, Recorder(), store=TieredStore(gpu_bytes=1 << 20, device="cpu")) as made:
        chunks, own = made.add([random_ids(30)]), []
        made.fuse(chunks, random_ids(5))

        def noted(out, *args, **more):
            own.extend(ref(stored.numbers._base) for pair in out.pairs for stored in pair)
            return placing(out, *args, **more)

        def run(rows, forward=made.documents.steps.graphs.forward):
            logits = forward(rows)
            assert own and all(one() is None for one in own)
            return logits

        monkeypatch.setattr(made.documents.steps.graphs, "cache", lambda *slots: None)  # not born in a room
        monkeypatch.setattr(placement, "place_layers", noted)
        monkeypatch.setattr(made.documents.steps.graphs, "forward", run)
        calls.clear()
        made.fuse(chunks, random_ids(5))
    assert calls == ["in", "out"]


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.reserve(5, 90),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reorder_cache(torch.zeros(1, dtype=torch.long)),
        lambda cache: cache.batch_select_indices(torch.zeros(1, dtype=torch.long)),
    ],
    ids=["reserve", "repeat", "reorder", "select"],
)
def test_nobody_holds_what_a_cache_had_before_it_grew(change):
    """Beams, and turns that go on from a past, make other memory in its place."""
    cache = engine(tiny_model(), False).decoder.cache(40)
    assert cache.laid is cache.laid
    had = [ref(layer.key_room) for layer in cache.layers]
    change(cache)
    assert all(one() is None for one in had)
    assert cache.laid.tokens == cache.layers[-1].key_room.shape[2]


def test_an_answer_stays_where_its_prompt_was_made(monkeypatch):
    calls = counted(monkeypatch)
    with engine(tiny_model(), True, Recorder()) as made:
        want, graphs = said(made).token_ids, made.documents.steps.graphs
        for _ in range(3):
            calls.clear()
            assert said(made).token_ids == want
            assert calls == ["out"]
        for room in graphs._rooms._rooms:
            assert room.guest is None
        prompt = fused(made)
        assert graphs._rooms.find(prompt.past_key_values) is None


def test_beams_take_no_more_than_the_prompt_needs(monkeypatch):
    """A room is as large as some prompt before, and of no use to them."""
    took, repeat = [], FusedCache.batch_repeat_interleave

    def noted(cache, beams):
        took.append((cache.layers[0].key_room.shape[2], made.documents.steps.graphs._rooms.find(cache)))
        repeat(cache, beams)

    monkeypatch.setattr(FusedCache, "batch_repeat_interleave", noted)
    plain = engine(tiny_model(), False)
    with engine(tiny_model(), True, Recorder()) as made:
        want = said(plain, num_beams=2).token_ids
        assert said(made, num_beams=2).token_ids == want
        assert made.documents.steps.graphs._rooms._rooms[0].slots == 256
    assert took[0] == took[1] and took[1][1] is None


def test_prompts_that_are_made_together_leave_at_once():
    """More of them than rooms, each of which is computed alone."""
    with engine(tiny_model(), True, Recorder(), method=CacheBlend(0.3)) as made:
        chunks = made.add([random_ids(30), random_ids(17)])
        prompts = made.fuse_many([(chunks, random_ids(5, seed)) for seed in range(5)])
        assert not [prompt.report.ran for prompt in prompts if "no room" in prompt.report.ran]
        assert all(room.guest is None for room in made.documents.steps.graphs._rooms._rooms)


def test_who_is_born_in_a_room_finds_what_others_left(monkeypatch):
    """Two at a time, and none where a room is too small; a guest that is gone leaves nothing."""
    found, cache, room, decoder = entered()
    assert found.born(5, 30, decoder.specs) is None  # somebody is in it
    found.leave(cache)
    assert found.born(5, 256, decoder.specs) is None  # the last slot is spare
    for layer in room.cache.layers:
        layer.key_room.fill_(torch.nan)
        layer.value_room.fill_(torch.nan)
    room.used = room.slots
    born = found.born(5, 30, decoder.specs)
    assert room.hosts(born) and born.laid is room.cache.laid
    assert all(layer.key_room[:, :, 5:].isfinite().all() and not layer.length for layer in born.layers)
    assert found.born(5, 30, decoder.specs) is None
    found.leave(born)
    assert born.layers[0].key_room.shape[2] == 30 and not room.hosts(born)
    gone = found.born(5, 30, decoder.specs)
    assert room.guest is gone
    del gone
    assert room.guest is None


def test_many_are_born_at_once(monkeypatch):
    found, cache, room, decoder = entered()
    found.leave(cache)
    free = found._free

    def slow(slots):
        there = free(slots)
        sleep(1e-3)  # time for another one to find it, too
        return there

    monkeypatch.setattr(found, "_free", slow)
    with ThreadPoolExecutor(8) as pool:
        born = list(pool.map(lambda _: found.born(5, 30, decoder.specs), range(64)))
    assert [one for one in born if one is not None] == [room.guest]


def test_a_fork_has_room_for_its_own(forked):
    """Answers that threads of its parent were making never come to an end there; what it goes on with keeps what it has."""
    with engine(tiny_model(), True, Recorder()) as made:
        steps, want = made.documents.steps, said(made).token_ids
        ids = steps.decoder.random_ids(9)
        caches = [steps.decoder.cache(9) for _ in range(rooms._MOST)]
        for cache in caches:
            run(steps, cache, ids[:8], 0)
        logits, plain = run(steps, caches[0], ids, 8)[0], steps.decoder.cache(9)
        run(steps, plain, ids, 0, steps.decoder.forward)
        caches[0].crop(-1)

        def child():
            answer = said(made)
            assert answer.token_ids == want
            close(run(steps, caches[0], ids, 8)[0], logits)
            alike(caches[0], plain)
            return answer.report.ran

        assert forked(child) == "graph" and said(made).report.ran.startswith("eager: no room is free")


def test_the_spare_slot_is_nobodys(small):
    """Rows that would fill a room to its last slot go to a larger one: what is filled up writes there."""
    steps = steps_of()
    ids, cache, plain = steps.decoder.random_ids(20), steps.decoder.cache(17), steps.decoder.cache(17)
    run(steps, cache, ids[:17], 0), run(steps, plain, ids[:17], 0, steps.decoder.forward)
    assert steps.graphs._rooms.find(cache).slots == 20
    got, ran = run(steps, cache, ids, 17)
    assert ran == "fixed" and steps.graphs._rooms.find(cache).slots > 20
    close(got, run(steps, plain, ids, 17, steps.decoder.forward)[0])


def test_what_grew_out_of_a_room_is_not_looked_for_there(small):
    steps = steps_of()
    ids, cache, plain = steps.decoder.random_ids(20), steps.decoder.cache(6), steps.decoder.cache(6)
    run(steps, cache, ids[:6], 0)
    run(steps, cache, ids, 6, steps.decoder.forward)  # beside others' rows, say
    cache.crop(-15)
    other = torch.cat([ids[:5], ids[7:8]])
    got, ran = run(steps, cache, other, 5)
    assert ran == "fixed"
    close(got, run(steps, plain, other, 0, steps.decoder.forward)[0])
    steps.graphs.leave(cache)
    alike(cache, plain)


def test_an_answer_grows_out_of_its_room(small):
    steps = steps_of()
    ids, at, sizes = steps.decoder.random_ids(30), torch.arange(30), set()
    plain, cache = steps.decoder.cache(6), steps.decoder.cache(6)
    for n in range(30):
        rows = Rows(ids[n : n + 1], at[n : n + 1], cache, first=n)
        close(steps.forward(rows), steps.decoder.forward(Rows(rows.ids, rows.positions, plain)))
        sizes.add(steps.graphs._rooms.find(cache).slots)
    assert rows.ran == "fixed" and len(sizes) > 2
    steps.graphs.leave(cache)
    alike(cache, plain)


def test_what_was_dropped_is_cleared_too():
    """A step that was run too much may have left numbers that are none."""
    steps = steps_of()
    ids, cache = steps.decoder.random_ids(5), steps.decoder.cache(5)
    run(steps, cache, ids, 0)
    room = steps.graphs._rooms.find(cache)
    for layer in room.cache.layers:
        layer.key_room[:, :, 4] = layer.value_room[:, :, 4] = torch.nan
    cache.crop(-1)
    steps.graphs.leave(cache)
    logits, _ = run(steps, steps.decoder.cache(5), ids[:3], 0)
    assert logits.isfinite().all() and all(layer.value_room.isfinite().all() for layer in room.cache.layers)


def test_who_leaves_on_another_stream_is_waited_for():
    steps = steps_of(capture := Recorder())
    cache, ids = steps.decoder.cache(6), steps.decoder.random_ids(1)
    steps.forward(Rows(ids, torch.zeros_like(ids), cache, first=0))
    capture.on = False
    room = steps.graphs._rooms.find(cache)
    capture.settle = lambda: capture.__dict__.update(settled=room.guest)
    steps.graphs.leave(cache)
    assert capture.settled is cache and room.guest is None  # waited for while nobody else could enter


def test_a_room_that_is_given_up_is_waited_for():
    graphs = steps_of(capture := Recorder()).graphs
    cache, one = graphs._decoder.cache(9), torch.zeros(1, dtype=torch.long)
    graphs.forward(Rows(one, one, cache, first=0))
    graphs._drop(graphs._rooms.find(cache))
    assert capture.settled == 1 and not graphs._fixed


@pytest.mark.parametrize("piece_tokens", [4, 8192])
@pytest.mark.parametrize("method", [Reuse(), LegoLink(3), QuestionAware(0.3)], ids=["reuse", "lego-link", "look"])
def test_numbers_that_are_none_do_not_reach_the_next_prompt(method, piece_tokens, monkeypatch):
    """A room holds what the prompt before left there; hidden or not, NaN would show. Also where a part comes after the other."""
    made, leave = engine(tiny_model(), True, method=method, piece_tokens=piece_tokens), Room.leave
    want = fused(made)

    def poisoned(room, cache, *more):
        leave(room, cache, *more)
        for layer in room.cache.layers:
            layer.key_room[:, :, : room.used] = layer.value_room[:, :, : room.used] = torch.nan
            layer.key_room[:, :, room.spare] = layer.value_room[:, :, room.spare] = torch.nan

    monkeypatch.setattr(Room, "leave", poisoned)
    fused(made)
    same(got := fused(made), want)
    assert got.report.ran == "fixed"


def test_a_room_leaves_memory_to_others():
    made = engine(tiny_model(), True, Recorder(free=(2 * 256 << 10) - 1))  # a token takes 1 KB
    assert said(made).report.ran == "eager: no room is free, nor memory for one"
    made.documents.steps.graphs._capture.free += 1
    assert said(made).report.ran == "graph"


def test_prompts_keep_their_own_memory():
    """What a prompt holds is nobody else's, whatever is fused behind it; and an answer leaves the room."""
    model = tiny_model()
    made = engine(model, True)
    first = fused(made)
    views = [layer.keys for layer in first.past_key_values.layers]
    copies = [view.clone() for view in views]
    fused(made, question=random_ids(6, seed=99))
    said(made)
    assert all(map(torch.equal, views, copies))
    same(first, fused(engine(model, False)))
    assert made.documents.steps.graphs._rooms.find(first.past_key_values) is None


def test_buckets():
    for bucket, least in ((row_bucket, 1), (room_bucket, 256)):
        sizes = [bucket(n) for n in range(1, 5000)]
        assert sizes == sorted(sizes) and all(size >= n for n, size in enumerate(sizes, 1))
        assert sizes[0] == least and len(set(sizes)) < 60
    assert all(row_bucket(n) <= max(16, n + n // 8 + 16) for n in range(1, 3000))
