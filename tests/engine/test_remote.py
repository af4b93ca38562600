"""A pool that two machines share: what one has computed, the other answers from, exactly. One that fails costs time alone."""

import math
from dataclasses import replace
from functools import partial
from time import monotonic, sleep

import pytest
import torch

from ragkv import Engine, SensitiveTokens, TieredStore
from ragkv.fusion.course import Course
from ragkv.fusion.placement import Placement
from ragkv.library.rates import _found, known_rates, to_fetch
from ragkv.store import CostProfile, RemoteTier
from ragkv.store.remote.heads import Heads
from ragkv.store.remote.pool import PoolError
from ragkv.testing import random_ids

from .conftest import QUESTION, TEMPLATE

SLOW = CostProfile((0, 1000), (0, 1000), ((0.0, 1.0), (0.0, 1.5)))


@pytest.fixture(params=[False, True], ids=["chunk by chunk", "layer by layer"])
def by_layer(request, monkeypatch):
    monkeypatch.setattr("ragkv.fusing.Placement", partial(Placement, by_layer=request.param))


@pytest.fixture
def machine(tmp_path, shared_model):
    """Opens engines, each with a folder of its own."""
    opened = []

    def make(**options):
        tier = RemoteTier(f"file://{tmp_path}/pool", **options)
        store = TieredStore(tmp_path / f"machine{len(opened)}", cpu_bytes=0, remote=tier)
        opened.append(Engine(shared_model, template=TEMPLATE, store=store, method=SensitiveTokens(0.2)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def parts():
    return [random_ids(40, seed=number) for number in range(3)]


def test_a_fresh_machine_computes_no_chunk(machine, parts, reads, by_layer, monkeypatch):
    one, two = machine(), machine(range_bytes=5_000)
    monkeypatch.setattr("ragkv.store.remote.records._HEAD_BYTES", 5_000)
    document = one.add_document(parts)
    want = one.fuse([document[2], document[0]], QUESTION)
    one.store.flush()
    read = reads(two)
    document = two.add_document(parts)
    got = two.fuse([document[2], document[0]], QUESTION)
    assert not read, "a chunk was computed that the pool has"
    assert got.report.hits == {"remote": 2} and got.report.sources == ["remote"] * 2
    assert got.report.bytes_read > 0
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.recomputed, want.recomputed)


def test_a_pool_that_fails_in_the_middle_costs_time_alone(machine, parts, by_layer, monkeypatch):
    one, two = machine(), machine(range_bytes=2_000)
    chunks = one.add(parts)
    want = one.fuse(chunks, QUESTION)
    one.store.flush()
    monkeypatch.setattr("ragkv.store.remote.records._HEAD_BYTES", 5_000)  # else all of it comes with the header
    pool = two.store._tiers.behind[0]._pool
    whole, left = pool.begin, iter(range(len(parts) + 2))

    def fails(name, start, stop):
        if next(left, None) is None:
            raise PoolError("the network is down")
        return whole(name, start, stop)

    monkeypatch.setattr(pool, "begin", fails)
    got = two.fuse(two.add(parts), QUESTION)
    assert got.report.hits["computed"] and "remote" not in got.report.hits and two.store.stats().pools["remote"].down
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)


def test_damage_in_the_pool_is_computed_anew(machine, parts, tmp_path):
    one, two = machine(), machine()
    chunks = one.add(parts)
    want = one.fuse(chunks, QUESTION)
    one.store.flush()
    file = next((tmp_path / "pool").glob(f"*/{one.documents.key(chunks[1]).hex()}"))
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    got = two.fuse(two.add(parts), QUESTION)
    assert got.report.sources[1] == "computed" and "computed" not in got.report.sources[::2]
    torch.testing.assert_close(got.logits, want.logits, atol=1e-4, rtol=1e-4)
    two.store.flush()
    assert file.read_bytes() != data, "it was sent again"
    assert machine().fuse(chunks, QUESTION).report.hits == {"remote": 3}


def test_a_namespace_has_nothing_of_another_in_the_pool(machine, parts):
    one, two = machine(), machine()
    one.add(parts, namespace="mine")
    one.store.flush()
    assert two.fuse(parts, QUESTION, namespace="other").report.hits == {"computed": 3}
    assert two.fuse(parts, QUESTION, namespace="mine").report.hits == {"remote": 3}


def test_auto_weighs_a_pool_by_how_fast_it_was_seen_to_be(machine, parts, reads, monkeypatch):
    """Whoever has measured the machine; a pool that nobody has read from lately is read from."""
    monkeypatch.setattr("ragkv.methods.auto.patience_s", lambda *_: 10.0)
    monkeypatch.setattr("ragkv.store.remote.records._HEAD_BYTES", 5_000)
    monkeypatch.setattr(Heads, "unreadable", lambda *_: set())  # else it is known by then how small they are
    monkeypatch.setattr(
        Course, "_meanwhile", lambda *_: (0, math.inf)
    )  # nothing is late: a tiny model computes as fast as a disk reads
    one, two = machine(), machine(range_bytes=5_000)
    document = one.add_document(parts)
    one.store.flush()
    two.advise(limit_s=0.1)
    # A model that computes 1,000 tokens a second, whatever this one is like.
    for name, measured in _found[two.store].items():
        monkeypatch.setitem(_found[two.store], name, replace(measured, costs=SLOW))
    document, read = two.add_document(parts), reads(two)
    assert "remote" not in known_rates(two.documents).tiers
    asked = [document[2], document[0]]
    assert two.fuse(asked, QUESTION, method="auto").report.hits == {"remote": 2}
    seen = known_rates(two.documents).tiers["remote"]
    assert seen.bytes_per_s > 0 and seen.token_bytes == two.store.loading()["remote"].token_bytes > 100
    for bytes_per_s, source in ((1.0, "unused"), (1e15, "remote")):  # a modem, and no limit
        tier = two.store._tiers.behind[0]
        tier._speed._last = tier._speed.now(), bytes_per_s
        monkeypatch.setattr(two.store, "where", lambda keys, _: dict.fromkeys(keys, "remote"))
        report = two.fuse([document[1], document[0]], QUESTION, method="auto").report
        assert "from remote are loaded in" in report.why
        assert ("FullPrefill" in report.method) == (source == "unused")
    assert not read


def test_what_comes_slower_than_it_is_computed_is_not_fetched_before_it_is_asked_for(machine, parts, monkeypatch):
    one, two = machine(), machine()
    document = one.add_document(parts)
    one.store.flush()
    keys = [two.documents.key(chunk) for chunk in document]
    assert to_fetch(two.documents, keys) == keys, "nothing is known of the machine"
    two.advise(limit_s=0.1)
    assert to_fetch(two.documents, keys) == keys, "nor of the pool"
    speed = two.store.remote._speed
    speed.sized("", 1.0)
    for bytes_per_s, fetched in ((1.0, []), (1e15, keys)):  # a modem, and no limit
        speed._last = speed.now(), bytes_per_s
        assert to_fetch(two.documents, keys) == fetched
    two.fuse(document, QUESTION)
    until = monotonic() + 10
    while len(two.store) < 3 and monotonic() < until:
        sleep(0.01)
    speed._last = speed.now(), 1.0
    assert to_fetch(two.documents, keys) == keys, "they lie on the disk now"


def test_who_adds_with_another_key_reads_once_and_keeps_it(machine, parts, reads):
    """What the pool's key wrote stays there; no question computes it again."""
    one, two = machine(encryption_key=bytes(32)), machine(encryption_key=bytes([1]) * 32)
    one.add_document(parts)
    one.store.flush()
    read = reads(two)
    document = two.add_document(parts)
    assert read
    del read[:]
    two.store.flush()
    assert two.fuse(document, QUESTION).report.hits == {"disk": 3} and not read
    assert machine(encryption_key=bytes(32)).fuse(document, QUESTION).report.hits == {"remote": 3}
