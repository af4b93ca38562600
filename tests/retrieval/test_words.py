"""The index of words: a copy that follows the catalogue, whatever happens to its file."""

import logging
import os
import sqlite3

import pytest

from ragkv.retrieval import Retriever
from ragkv.retrieval.words import WordIndex

from .conftest import HashEmbedder, put

TEXTS = {
    "cats.md": ["A cat sat on the mat.", "The kitten drank milk."],
    "boats.md": ["The harbour sells ropes.", "A boat came in the night.", "Part XJ-900 is a café pump."],
    "harbour.md": ["港口出售绳索。"],
}


@pytest.fixture
def filled(catalogue):
    for source, passages in TEXTS.items():
        put(catalogue, source, passages)
    return catalogue


def found(words, catalogue, query, k=10, among=None):
    with catalogue.snapshot() as view:
        return [view.passage_text(each) for each in words.search(view, query, k, among)]


def test_words_are_found_by_stem_accent_case_and_number(filled):
    words = WordIndex(None)
    for query in ("xj-900", "PUMPS", "the cafe's pump", "XJ 900?"):
        assert found(words, filled, query, 1) == ["Part XJ-900 is a café pump."], query
    assert found(words, filled, "rope") == ["The harbour sells ropes."]
    assert found(words, filled, "绳索在哪里") == ["港口出售绳索。"], "no blanks between words"


def test_rarer_words_count_more_and_k_is_kept(filled):
    words = WordIndex(None)
    assert found(words, filled, "the kitten")[0] == "The kitten drank milk."
    assert len(found(words, filled, "the a", 2)) == 2
    assert found(words, filled, "zebra") == [] == found(words, filled, "?! \"'")


@pytest.mark.parametrize(
    "query", ['"', "a OR", "NEAR(", "text:boat*", "^boat", "boat AND NOT night", "x" * 9999, "w " * 999]
)
def test_nothing_in_a_question_is_syntax(filled, query):
    assert set(found(WordIndex(None), filled, query)) <= {text for texts in TEXTS.values() for text in texts}


def test_only_some_may_be_found(filled):
    ids = filled.get("cats.md").passage_ids
    assert set(found(WordIndex(None), filled, "the a boat", among=ids)) == set(TEXTS["cats.md"])
    assert found(WordIndex(None), filled, "boat", among=[]) == []


def test_it_follows_what_is_added_replaced_and_removed(filled, tmp_path):
    words = WordIndex(tmp_path / "words.sqlite")
    assert found(words, filled, "boat") == ["A boat came in the night."]
    put(filled, "boats.md", ["A boat left at noon.", "The harbour sells ropes."])
    assert found(words, filled, "boat") == ["A boat left at noon."]
    filled.remove("boats.md")
    assert found(words, filled, "boat harbour") == []
    other = WordIndex(tmp_path / "words.sqlite")  # as another process would
    assert found(other, filled, "kitten") == ["The kitten drank milk."]
    put(filled, "more.md", ["A kitten swam."])
    assert sorted(found(other, filled, "kitten")) == sorted(found(words, filled, "kitten"))
    assert len(found(words, filled, "kitten")) == 2


def test_an_older_snapshot_is_searched_as_it_was(filled, tmp_path):
    words = WordIndex(tmp_path / "words.sqlite")
    with filled.snapshot() as before:
        put(filled, "boats.md", ["A boat left at noon."])
        assert found(words, filled, "boat") == ["A boat left at noon."]
        assert [before.passage_text(each) for each in words.search(before, "boat", 9)] == ["A boat came in the night."]
    assert found(words, filled, "boat") == ["A boat left at noon."]


def test_ids_of_another_history_are_known_by_their_texts(tmp_path, embedder):
    """As after a backup of the catalogue was put back, whose next ids went to other texts."""
    from ragkv.retrieval import Catalogue

    words = WordIndex(tmp_path / "words.sqlite")
    for text in ("one boat", "one kitten"):
        with Catalogue() as catalogue:
            put(catalogue, "a.md", ["the same", text])
            assert found(words, catalogue, "one") == [text]
            assert found(words, catalogue, "same") == ["the same"]


@pytest.mark.parametrize("damage", ["zeros", "text", "other", "short"])
def test_a_damaged_file_is_made_again(filled, tmp_path, caplog, damage):
    path = tmp_path / "words.sqlite"
    words = WordIndex(path)
    assert found(words, filled, "boat") == ["A boat came in the night."]
    words.close()
    whole = path.read_bytes()
    if damage == "other":
        path.unlink()
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE passages(something)")
        db.close()
    else:
        path.write_bytes({"zeros": bytes(len(whole)), "text": b"hello" * 999, "short": whole[:5000]}[damage])
    with caplog.at_level(logging.WARNING, "ragkv.retrieval"):
        assert found(WordIndex(path), filled, "boat") == ["A boat came in the night."]
    assert "made again" in caplog.text and "memory" not in caplog.text
    caplog.clear()
    assert found(WordIndex(path), filled, "boat") == ["A boat came in the night."] and not caplog.text


def test_where_no_file_can_be_it_is_kept_in_memory(filled, tmp_path, caplog):
    words = WordIndex(tmp_path / "missing" / "words.sqlite")
    assert found(words, filled, "boat") == ["A boat came in the night."]
    assert "kept in memory" in caplog.text


def test_a_forked_child_goes_on(filled, tmp_path):
    words = WordIndex(tmp_path / "words.sqlite")
    assert found(words, filled, "boat")
    child = os.fork()
    if not child:
        code = 1
        try:
            code = 0 if found(words, filled, "boat") == ["A boat came in the night."] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    put(filled, "more.md", ["Another boat."])
    assert len(found(words, filled, "boat")) == 2


def test_it_survives_a_restart(tmp_path, embedder, caplog):
    with Retriever.open(tmp_path, embedder) as retriever:
        for source, passages in TEXTS.items():
            retriever.add(source, passages)
        assert retriever.search("xj-900", 1, hybrid=True)[0].text == TEXTS["boats.md"][2]
    size = (tmp_path / "words.sqlite").stat().st_size
    with Retriever.open(tmp_path, HashEmbedder()) as retriever:
        assert retriever.search("xj-900", 1, hybrid=True)[0].text == TEXTS["boats.md"][2]
    assert (tmp_path / "words.sqlite").stat().st_size == size and not caplog.text


def test_a_folder_that_may_not_be_written_to(tmp_path, embedder, monkeypatch):
    with Retriever.open(tmp_path, embedder) as retriever:
        retriever.add("boats.md", TEXTS["boats.md"])
    monkeypatch.setattr("ragkv.retrieval.catalogue.Catalogue.readonly", True)
    with Retriever.open(tmp_path, HashEmbedder()) as retriever:
        assert retriever.search("xj-900", 1, hybrid=True)[0].text == TEXTS["boats.md"][2]
    assert not (tmp_path / "words.sqlite").exists()
