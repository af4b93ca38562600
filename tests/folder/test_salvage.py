"""What a damaged file still holds is saved, whatever is wrong with its pages."""

from __future__ import annotations

import os
import random

import pytest

from ragkv.errors import RecordError, StoreError
from ragkv.folder import Environment, seal, unseal
from ragkv.folder.salvage import refuse_open, rewrite, salvage

DATABASES = {b"plain": {}, b"several": {"dupsort": True}, b"fixed": {"dupsort": True, "dupfixed": True}}


def everything(folder):
    environment = Environment.open(folder, DATABASES)
    with environment.transaction() as txn:
        found = {name.decode(): sorted(txn.items(name.decode())) for name in DATABASES}
    environment.close()
    return found


@pytest.fixture
def filled(tmp_path):
    """Values on leaves, on pages of their own, several under a key: few, and so many that they have a tree."""
    chance = random.Random(1)
    environment = Environment.open(tmp_path / "filled", DATABASES)
    with environment.transaction(write=True) as txn:
        for number in range(800):
            key = b"%03d" % number
            txn.put("plain", key, seal(key, chance.randbytes(chance.choice((0, 30, 700, 9000)))))
            for value in range(2000 if number == 7 else number % 4):
                txn.put("several", key, b"value %d" % value)
                txn.put("fixed", key, value.to_bytes(8, "big"))
    for number in range(0, 800, 90):  # the roots move to pages that became free
        with environment.transaction(write=True) as txn:
            txn.delete("plain", b"%03d" % number)
    environment.close()
    return tmp_path / "filled"


def test_of_a_sound_file_all_is_copied(filled, tmp_path):
    want = everything(filled)
    assert salvage(filled / "data.mdb", tmp_path / "new", DATABASES) == sum(map(len, want.values()))
    assert everything(tmp_path / "new") == want and len(want["fixed"]) > 3000


def harm(raw, chance, how):
    if how == "cut":
        return raw[: chance.randrange(8192, len(raw))]
    raw = bytearray(raw)
    for _ in range({"one page": 1, "pages": 20, "flips": 0}[how]):
        at = chance.randrange(2, len(raw) // 4096) * 4096
        raw[at : at + 4096] = bytes(4096)
    for _ in range(300 if how == "flips" else 0):
        raw[chance.randrange(8192, len(raw))] ^= 1 << chance.randrange(8)
    return bytes(raw)


@pytest.mark.parametrize("how", ["cut", "one page", "pages", "flips"])
def test_of_a_damaged_file_what_is_whole_is_saved(filled, tmp_path, how):
    want, raw, chance = everything(filled), (filled / "data.mdb").read_bytes(), random.Random(3)
    best = 0
    for attempt in range(12):
        (tmp_path / "damaged").write_bytes(harm(raw, chance, how))
        new = tmp_path / f"new {attempt}"
        salvage(tmp_path / "damaged", new, DATABASES)
        environment = Environment.open(new, DATABASES)
        assert environment.problems() == []
        environment.close()
        sound = 0
        for key, value in everything(new)["plain"]:
            try:
                unseal(key, value)
            except RecordError:
                continue
            assert (key, value) in want["plain"]
            sound += 1
        best = max(best, sound)
        if how == "one page":
            assert sound > len(want["plain"]) * 0.9 or sound == 0  # that page may have been the root
    assert best > len(want["plain"]) * 0.5


def test_nothing_to_be_saved(tmp_path):
    for number, raw in enumerate((b"", b"junk" * 5000, bytes(8192))):
        (tmp_path / "damaged").write_bytes(raw)
        with pytest.raises(RecordError, match="nothing can be read"):
            salvage(tmp_path / "damaged", tmp_path / str(number), DATABASES)


def test_a_folder_that_somebody_uses_is_refused(filled):
    refuse_open(filled)
    with pytest.raises(StoreError, match="is not a folder"):
        refuse_open(filled / "nothing")
    environment = Environment.open(filled, DATABASES)
    with pytest.raises(StoreError, match="in this process"):
        refuse_open(filled)
    environment.close()


def test_a_damaged_file_is_kept_and_replaced_in_one_step(filled, monkeypatch):
    data, want = filled / "data.mdb", everything(filled)
    (filled / "data.mdb.damaged").write_bytes(b"of an earlier day")
    before = data.read_bytes()
    rewrite(filled, DATABASES)
    assert (filled / "data.mdb.damaged").read_bytes() == b"of an earlier day"
    assert (filled / "data.mdb.damaged1").read_bytes() == before and everything(filled) == want
    before = data.read_bytes()

    real = os.replace

    def crash(source, target):
        if target == data:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        rewrite(filled, DATABASES)
    assert data.read_bytes() == before
