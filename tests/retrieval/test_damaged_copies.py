"""What is a copy of the catalogue, harmed in every way: the same answers, or an error that names the file; never a signal."""

import os
import random
import resource
import shutil
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from ragkv.retrieval import Catalogue, Retriever
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.words import WordIndex

from .conftest import HashEmbedder

WORDS = ["harbour", "boat", "rope"]
TEXTS = [f"number {number} is a word w{number} of {WORDS[number % 3]}" for number in range(200)]
QUESTIONS = ("w77 boat", "the harbour", "number 5 rope")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr("ragkv.retrieval.segments.SegmentedIndex.__init__.__defaults__", (None, 50))


def fill(folder, texts=TEXTS):
    with Retriever.open(folder, HashEmbedder()) as retriever:
        for number in range(0, len(texts), 20):
            retriever.add(f"document {number}", texts[number : number + 20], {"n": number})
        retriever.remove("document 60")
        return answers(retriever)


def answers(retriever):
    """Passages and scores of all kinds of search; all of them, because which of a file's are missed depends on its clusters."""
    found = {}
    for query in QUESTIONS:
        for name, options in {
            "vectors": {},
            "hybrid": {"hybrid": True},
            "where": {"where": {"n": {"$gte": 100}}, "hybrid": True},
        }.items():
            hits = retriever.search(query, 200, **options)
            found[query, name] = {hit.text: round(float(hit.score), 4) for hit in hits}
        with retriever.catalogue.snapshot() as view:
            found[query, "words"] = retriever._indexes.words.search(view, query, 20)
    return found


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder of three files of vectors, an index of words, and what it finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ragkv.retrieval.segments.SegmentedIndex.__init__.__defaults__", (None, 50))
        folder = tmp_path_factory.mktemp("filled")
        return folder, fill(folder)


@pytest.fixture
def copy(filled, tmp_path):
    return shutil.copytree(filled[0], tmp_path / "copy")


def cut(path, share):
    os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_cut_short_while_it_is_open(filled, copy, forked, share):
    """A mapped file would end the process."""

    def work():
        with Retriever.open(copy, HashEmbedder()) as retriever:
            assert len(retriever.index._segments) == 3
            for path in copy.glob("segment-*"):
                cut(path, share)
            return answers(retriever) == filled[1]

    assert forked(work) == "True"


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_words_cut_short_while_they_are_open(filled, copy, forked, share):
    def work():
        with Retriever.open(copy, HashEmbedder()) as retriever:
            retriever.search("w77", 5, hybrid=True)
            for path in copy.glob("words*"):
                cut(path, share)
            return answers(retriever) == filled[1]

    assert forked(work) == "True"


def test_a_file_in_the_place_of_another(filled, copy, caplog):
    first, second, _ = copy.glob("segment-*")
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert answers(retriever) == filled[1]
    assert first.name in caplog.text or second.name in caplog.text


def test_a_file_of_another_folder(filled, copy, tmp_path, caplog):
    fill(tmp_path / "other", [f"foreign {number} w{number}" for number in range(200)])
    for own, foreign in zip(copy.glob("segment-*"), (tmp_path / "other").glob("segment-*"), strict=True):
        shutil.copy(foreign, own)
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert answers(retriever) == filled[1]
    assert "segment-" in caplog.text


@pytest.mark.parametrize("harm", ["emptied", "cut", "text", "foreign"])
@pytest.mark.parametrize("name", ["index.safetensors", "words.sqlite", "segment-*.safetensors"])
def test_harmed_while_nobody_has_it_open(filled, copy, tmp_path, name, harm):
    if harm == "foreign":
        fill(tmp_path / "other", [f"foreign {number} w{number} boat" for number in range(200)])
    foreign = sorted((tmp_path / "other").glob(name))
    for number, path in enumerate(sorted(copy.glob(name))):
        match harm:
            case "emptied":
                cut(path, 0)
            case "cut":
                cut(path, 0.7)
            case "text":
                path.write_bytes(b"something else " * 1000)
            case "foreign":
                shutil.copy(foreign[number], path)
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert answers(retriever) == filled[1]
        retriever.add("new", ["a new passage"])
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert "a new passage" in {hit.text for hit in retriever.search("passage", 300, hybrid=True)}


def test_written_to_while_it_is_open(filled, copy, tmp_path):
    """The same file, as `cp` and a backup that is put back write."""
    fill(tmp_path / "other", [f"foreign {number} w{number}" for number in range(200)])
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert answers(retriever) == filled[1]
        for own, foreign in zip(copy.glob("segment-*"), (tmp_path / "other").glob("segment-*"), strict=True):
            own.write_bytes(foreign.read_bytes())
        assert answers(retriever) == filled[1]


def flipped(data, chance):
    harmed = bytearray(data)
    for _ in range(chance.choice((1, 1, 8))):
        harmed[chance.randrange(len(harmed))] ^= 1 << chance.randrange(8)
    return harmed


def test_flipped_bits_of_vectors_change_no_answer(filled, copy):
    chance = random.Random(5)
    for _ in range(12):
        path = chance.choice(sorted(copy.glob("*.safetensors")))
        path.write_bytes(flipped(path.read_bytes(), chance))
        with Retriever.open(copy, HashEmbedder()) as retriever:
            assert answers(retriever) == filled[1]


@pytest.mark.parametrize("open_already", [False, True])
def test_flipped_bits_of_words_are_found_or_harmless(filled, copy, open_already):
    """SQLite keeps no checksums: what a search does not notice, `check` does; and no search fails or finds what there is not."""
    chance, path, seen = random.Random(6), copy / "words.sqlite", set()
    data = path.read_bytes()
    with Catalogue(copy) as catalogue, catalogue.snapshot() as view:
        ids = set(view.passage_ids().tolist())
        for _ in range(40):
            words = WordIndex(path)
            if open_already:
                path.write_bytes(data)
                words.search(view, "rope", 1)
            path.write_bytes(flipped(data, chance))
            wrong = open_already or words.check()
            found = {(query, "words"): words.search(view, query, 20) for query in QUESTIONS}
            same = all(found[each] == filled[1][each] for each in found)
            assert same or wrong
            assert ids >= set().union(*found.values())
            seen.add(same)
            words.close()
    assert True in seen


def test_words_of_a_passage_that_there_is_not(filled, copy, caplog):
    with closing(sqlite3.connect(copy / "words.sqlite")) as db, db:
        db.execute("INSERT INTO passages(rowid, text) VALUES (999, 'rope rope rope')")
    with Retriever.open(copy, HashEmbedder()) as retriever:
        assert answers(retriever) == filled[1]
    assert "made again" in caplog.text


def test_a_full_disk_leaves_vectors_in_memory(tmp_path, forked):
    def work():
        chance = np.random.default_rng(0)
        vectors = chance.standard_normal((300, 16)).astype(np.float32)
        index = SegmentedIndex(16, tmp_path, segment=100)
        index.add(np.arange(100), vectors[:100])
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
        index.add(np.arange(100, 300), vectors[100:])
        assert len(index) == 300 and index.search(vectors[250], 1)[0] == [250]
        return list(tmp_path.iterdir())

    assert forked(work) == "[]"
