"""Chunks at several levels in a pool: fewer bytes and more error, objects of their own, never taken for what was stored."""

from __future__ import annotations

import sys
import time

import pytest
import redis

from ragkv.errors import ArgumentError, RecordError, StoreError
from ragkv.store import Asking, RemoteTier
from ragkv.store.remote.levels import LEVELS, level_key
from ragkv.store.remote.publications import KEYS
from ragkv.store.remote.records import name_of


@pytest.fixture
def big(kv):
    """KV that are mostly numbers."""
    return lambda number: kv(number, tokens=64, dim=32)


@pytest.fixture
def filled(url, machine, big, key):
    """A pool with two chunks at all levels."""
    store = machine(url, levels=("coarse", "medium", "fine", "int8"))
    store.put_many([(key(number), big(number), 0.0) for number in range(2)])
    store.flush()
    return store


def at(*pairs):
    return Asking(levels=dict(pairs))


def error_of(got, want):
    pairs = list(zip((*got.keys, *got.values), (*want.keys, *want.values), strict=True))
    return sum((a - b).square().sum() for a, b in pairs) ** 0.5 / sum(b.square().sum() for _, b in pairs) ** 0.5


def test_fewer_bytes_and_more_error(filled, url, machine, big, key, same):
    store, sizes = machine(url), dict(filled.remote._pool.names())
    assert len(sizes) == 2 * (1 + len(LEVELS)) and filled.stats().pools["remote"].sent == 2
    names = [name_of(key(0)), *(name_of(level_key(key(0), level)) for level in LEVELS)]
    assert [sizes[name] for name in names] == sorted((sizes[name] for name in names), reverse=True)
    errors = []
    for level in LEVELS:
        with store.read([key(0), key(1)], asking=at((key(0), level))) as batch:
            assert batch.tiers == ["remote"] * 2 and batch.held_at == [level, ""] and batch.away(0)
            errors.append(error_of(batch.kv(0), big(0)))
    same(store.get(key(1)), big(1))
    assert errors == sorted(errors) and 0 < errors[0] < 0.02 and errors[-1] < 0.5, errors


def test_what_a_lossy_level_brought_is_kept_nowhere(filled, url, machine, big, key, same, kept):
    store = machine(url, cpu_bytes=1 << 30)
    store.read([key(0), key(1)]).close()  # on what terms they are kept is known
    with store.read([key(0), key(1)], asking=at((key(0), "coarse"))) as batch:
        batch.kv(0), batch.kv(1)
    kept(store, 1)
    assert store.where([key(0), key(1)])[key(0)] == "remote", "the other one is here"
    same(store.get(key(0)), big(0))
    kept(store, 2)
    with store.read([key(0)], asking=at((key(0), "coarse"))) as batch:
        assert batch.tiers[0] != "remote" and batch.held_at == [""], "what is here is better"


def test_a_level_that_is_missing_is_a_miss_of_that_level_alone(filled, url, machine, big, key, same):
    filled.remote._pool.delete(name_of(level_key(key(0), "fine")))
    store = machine(url)
    with store.read([key(0), key(1)], asking=at((key(0), "fine"), (key(1), "fine"))) as batch:
        assert batch.held_at == ["", "fine"]
        same(batch.kv(0), big(0))
    assert store.missing([key(0)]) == []


def damage(pool, name):
    data = bytearray(pool.read(name, 0, 1 << 30))
    data[-9] ^= 1
    pool.write(name, bytes(data), float("inf"))


@pytest.mark.parametrize("level", ["fine", ""])
def test_what_is_damaged_is_dropped_alone(filled, url, machine, big, key, same, soon, level):
    """A level, or what was stored, whose levels stay."""
    pool, name = filled.remote._pool, name_of(level_key(key(0), level) if level else key(0))
    damage(pool, name)
    store, asking = machine(url), at((key(0), level)) if level else at()
    with store.read([key(0)], asking=asking) as batch, pytest.raises(RecordError):
        batch.kv(0)
    soon(lambda: name not in dict(pool.names()))
    store.flush()
    with store.read([key(0)], asking=asking) as batch:
        assert batch.held_at == ["" if level else None]
        if level:
            same(batch.kv(0), big(0))
    assert len(dict(pool.names())) == 2 * (1 + len(LEVELS)) - 1


def test_a_damaged_level_that_may_not_be_deleted_is_left_alone(filled, url, machine, key):
    damage(filled.remote._pool, name_of(level_key(key(0), "fine")))
    store, asking = machine(url), at((key(0), "fine"))
    store.remote._uploads = None  # as it is where nothing may be written
    with store.read([key(0)], asking=asking) as batch, pytest.raises(RecordError):
        batch.kv(0)
    with store.read([key(0)], asking=asking) as batch:
        assert batch.held_at == [""]


def test_no_level_is_found_in_the_place_of_another(filled, url, machine, big, key, same):
    pool = filled.remote._pool
    coarse = bytes(pool.read(name_of(level_key(key(0), "coarse")), 0, 1 << 30))
    for name in (name_of(key(0)), name_of(level_key(key(0), "fine"))):
        pool.write(name, coarse, float("inf"))
    store = machine(url)
    with store.read([key(0)], asking=at((key(0), "fine"))) as batch:
        assert batch.tiers == [None]
    assert store.stats().evictions["remote"]["damaged"] == 2


def test_what_is_removed_is_removed_at_all_levels(filled, url, machine, key):
    """Also by who has heard of none."""
    store = machine(url)
    store.read([key(0)]).close()
    store.remote._uploads.wake = lambda: None
    assert store.remove(key(0))
    with store.read([key(0)], asking=at((key(0), "fine"))) as batch:
        assert batch.tiers == [None], "at once"
    del store.remote._uploads.wake
    store.remote._uploads.wake()
    store.flush()
    left = {name_of(held) for held in (key(1), *(level_key(key(1), level) for level in LEVELS))}
    assert dict(filled.remote._pool.names()).keys() == left
    assert store.missing([key(0)]) == [key(0)]


def test_pruning_takes_all_levels_or_leaves_them(filled, url, machine, key):
    filled.remote.publications.put("", "a", {}, {KEYS: key(0)})
    pruned = RemoteTier(url).prune(0)
    assert (pruned.objects, pruned.needed) == (1 + len(LEVELS),) * 2
    left = {name_of(held) for held in (key(0), *(level_key(key(0), level) for level in LEVELS))}
    assert {name for name in dict(filled.remote._pool.names()) if "/" in name and not name.startswith("cat")} == left


def test_levels_are_sent_of_what_the_pool_has_already(url, machine, big, key):
    one = machine(url)
    one.put(key(0), big(0))
    one.flush()
    sizes = dict(one.remote._pool.names())
    two = machine(url, levels=("coarse",))
    two.put(key(0), big(0))
    two.flush()
    after = dict(one.remote._pool.names())
    assert after.keys() - sizes == {name_of(level_key(key(0), "coarse"))}
    assert two.share() == 1
    two.flush()
    assert two.stats().pools["remote"].skipped == 1 and dict(one.remote._pool.names()) == after


def test_encrypted_like_all_else(machine, big, key):
    url = f"memory://{time.monotonic_ns()}"
    one = machine(url, levels=("fine",), encryption_key={"": bytes(32)})
    one.put(key(0), big(0))
    one.flush()
    for secret, tier in (({"": bytes(32)}, "remote"), (None, None), ({"": bytes(range(32))}, None)):
        with machine(url, encryption_key=secret).read([key(0)], asking=at((key(0), "fine"))) as batch:
            assert batch.tiers == [tier] and (batch.held_at == ["fine"]) == (tier is not None)
            assert not tier or error_of(batch.kv(0), big(0)) < 0.1


def test_what_they_take_is_what_was_seen(filled, url, machine, key):
    store = machine(url, levels=("int8", "coarse"))
    store.get(key(1))
    before = store.loading()["remote"]
    assert [each.name for each in before.levels] == ["int8", "coarse"] and before.levels[1].token_s == 0
    assert before.levels[1].token_bytes == pytest.approx(LEVELS["coarse"].share * before.token_bytes)
    with store.read([key(0)], asking=at((key(0), "coarse"))) as batch:
        batch.begin()
        batch.kv(0)
    after = store.loading()["remote"]
    assert after.token_bytes == before.token_bytes and after.levels[0] == before.levels[0]
    assert after.levels[1] != before.levels[1] and after.levels[1].token_s > 0
    assert machine(url).loading() == {}
    speed = store.remote._speed
    speed.sized("int8", before.token_bytes)
    assert store.loading()["remote"].levels == after.levels[1:], "what is stored in as few bytes is better"


@pytest.mark.parametrize("levels", ["fine", ("fine", "finest")])
def test_levels_that_are_none(levels):
    with pytest.raises(ArgumentError, match="'int8', 'fine', 'medium', 'coarse'"):
        RemoteTier("memory://levels", levels=levels)


def test_numbers_that_a_level_has_no_room_for_come_as_they_are(url, machine, big, key, same, caplog):
    """Nobody waits for such a level, and nobody tries it again and again."""
    store, chunk = machine(url, levels=("int8", "fine")), big(0)
    chunk.keys[0][0, 0, 0] = float("inf")
    store.put(key(0), chunk)
    store.flush()
    assert dict(store.remote._pool.names()).keys() == {name_of(key(0))} and "needs finite numbers" in caplog.text
    same(machine(url).get(key(0)), chunk)


def test_levels_whose_encoder_is_not_installed_are_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(StoreError, match="pip install zstandard"):
        RemoteTier("memory://levels", levels=("int8", "fine"))
    RemoteTier("memory://levels", levels=("int8",))


@pytest.mark.parametrize("kind", ["s3", "redis"])
def test_a_removal_is_one_request_whatever_levels_there_are(kind, request, machine, big, key, monkeypatch):
    if kind == "s3":
        asked, url = request.getfixturevalue("relay").asked, request.getfixturevalue("s3")
    else:
        asked, unlink = list[tuple](), redis.Redis.unlink
        monkeypatch.setattr(redis.Redis, "unlink", lambda *names: asked.append(names) or unlink(*names))
        url = f"redis://127.0.0.1:{request.getfixturevalue('valkey_server').port}/0?prefix=one request:"
    store = machine(url, levels=("coarse",))
    store.put(key(0), big(0))
    store.flush()
    asked.clear()
    store.remove(key(0))
    store.flush()
    assert len(asked) == 1 and not list(store.remote._pool.names())
