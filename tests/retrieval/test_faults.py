"""Damage really done to a catalogue's file: equal data or a named error, never another text and never a signal."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from ragkv.errors import RagKVError, RecordError
from ragkv.retrieval import Catalogue
from ragkv.retrieval.rescue import rescue
from tests.damage import cut_short, flip_bits

from .conftest import HashEmbedder, put

DOCUMENTS = {
    f"document {number}": [
        f"passage {place} of {number} " + "and so on " * (number * 40) for place in range(number + 1)
    ]
    for number in range(12)
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """The file of a catalogue with values on leaves and on pages of their own."""
    folder = tmp_path_factory.mktemp("filled")
    with Catalogue(folder) as catalogue:
        for source, passages in DOCUMENTS.items():
            put(catalogue, source, passages)
        catalogue.remove("document 3")
        put(catalogue, "document 3", DOCUMENTS["document 3"])
    return folder / "data.mdb"


def use(catalogue: Catalogue) -> set[str]:
    """Reads all and writes; ``equal`` and the names of errors. Raises for another text or another error."""
    seen = set()

    def tried(work):
        try:
            work()
            seen.add("equal")
        except RagKVError as error:
            seen.add(type(error).__name__)

    def read(source):
        assert catalogue.texts(source) == DOCUMENTS[source], "another text"
        with catalogue.snapshot() as view:
            for passage_id in view.get(source).passage_ids:
                passage = view.passage(passage_id)
                assert passage.text == DOCUMENTS[source][passage.position], "another passage"
                assert (view.vector(passage_id) == HashEmbedder().encode_query(passage.text)).all(), "another vector"

    for source in DOCUMENTS:
        tried(lambda source=source: read(source))
    tried(lambda: [catalogue.check(), catalogue.documents(), *catalogue])
    tried(lambda: put(catalogue, "new", ["a text that was not there"]))
    tried(lambda: catalogue.remove("document 5"))
    return seen


def use_closed(folder: Path) -> str:
    try:
        with Catalogue(folder) as catalogue:
            return " ".join(sorted(use(catalogue)))
    except RagKVError as error:
        return type(error).__name__


def copied(filled: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(filled, folder)
    return folder / "data.mdb"


def damage(times, filled, folder, forked, harm, may_end=0) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    for _ in range(times):
        with open(copied(filled, folder), "r+b") as file:
            harm(file)
        outcome = forked(lambda: use_closed(folder))
        assert "raised" not in outcome, outcome
        outcomes["signal" if "signal" in outcome else outcome] += 1
        assert outcomes["signal"] <= may_end, outcome
    return outcomes


@pytest.mark.parametrize("harm", [flip_bits(5), cut_short(5)], ids=["flipped", "cut"])
def test_damage_is_a_named_error(filled, tmp_path, forked, harm):
    outcomes = damage(25, filled, tmp_path / "copy", forked, harm)
    assert any(outcome != "equal" for outcome in outcomes)


@pytest.mark.long
@pytest.mark.parametrize(
    ("harm", "times", "may_end"), [(flip_bits(7), 500, 5), (cut_short(7), 500, 0)], ids=["flipped", "cut"]
)
def test_damage_1000_times(filled, tmp_path, forked, harm, times, may_end):
    """LMDB trusts its pages, of which so small a file mostly consists: some flips end the process, cuts never do."""
    damage(times, filled, tmp_path / "copy", forked, harm, may_end)


def lengths(filled: Path) -> list[int]:
    size, chance = filled.stat().st_size, random.Random(9)
    return [
        0,
        1,
        4095,
        4096,
        8191,
        8192,
        8193,
        12288,
        size - 4096,
        size - 1,
        *(chance.randrange(size) for _ in range(20)),
    ]


def test_cut_short_while_it_is_open(filled, tmp_path, forked):
    """What is mapped behind the end of a file kills whoever touches it."""
    folder, outcomes = tmp_path / "copy", Counter()

    def cut(length):
        with Catalogue(folder) as catalogue:
            os.truncate(folder / "data.mdb", length)
            seen = use(catalogue)
        return " ".join(sorted(seen))

    for length in lengths(filled):
        copied(filled, folder)
        outcome = forked(lambda length=length: cut(length))
        assert "raised" not in outcome and "signal" not in outcome, (length, outcome)
        outcomes[outcome] += 1
        if length:
            again = forked(lambda: use_closed(folder))
            assert "raised" not in again and "signal" not in again, (length, again)
    assert "RecordError" in outcomes


def test_what_a_cut_or_damaged_file_holds_is_rescued(filled, tmp_path, forked):
    """Documents whose texts are whole are there as they were, the others are named, and ids are never given again."""
    folder, embed = tmp_path / "copy", HashEmbedder().encode_documents
    kept, size, chance = Counter(), filled.stat().st_size, random.Random(4)
    for attempt in range(10):
        data = copied(filled, folder)
        if attempt % 2:
            os.truncate(data, chance.randrange(size // 3, size))
        else:
            raw = bytearray(data.read_bytes())
            for _ in range(4):
                page = chance.randrange(2, size // 4096) * 4096
                raw[page : page + 4096] = bytes(4096)
            data.write_bytes(raw)

        def work(folder=folder):
            rescue(folder)
            with Catalogue(folder) as catalogue:
                done = catalogue.repair(embed)
                assert catalogue.check() == []
                sources = {document.source for document in catalogue}
                assert all(catalogue.texts(source) == DOCUMENTS[source] for source in sources)
                seen = [passage_id for document in catalogue for passage_id in document.passage_ids]
                new = put(catalogue, "new", ["a text that was not there"]).new
                assert new[0] > max(seen, default=-1)
            return f"{len(sources)} {len(done)}"

        outcome = forked(work)
        assert "raised" not in outcome and "signal" not in outcome, outcome
        kept[int(outcome.split()[0])] += 1
        assert (folder / "data.mdb.damaged").exists() and not (folder / "rescue").exists()
    assert max(kept) > len(DOCUMENTS) // 2
    (folder / "data.mdb").write_bytes(b"junk" * 5000)
    with pytest.raises(RecordError, match="nothing can be read"):
        rescue(folder)
    assert (folder / "data.mdb").read_bytes() == b"junk" * 5000


def test_vectors_of_an_embedder_that_nobody_knows_are_computed_again(tmp_path):
    with Catalogue(tmp_path) as catalogue:
        catalogue.require("embedder", "known", "name")
        put(catalogue, "a", ["one", "two"])
    rescue(tmp_path)
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.settings["embedder"]["fingerprint"] == "known" and catalogue.check() == []
        with catalogue._environment.transaction(write=True) as txn:
            txn.clear("meta")
    rescue(tmp_path)
    with Catalogue(tmp_path) as catalogue:
        assert catalogue.settings == {} and catalogue.texts("a") == ["one", "two"]
        assert len(catalogue.repair(HashEmbedder().encode_documents)) == 2 and catalogue.check() == []
        assert put(catalogue, "b", ["three"]).new == (2,)
