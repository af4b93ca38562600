"""Routing: questions over the same chunks meet, load is bounded, and little moves when a replica comes or goes."""

import math
import random
from collections import Counter

import pytest

from ragkv import ArgumentError, ArgumentTypeError, Chunk, route

NAMES = [f"replica-{number}" for number in range(10)]
IDLE = dict.fromkeys(NAMES, 0)


def test_questions_over_the_same_chunks_meet_whatever_their_order():
    chunks = [Chunk(tuple(range(n, 2 * n))) for n in (5, 9, 30)]
    there = route(chunks, IDLE)
    assert route(chunks[::-1], dict(reversed(IDLE.items()))) == there == route(chunks, IDLE)
    assert there == route([chunks[2]], IDLE)  # it has more tokens than the others together
    assert route([chunk.id for chunk in chunks[2:]], IDLE) == there
    for number in range(20):  # each speaks for another
        names = [f"{number} {word}" for word in "abc"]
        assert route(names, IDLE) == route(names[::-1], IDLE)


def test_the_chunks_of_a_document_have_one_home():
    chunks = [Chunk(tuple(range(n, 2 * n)), document="d") for n in range(1, 20)]
    assert {route([chunk], IDLE) for chunk in chunks} == {route(["d"], IDLE)}
    assert len({route([Chunk(chunk.ids)], IDLE) for chunk in chunks}) > 5


def test_chunks_are_spread_evenly():
    counts = Counter(route([f"{number}"], IDLE) for number in range(2000))
    assert set(counts) == set(NAMES) and max(counts.values()) < 1.5 * min(counts.values())


def test_little_moves_when_a_replica_goes_or_comes():
    names = [f"{number}" for number in range(500)]
    before = {name: route([name], IDLE) for name in names}
    left = {name: 0 for name in NAMES if name != "replica-3"}
    for name in names:
        assert route([name], left) == before[name] or before[name] == "replica-3"
    moved = sum(route([name], {**IDLE, "replica-10": 0}) != before[name] for name in names)
    assert 0 < moved < 2 * len(names) / 11


@pytest.mark.parametrize("bound", [1.0, 1.25, 2.0])
def test_no_replica_gets_more_than_its_share_times_the_bound(bound):
    """Questions by Zipf's law that never end."""
    draw, loads = random.Random(0), Counter(IDLE)
    weights = [1 / rank for rank in range(1, 101)]
    for asked in range(1, 1001):
        loads[route(map(str, draw.choices(range(100), weights, k=3)), loads, bound=bound)] += 1
        assert max(loads.values()) <= bound * asked / len(NAMES) + 1
    assert bound > 1 or max(loads.values()) - min(loads.values()) <= 1


def test_who_holds_the_chunks_goes_first_unless_it_is_full():
    chunks = [Chunk(tuple(range(n, 2 * n))) for n in (5, 9, 30)]
    held = {"replica-4": [chunks[2].id], "replica-7": {chunk.id for chunk in chunks[:2]}}
    assert route(chunks, IDLE, held=held) == "replica-4"
    assert route(chunks[:2], IDLE, held=held) == "replica-7"
    assert route(chunks, {**IDLE, "replica-4": 5}, held=held) != "replica-4"
    assert route(chunks, IDLE, held={}) == route(chunks, IDLE)


def test_no_chunks_go_where_there_is_room():
    assert route([], {"a": 1, "b": 0}) == "b" and route([], {"a": 3}) == "a"


@pytest.mark.parametrize(
    ("replicas", "bound"), [({}, 1.25), ({"a": -1}, 1.25), ({"a": float("nan")}, 2), ({"a": 0}, 0.5)]
)
def test_what_cannot_be_routed(replicas, bound):
    with pytest.raises(ArgumentError, match="route needs replicas"):
        route(["x"], replicas, bound=bound)


def test_wrong_types():
    with pytest.raises(ArgumentTypeError, match="must map names to loads"):
        route(["x"], ["a", "b"])
    with pytest.raises(ArgumentTypeError, match=r"must be ragkv\.Chunk or names"):
        route([5], {"a": 0})


@pytest.mark.parametrize(
    ("chunks", "replicas", "more", "error", "what"),
    [
        (["x"], {"a": math.inf, "b": 0}, {}, ArgumentError, "finite loads"),
        (["x"], {"a": 0}, {"bound": math.inf}, ArgumentError, "finite bound"),
        (["x"], {"a": 10**400, "b": 0}, {}, ArgumentError, "finite loads"),
        (["x"], {"a": "1"}, {}, ArgumentTypeError, "must be numbers"),
        (["x"], {"a": None}, {}, ArgumentTypeError, "must be numbers"),
        (["x"], {"a": 0}, {"bound": "2"}, ArgumentTypeError, "must be numbers"),
        (["x"], {"a": 0}, {"held": ["a"]}, ArgumentTypeError, "held must map"),
        (["x"], {"a": 0}, {"held": {"a": None}}, ArgumentTypeError, "held must map"),
        ("document", {"a": 0}, {}, ArgumentTypeError, "chunks must be several"),
        (None, {"a": 0}, {}, ArgumentTypeError, "chunks must be several"),
    ],
)
def test_what_is_no_load_and_no_name(chunks, replicas, more, error, what):
    with pytest.raises(error, match=what):
        route(chunks, replicas, **more)


def test_names_of_files_that_are_not_valid_unicode():
    assert route(["\udcff.txt"], {"a": 0, "b": 0}) in ("a", "b")
