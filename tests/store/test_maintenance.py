"""List, verify, prune, compact, repair: on folders that are really damaged or full of holes."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

from ragkv.errors import StoreError, StoreFullError
from ragkv.folder import Environment
from ragkv.store import TieredStore
from ragkv.store.exchange import export
from ragkv.store.maintenance import compact, entries, prune, remove, repair, structure, verify


@pytest.fixture
def filled(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(6):
            label = f"passage {number}"
            store.put(key(number), kv(number, tokens=300), space=f"model {number % 2}", cost_s=number, label=label)
        store.get(key(3))
        store.pin(key(2))
        store.put(key(5), kv(5, tokens=300), lifetime_s=1e-6)
    return folder


@pytest.fixture
def spoil(folder, key, damage):
    """Changes a bit of an entry's KV, header or row."""

    def spoil(number, what):
        with TieredStore(folder, cpu_bytes=0) as store:
            name, place = {"segments": (bytes(4), 70), "entries": (b"", 90), "usage": (b"", 3)}[what]
            damage(store, key(number) + name, place, what)

    return spoil


def test_entries(filled, key):
    found = {entry.key: entry for entry in entries(filled)}
    assert set(found) == {key(number) for number in range(6)} or len(found) == 5
    three = found[key(3)]
    assert (three.space, three.codec, three.tokens, three.frequency, three.cost_s) == ("model 1", "raw", 300, 2, 3.0)
    assert (three.label, three.hits, found[key(2)].hits) == ("passage 3", 1, 0)
    assert three.size_bytes > 300 * 2 * 8 * 4 * 6
    assert 0 < three.created_s <= three.used_s
    assert found[key(2)].pinned and not three.pinned


def test_what_another_process_removes_meanwhile_is_not_damaged(filled, key, tmp_path):
    with TieredStore(filled, cpu_bytes=0) as store:

        def gone(number):
            store.remove(key(number))
            return True

        done = export(filled, tmp_path / "all.tar", wanted=lambda each: each != key(2) or gone(2))
        assert (done.records, done.damaged) == (4, []), "another has expired"
        verdict = verify(filled, progress=lambda done, total: [gone(number) for number in range(6)])
        assert (verdict.damaged, verdict.checked) == ([], 1)


@pytest.mark.parametrize("what", ["segments", "entries", "usage"])
def test_verify_names_and_drops_what_is_damaged(filled, key, what, same, kv, spoil):
    assert verify(filled).damaged == []
    spoil(1, what)
    seen = []
    verdict = verify(filled, progress=lambda done, total: seen.append((done, total)))
    assert [name for name, _ in verdict.damaged] == [key(1)]
    assert verdict.dropped == 0
    assert seen[-1] == (verdict.checked, verdict.checked)
    assert verify(filled, drop=True).dropped == 1
    assert verify(filled).damaged == []
    with TieredStore(filled) as store:
        assert not store.contains(key(1))
        same(store.get(key(0)), kv(0, tokens=300))
        store.put(key(1), kv(1))
        same(store.get(key(1)), kv(1))


def test_prune(filled, key):
    wanted = [entry.key for entry in prune(filled, lambda entry: entry.space == "model 0", dry_run=True)]
    assert sorted(wanted) == sorted(key(number) for number in (0, 2, 4))
    with TieredStore(filled) as store:
        assert store.contains(key(0))
    prune(filled, lambda entry: entry.space == "model 0")
    with TieredStore(filled) as store:
        assert not any(store.contains(name) for name in wanted)
        assert store.contains(key(1))
    assert remove(filled, [*wanted, key(1)]) == 1
    assert [entry.key for entry in entries(filled)] == [key(3)]


def test_folder_in_use_by_another_process_is_not_compacted(filled, kv, key, same):
    code = (
        "import sys; from ragkv.store import maintenance\n"
        "for work in (maintenance.compact, maintenance.repair):\n"
        "    try: work(sys.argv[1])\n"
        "    except Exception as error: print(error)"
    )
    with TieredStore(filled) as store:
        said = subprocess.run([sys.executable, "-c", code, str(filled)], capture_output=True, text=True, cwd="/").stdout
        assert said.count("is open in another process") == 2
        same(store.get(key(0)), kv(0, tokens=300))
    assert compact(filled)[1] > 0


def test_compact_gives_room_back(folder, kv, key, same):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(30):
            store.put(key(number), kv(number, tokens=300))
        for number in range(1, 30):
            store.remove(key(number))
        with pytest.raises(StoreError, match="open"):
            compact(folder)
    before, after = compact(folder)
    assert after < before / 5
    assert sorted(path.name for path in folder.iterdir()) == ["data.mdb"]
    with TieredStore(folder) as store:
        same(store.get(key(0)), kv(0, tokens=300))
        assert len(store) == 1


def test_a_copy_that_does_not_fit_leaves_the_folder_as_it_was(filled, monkeypatch):
    """It would take the room that there is too little of."""

    def fail(self, target):
        (target / "data.mdb").write_bytes(bytes(4096))
        raise StoreFullError("the disk is full")

    monkeypatch.setattr(Environment, "copy", fail)
    before = sorted(path.name for path in filled.iterdir())
    with pytest.raises(StoreFullError):
        compact(filled)
    assert sorted(path.name for path in filled.iterdir()) == before


@pytest.mark.parametrize(("care", "scratch"), [(compact, "compacting"), (repair, "rescue"), (repair, "repaired")])
def test_what_a_killed_process_left_is_no_hindrance(filled, care, scratch):
    (filled / scratch / "deep").mkdir(parents=True)
    (filled / scratch / "data.mdb").write_bytes(b"half a file")
    keys = [entry.key for entry in entries(filled)]
    care(filled)
    assert keys and [entry.key for entry in entries(filled)] == keys and not (filled / scratch).exists()


@pytest.mark.parametrize("care", [compact, repair, verify])
def test_care_for_a_folder_that_is_not_there_says_so(tmp_path, care):
    with pytest.raises(StoreError, match="is not a folder of a store"):
        care(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("place", ["meta pages", "everywhere"])
def test_repair_makes_a_folder_usable(filled, kv, key, forked, place):
    data = filled / "data.mdb"
    raw = bytearray(data.read_bytes())
    chance = random.Random(1)
    if place == "meta pages":
        raw[:8192] = bytes(8192)
    else:
        for _ in range(2000):
            raw[chance.randrange(8192, len(raw))] ^= 255
    data.write_bytes(raw)

    def mend():
        saved = repair(filled)
        with TieredStore(filled) as store:
            assert len(store) == saved
            for number in range(6):
                got = store.get(key(number))
                assert got is None or torch.equal(got.keys[0], kv(number, tokens=300).keys[0])
            store.put(key(0), kv(0))
        return saved

    assert forked(mend) in {str(count) for count in range(6)}
    assert (filled / "data.mdb.damaged").exists()


def test_repair_saves_what_is_whole(filled, key, kv, same, spoil):
    spoil(1, "segments")
    assert repair(filled) == 4
    with TieredStore(filled) as store:
        same(store.get(key(3)), kv(3, tokens=300))
        assert not store.contains(key(1))


def test_structure_names_damaged_pages(filled, key):
    """Pages of LMDB's own that are damaged: named before anything is changed, and repair() saves what it can."""
    assert structure(filled) == []
    data = filled / "data.mdb"
    raw = bytearray(data.read_bytes())
    spoil_leaves(raw)
    data.write_bytes(raw)
    assert structure(filled)
    assert repair(filled) <= 6
    assert structure(filled) == []


def spoil_leaves(raw):
    """Lets the first node of every leaf page that holds headers of records lie outside of the page."""
    for at in range(8192, len(raw), 4096):
        if raw[at + 10 : at + 12] == b"\2\0" and b"RAGKV" in raw[at : at + 4096]:
            raw[at + 16 : at + 18] = (4094).to_bytes(2, "little")


def test_what_is_no_store(tmp_path):
    for function in (verify, compact, repair):
        with pytest.raises(StoreError):
            function(tmp_path / "nothing")
    with pytest.raises(StoreError):
        list(entries(tmp_path / "nothing"))


def test_a_repair_keeps_every_damaged_file_and_replaces_it_in_one_step(filled, monkeypatch):
    data, kept = filled / "data.mdb", []
    for name in ("data.mdb.damaged", "data.mdb.damaged1"):
        kept.append(data.read_bytes())
        assert repair(filled) > 0
        assert [(filled / name).read_bytes() for name in ("data.mdb.damaged", name)] == [kept[0], kept[-1]]
    before = data.read_bytes()

    real = os.replace

    def crash(source, target):
        if target == data:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        repair(filled)
    assert data.read_bytes() == before
