"""Kills and damage, really done to a folder: what was reported stored is there and equal, or a miss, or a named error."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from functools import partial

import lmdb
import pytest
import torch

from ragkv.errors import RagKVError, RecordError, StoreError
from ragkv.store import TieredStore
from tests.damage import cut_short, flip, flip_bits

SIZES = (5, 60, 300)


def tokens_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


def put_for_ever(folder, kv, key, first):
    """Puts, replaces and removes without end, and says before and after what it does."""
    store = TieredStore(folder, cpu_bytes=0)
    for number in range(first, first + 10_000):
        os.write(1, f"put {number}\n".encode())
        store.put(key(number), kv(number, tokens=tokens_of(number)))
        os.write(1, f"stored {number}\n".encode())
        if number % 5 == 0:
            store.put(key(number - 1), kv(number - 1, tokens=tokens_of(number - 1)))
        if number % 4 == 0:
            os.write(1, f"remove {number - 2}\n".encode())
            store.remove(key(number - 2))
            os.write(1, f"removed {number - 2}\n".encode())


def check_after_kill(folder, kv, key, said: list[str]) -> str:
    """What was reported stored is there and equal; what was reported removed is not; all else is a miss or equal."""
    told: dict[int, str] = {}
    for line in said:
        verb, number = line.split()
        told[int(number)] = verb
    with TieredStore(folder, cpu_bytes=0) as store:
        for number, verb in told.items():
            got = store.get(key(number))
            assert got is not None or verb != "stored", f"{number} was reported stored and is gone"
            assert got is None or verb != "removed", f"{number} was reported removed and is there"
            if got is not None:
                want = kv(number, tokens=tokens_of(number))
                same = zip(got.keys + got.values, want.keys + want.values, strict=True)
                assert all(torch.equal(a, b) for a, b in same), f"{number} is another"
        assert not store.stats().evictions["disk"].get("damaged")
        entries, counters = len(store), store._disk.counters()
        rows = [store._disk.row(name) for name in store._disk.stored()]
        assert entries == len(rows)
        assert counters.used_bytes == sum(row.usage.size_bytes for row in rows)
    return "ok"


def kill_writers(times, folder, kv, key, forked):
    chance = random.Random(3)
    said: list[str] = []
    stored = 0
    for attempt in range(times):
        if attempt % 25 == 0:
            shutil.rmtree(folder, ignore_errors=True)
            said = []
        first = 1 + len(said)
        text = forked(partial(put_for_ever, folder, kv, key, first), kill_after_s=chance.uniform(0, 0.25))
        assert text.endswith("signal 9"), text
        said += [line for line in text.splitlines() if len(line.split()) == 2 and not line.startswith("signal")]
        stored += sum(line.startswith("stored") for line in said)
        assert forked(partial(check_after_kill, folder, kv, key, said)) == "ok"
    assert stored


def test_kill_minus_nine(folder, kv, key, forked):
    kill_writers(8, folder, kv, key, forked)


@pytest.mark.long
def test_kill_minus_nine_300_times(folder, kv, key, forked):
    kill_writers(300, folder, kv, key, forked)


def test_what_was_stored_survives_a_power_cut(folder, kv, key, monkeypatch):
    seen, real = [], lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *args, **flags: (seen.append(flags), real(*args, **flags))[1])
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(0), kv(0))
    assert [(flags["sync"], flags["metasync"]) for flags in seen] == [(True, True)]


@pytest.fixture
def filled(folder, kv, key, forked):
    """A folder of 12 entries, made by a process that is gone."""

    def fill():
        with TieredStore(folder, cpu_bytes=0) as store:
            for number in range(12):
                store.put(key(number), kv(number, tokens=tokens_of(number), heads=4, dim=32))
            store.remove(key(0))
            store.put(key(0), kv(0, tokens=tokens_of(0), heads=4, dim=32))
        return "ok"

    assert forked(fill) == "ok"
    return folder


def read_all(folder, kv, key) -> str:
    """``equal``, ``miss`` and the names of errors, as a set; raises for a wrong tensor or another error."""
    seen = set()
    try:
        with TieredStore(folder, cpu_bytes=0) as store:
            for number in range(12):
                try:
                    got = store.get(key(number))
                except RagKVError as error:
                    seen.add(type(error).__name__)
                    continue
                if got is None:
                    seen.add("miss")
                    continue
                want = kv(number, tokens=tokens_of(number), heads=4, dim=32)
                assert got.base == want.base
                same = zip(got.keys + got.values, want.keys + want.values, strict=True)
                assert all(torch.equal(a, b) for a, b in same), "a wrong tensor"
                seen.add("equal")
            store.put(key(99), kv(1))
    except RagKVError as error:
        seen.add(type(error).__name__)
    return " ".join(sorted(seen))


def damage(times, filled, tmp_path, kv, key, forked, harm, may_end=False):
    outcomes: Counter[str] = Counter()
    copy = tmp_path / "copy"
    for _ in range(times):
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        shutil.copy(filled / "data.mdb", copy)
        with open(copy / "data.mdb", "r+b") as file:
            harm(file)
        outcome = forked(lambda: read_all(copy, kv, key))
        assert "raised" not in outcome, outcome
        assert may_end or "signal" not in outcome, outcome
        outcomes[outcome] += 1
    return outcomes


@pytest.mark.parametrize("harm", [flip_bits(5), cut_short(5)], ids=["flipped", "cut"])
def test_damage_is_a_miss_or_a_named_error(filled, tmp_path, kv, key, forked, harm):
    outcomes = damage(15, filled, tmp_path, kv, key, forked, harm)
    assert any(outcome != "equal" for outcome in outcomes)


def test_cut_short_while_it_is_open(filled, tmp_path, kv, key, forked):
    """What is mapped behind the end of a file kills whoever touches it: new reads, writes, and batches that are open."""
    size, chance, outcomes = (filled / "data.mdb").stat().st_size, random.Random(9), Counter()

    def cut(folder, length):
        with TieredStore(folder, cpu_bytes=0) as store:
            seen = set()

            def read(number, batch):
                try:
                    got = batch.layer(batch_keys.index(key(number)), 1)[0]
                    assert torch.equal(got, kv(number, tokens=tokens_of(number), heads=4, dim=32).keys[1])
                    seen.add("equal")
                except RagKVError as error:
                    seen.add(type(error).__name__)

            batch_keys = [key(number) for number in range(1, 12)]
            with store.read(batch_keys) as batch:
                read(1, batch)
                os.truncate(folder / "data.mdb", length)
                for number in range(1, 12):
                    read(number, batch)
            for work in (lambda: store.get(key(2)), lambda: store.put(key(99), kv(1)), lambda: store.remove(key(3))):
                try:
                    work()
                except RagKVError as error:
                    seen.add(type(error).__name__)
        return " ".join(sorted(seen))

    lengths = [0, 1, 4096, 8191, 8192, 8193, size - 1, *(chance.randrange(size) for _ in range(8))]
    for number, length in enumerate(lengths):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(filled / "data.mdb", folder)
        outcome = forked(lambda folder=folder, length=length: cut(folder, length))
        assert "raised" not in outcome and "signal" not in outcome, (length, outcome)
        outcomes[outcome] += 1
        again = forked(lambda folder=folder: read_all(folder, kv, key))
        assert "raised" not in again and "signal" not in again, (length, again)
    assert any("RecordError" in outcome for outcome in outcomes)


@pytest.mark.long
@pytest.mark.parametrize(("harm", "times"), [(flip_bits(7), 1500), (cut_short(7), 500)], ids=["flipped", "cut"])
def test_damage_2000_times(filled, tmp_path, kv, key, forked, harm, times):
    damage(times, filled, tmp_path, kv, key, forked, harm)


def test_damaged_pages_are_not_written_to(filled, kv, key, forked):
    """A checksum fails, and LMDB's own pages are damaged too: to delete the record would end the process."""
    raw = bytearray((filled / "data.mdb").read_bytes())
    leaves = [
        at
        for at in range(8192, len(raw), 4096)
        if raw[at + 10 : at + 12] == b"\2\0" and b"RAGKV" in raw[at : at + 4096]
    ]
    assert leaves
    for at in leaves:  # the first node of each leaf lies at the page's very end
        raw[at + 16 : at + 18] = (4094).to_bytes(2, "little")
    for at in range(8192, len(raw), 4096):  # and the payload of every large value is not what was stored
        if raw[at + 10 : at + 12] == b"\4\0":
            raw[at + 64] ^= 1

    def use():
        with TieredStore(filled, cpu_bytes=0) as store:
            for number in range(12):
                try:
                    store.get(key(number))
                except RecordError:
                    continue
            with pytest.raises(RecordError, match="verify --repair"):
                store.put(key(99), kv(1))
        return "refused"

    (filled / "data.mdb").write_bytes(raw)
    assert forked(use) == "refused"


@pytest.mark.parametrize("pages", [1 << 29, 1 << 34, 1 << 50])
def test_a_file_that_claims_to_be_far_longer(filled, key, pages):
    """The meta pages' last page number is damaged: refused by name, and no giant file is made of it."""
    raw = bytearray((filled / "data.mdb").read_bytes())
    for at in (0, 4096):
        raw[at + 136 : at + 144] = pages.to_bytes(8, "little")
    (filled / "data.mdb").write_bytes(raw)
    with pytest.raises(StoreError):
        TieredStore(filled, cpu_bytes=0, disk_bytes=1 << 20)
    assert (filled / "data.mdb").stat().st_size == len(raw)


@pytest.mark.long
def test_damage_aimed_at_index_pages(filled, tmp_path, kv, key, forked):
    """LMDB trusts its own pages: a few flips in a thousand end the process. None gives a wrong tensor."""
    raw = (filled / "data.mdb").read_bytes()
    # A page begins with its own number; its kind is a branch, a leaf or a meta page, and not one of an entry's bytes.
    pages = [
        at
        for at in range(0, len(raw), 4096)
        if int.from_bytes(raw[at : at + 8], "little") == at // 4096
        and raw[at + 10 : at + 12] in (b"\1\0", b"\2\0", b"\10\0")
    ]
    assert 5 < len(pages) < len(raw) / 4096 / 4
    chance = random.Random(11)

    def harm(file):
        flip(file, chance.choice(pages) + chance.randrange(chance.choice((64, 4096))), chance)

    outcomes = damage(1000, filled, tmp_path, kv, key, forked, harm, may_end=True)
    print(dict(outcomes))
    assert sum(count for outcome, count in outcomes.items() if "signal" in outcome) <= 10
