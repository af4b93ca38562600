"""List, verify, prune, compact, repair, export, import: on folders that are really damaged or full of holes."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors import safe_open

from ragkv.errors import RecordError, StoreError
from ragkv.store import TieredStore
from ragkv.store.exchange import export, import_records
from ragkv.store.maintenance import compact, entries, prune, repair, verify


@pytest.fixture
def filled(folder, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        for number in range(6):
            store.put(key(number), kv(number, tokens=300), space=f"model {number % 2}", cost_s=number)
        store.get(key(3))
        store.pin(key(2))
        store.put(key(5), kv(5, tokens=300), lifetime_s=1e-6)
    return folder


def spoil(folder, key, what):
    with TieredStore(folder, cpu_bytes=0) as store:
        env = store._disk.environment
        with env.write() as txn:
            name, place = {"segments": (key + bytes(4), 70), "entries": (key, 90), "usage": (key, 3)}[what]
            data = bytearray(txn.get(name, db=env.db(what.encode())))
            data[place] ^= 16
            txn.put(name, bytes(data), db=env.db(what.encode()))


def test_entries(filled, key):
    found = {entry.key: entry for entry in entries(filled)}
    assert set(found) == {key(number) for number in range(6)} or len(found) == 5
    three = found[key(3)]
    assert (three.space, three.codec, three.tokens, three.frequency, three.cost_s) == ("model 1", "raw", 300, 2, 3.0)
    assert three.size_bytes > 300 * 2 * 8 * 4 * 6
    assert 0 < three.created_s <= three.used_s
    assert found[key(2)].pinned and not three.pinned


@pytest.mark.parametrize("what", ["segments", "entries", "usage"])
def test_verify_names_and_drops_what_is_damaged(filled, key, what, same, kv):
    assert verify(filled).damaged == []
    spoil(filled, key(1), what)
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


def test_repair_saves_what_is_whole(filled, key, kv, same):
    spoil(filled, key(1), "segments")
    assert repair(filled) == 4
    with TieredStore(filled) as store:
        same(store.get(key(3)), kv(3, tokens=300))
        assert not store.contains(key(1))


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_export_is_safetensors_and_comes_back(folder, tmp_path, kv, key, same, codec):
    with TieredStore(folder, cpu_bytes=0, codec=codec) as store:
        for number in range(3):
            store.put(key(number), kv(number, tokens=3000, dtype=torch.bfloat16), space="model")
        want = [store.get(key(number)) for number in range(3)]
    assert export(folder, tmp_path / "out") == 3
    with safe_open(tmp_path / "out" / f"{key(1).hex()}.safetensors", "pt") as file:
        assert file.metadata()["space"] == "model"
        if codec == "raw":
            assert torch.equal(file.get_tensor("k.2"), want[1].keys[2])
    assert import_records(tmp_path / "other", tmp_path / "out", disk_bytes=1 << 30) == 3
    with TieredStore(tmp_path / "other") as store:
        for number in range(3):
            same(store.get(key(number)), want[number])


def test_damaged_file_is_not_imported(folder, tmp_path, kv, key):
    with TieredStore(folder, cpu_bytes=0) as store:
        store.put(key(1), kv(1))
    export(folder, tmp_path / "out")
    file = next((tmp_path / "out").glob("*.safetensors"))
    whole = file.read_bytes()
    for harm in (whole[:-1], whole[:-5] + b"?" + whole[-4:], b"", whole[:20], b"\xff" * 100):
        file.write_bytes(harm)
        with pytest.raises(RecordError):
            import_records(tmp_path / "other", tmp_path / "out", disk_bytes=1 << 30)


def test_what_is_no_store(tmp_path):
    for function in (verify, compact, repair):
        with pytest.raises(StoreError):
            function(tmp_path / "nothing")
    with pytest.raises(StoreError):
        list(entries(tmp_path / "nothing"))
