"""The catalogue: what documents put into it, what replaces what, what is left over."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ragkv.chunk import digest
from ragkv.errors import DocumentError, RetrievalError
from ragkv.retrieval import Catalogue, Reading
from ragkv.retrieval.records import reading_key, source_key

from .conftest import HashEmbedder, put


def test_what_is_put_is_there(catalogue, embedder):
    metadata = {"title": "Über", "pages": [1, 2], "deep": {"x": None}}
    change = put(catalogue, "a.md", ["first", "second é😀"], metadata, embedder)
    document = catalogue.get("a.md")
    assert change.document == document and document.metadata == metadata and document.passage_ids == change.new
    assert catalogue.texts("a.md") == ["first", "second é😀"]
    passage = catalogue.passage(document.passage_ids[1])
    assert (passage.text, passage.position, passage.document) == ("second é😀", 1, document)
    with catalogue.snapshot() as view:
        np.testing.assert_array_equal(
            view.vectors(document.passage_ids), embedder.encode_documents(["first", "second é😀"])
        )
    assert len(catalogue) == 1 and "a.md" in catalogue and "b.md" not in catalogue and 3 not in catalogue
    assert catalogue.check() == []


def test_the_same_again_does_nothing(catalogue, embedder):
    first = put(catalogue, "a", ["one", "two"], {"x": (1, 2)}, embedder)
    state = catalogue.state
    again = put(catalogue, "a", ["one", "two"], {"x": [1, 2]}, embedder)
    assert embedder.embedded == ["one", "two"] and catalogue.state == state
    assert again.document == first.document and again.kept == first.new
    assert not (again.new or again.removed or again.embedded or again.unused)
    assert again.replaced and again.first_changed is None and not first.replaced


def test_other_metadata_embeds_nothing(catalogue, embedder):
    put(catalogue, "a", ["one"], {"x": 1}, embedder)
    state = catalogue.state
    change = put(catalogue, "a", ["one"], {"x": 2}, embedder)
    assert catalogue.get("a").metadata == {"x": 2} and embedder.embedded == ["one"]
    assert catalogue.state == state and change.first_changed is None and change.new == ()


def test_a_renamed_document_keeps_everything(catalogue, embedder):
    reading = Reading("ab" * 32, [digest("kv", text) for text in ("one", "two")], b"record")
    change = catalogue.put("a", ["one", "two"], embedder.encode_documents, {"x": 1}, reading=reading)
    put(catalogue, "c", ["two"], embedder=embedder)
    state = catalogue.state
    document = catalogue.rename("a", "b", lambda kept: kept._replace(record=b"of b"))
    assert document == replace(change.document, source="b") == catalogue.get("b") and "a" not in catalogue
    assert catalogue.texts("b") == ["one", "two"] and catalogue.state == state
    assert catalogue.passage(document.passage_ids[1]).document == document
    with catalogue.snapshot() as view:
        assert view.readings(document) == [reading._replace(record=b"of b")] and view.names(reading.keys[0])
    assert embedder.embedded == ["one", "two"] and catalogue.check() == []
    assert (
        catalogue.rename("a", "d", lambda kept: kept) is None and catalogue.rename("b", "c", lambda kept: kept) is None
    )
    assert sorted(item.source for item in catalogue) == ["b", "c"] and catalogue.check() == []
    assert catalogue.rename("b", "d", lambda kept: None) and catalogue.check() == []
    with catalogue.snapshot() as view:
        assert not view.readings(catalogue.get("d")) and not view.names(reading.keys[0])


def test_a_replaced_document_keeps_what_it_can(catalogue, embedder):
    old = put(catalogue, "a", ["one", "two", "three", "two"], embedder=embedder).new
    change = put(catalogue, "a", ["zero", "two", "one", "four"], embedder=embedder)
    assert change.document.passage_ids == (change.new[0], old[1], old[0], change.new[1])
    assert change.kept == (old[0], old[1]) and change.removed == (old[2], old[3])
    assert embedder.embedded == ["one", "two", "three", "zero", "four"] and change.embedded == 2
    assert change.replaced and change.first_changed == 0
    assert [catalogue.passage(i).position for i in change.document.passage_ids] == [0, 1, 2, 3]
    for gone in change.removed:
        with pytest.raises(RetrievalError, match=f"no passage {gone}"):
            catalogue.passage(gone)
    assert catalogue.check() == []


@pytest.mark.parametrize(
    ("before", "after", "first_changed"),
    [("abc", "abd", 2), ("abc", "ab", None), ("abc", "abcd", 3), ("abc", "xbc", 0), ("abc", "acb", 1)],
)
def test_where_reading_begins_again(catalogue, before, after, first_changed):
    put(catalogue, "a", list(before))
    assert put(catalogue, "a", list(after)).first_changed == first_changed


def read_by(model, texts):
    """How a made-up model reads texts, each behind those before it."""
    keys = [digest(model, *texts[: number + 1]) for number in range(len(texts))]
    return Reading(digest(model).hex(), keys, f"{model} {texts}".encode())


def found(catalogue, source, model):
    with catalogue.snapshot() as view:
        return view.reading(reading_key(source_key(source), digest(model).hex()))


def test_a_reading_is_kept_with_its_document(catalogue):
    one, two = ["one", "two", "three"], ["one", "two", "four"]
    put(catalogue, "a", one, reading=read_by("m", one))
    put(catalogue, "b", two, reading=read_by("m", two))
    assert found(catalogue, "a", "m") == read_by("m", one) and found(catalogue, "a", "other") is None
    # "one" and "one, two" are read for b as well
    assert catalogue.remove("a").unused == (read_by("m", one).keys[2],)
    assert found(catalogue, "a", "m") is None
    change = put(catalogue, "b", two[:2], reading=read_by("m", two[:2]))
    assert change.unused == (read_by("m", two).keys[2],) and catalogue.check() == []


def test_several_models_read_one_document(catalogue):
    texts = ["one", "two"]
    put(catalogue, "a", texts, reading=read_by("m", texts))
    assert not put(catalogue, "a", texts, reading=read_by("n", texts)).unused
    assert not put(catalogue, "a", texts).unused
    assert [found(catalogue, "a", model) for model in "mn"] == [read_by(model, texts) for model in "mn"]
    put(catalogue, "a", texts, {"title": "x"})  # no passage changes: what was read stays
    assert found(catalogue, "a", "m") is not None
    # another text: what the models read is gone, and all of it is to be dropped
    change = put(catalogue, "a", ["three"], reading=read_by("m", ["three"]))
    assert set(change.unused) == {*read_by("m", texts).keys, *read_by("n", texts).keys}
    assert found(catalogue, "a", "n") is None and catalogue.check() == []


def test_readings_found_out_later(catalogue):
    texts = ["one", "two"]
    put(catalogue, "a", texts)
    put(catalogue, "b", texts)
    old = catalogue.get("a")
    put(catalogue, "a", ["three"])
    late = [(old, read_by("m", texts)), (catalogue.get("b"), read_by("m", texts))]
    assert catalogue.keep(late) == set()
    assert found(catalogue, "a", "m") is None, "it has changed meanwhile"
    assert found(catalogue, "b", "m") == read_by("m", texts)
    other = read_by("m", texts)._replace(keys=read_by("n", texts).keys)
    assert catalogue.keep([(catalogue.get("b"), other)]) == set(read_by("m", texts).keys)
    assert catalogue.check() == []


def test_equal_texts_are_embedded_once(catalogue, embedder):
    change = put(catalogue, "a", ["same", "same", "other"], embedder=embedder)
    assert len(set(change.new)) == 3 and change.embedded == 2
    assert put(catalogue, "b", ["other", "same"], embedder=embedder).embedded == 0
    assert embedder.embedded == ["same", "other"]
    with catalogue.snapshot() as view:
        rows = view.vectors(change.new)
    np.testing.assert_array_equal(rows[0], rows[1])


def test_ids_are_never_given_again(catalogue):
    seen = set()
    for round in range(3):
        new = put(catalogue, "a", [f"text {round}"]).new
        assert not seen & set(new)
        seen |= set(new)
        catalogue.remove("a")


def test_embedding_holds_no_lock(catalogue):
    """A text counted on goes away while others are embedded: it is embedded after all."""
    put(catalogue, "a", ["shared"])
    embedder = HashEmbedder()

    def embed(texts):
        if "shared" not in texts:
            catalogue.remove("a")
        return embedder.encode_documents(texts)

    change = catalogue.put("b", ["shared", "own"], embed)
    assert embedder.embedded == ["own", "shared"] and change.embedded == 2 and catalogue.check() == []


def test_a_failing_embedder_changes_nothing(catalogue):
    put(catalogue, "a", ["one"])
    state = catalogue.state
    with pytest.raises(ZeroDivisionError):
        catalogue.put("a", ["two"], lambda texts: 1 / 0)
    for wrong in (np.zeros((2, 4)), np.zeros(4), np.zeros((1, 0))):
        with pytest.raises(RetrievalError, match=r"must give vectors of shape \[1, d\]"):
            catalogue.put("a", ["two"], lambda texts, wrong=wrong: wrong)
    with pytest.raises(RetrievalError, match="not finite"):
        catalogue.put("a", ["two"], lambda texts: np.full((1, 4), np.nan))
    assert catalogue.state == state and catalogue.texts("a") == ["one"]


@pytest.mark.parametrize(
    ("source", "passages", "metadata", "message"),
    [
        ("", ["x"], None, "needs a source"),
        (None, ["x"], None, "needs a source"),
        ("a", [], None, "at least one passage"),
        ("a", "text", None, "list of str"),
        ("a", ["x", 3], None, "list of str"),
        ("a", 3, None, "list of str"),
        ("a", ["x", " \n"], None, "passage 1 is blank"),
        ("a", ["\ud800"], None, "not valid Unicode"),
        ("\ud800", ["x"], None, "not valid Unicode"),
        ("a", ["x"], {"y": object()}, "JSON"),
        ("a", ["x"], {"y": float("nan")}, "JSON"),
        ("a", ["x"], ["y"], "metadata must be a dict, got list"),
    ],
)
def test_bad_documents(catalogue, source, passages, metadata, message):
    with pytest.raises(DocumentError, match=message):
        put(catalogue, source, passages, metadata)
    assert len(catalogue) == 0


def test_what_is_not_there(catalogue):
    assert catalogue.get("a") is None
    for call in (catalogue.remove, catalogue.texts):
        with pytest.raises(DocumentError, match="no document 'a'"):
            call("a")
    for passage_id in (0, -1, 2**64):
        with pytest.raises(RetrievalError, match=f"no passage {passage_id}"):
            catalogue.passage(passage_id)


def test_long_names_and_many_passages(catalogue):
    passages = [f"passage {i}" for i in range(3000)]
    put(catalogue, "name" * 5000, passages)
    assert catalogue.texts("name" * 5000) == passages and catalogue.check() == []


def test_a_snapshot_does_not_move(catalogue):
    put(catalogue, "a", ["one"])
    with catalogue.snapshot() as view:
        document = view.get("a")
        put_in_thread(catalogue, "a", ["two"])
        assert view.get("a") == document and view.texts(document) == ["one"]
        vector = view.vector(document.passage_ids[0])
    assert catalogue.texts("a") == ["two"]
    catalogue.close()
    assert vector.sum() > 0  # a copy, not a view of what LMDB may use again


def put_in_thread(catalogue, *args):
    thread = threading.Thread(target=put, args=(catalogue, *args))
    thread.start()
    thread.join()


class Model(RuleBasedStateMachine):
    """Any sequence of puts and removals leaves what a dict would hold, and a catalogue that fits together."""

    sources = st.sampled_from("abc")
    texts = st.lists(st.sampled_from("uvwxyz"), min_size=1, max_size=6)

    @initialize()
    def open(self):
        self.catalogue, self.expected = Catalogue(), {}

    @rule(source=sources, texts=texts)
    def put(self, source, texts):
        old = self.expected.get(source, [])
        self.expected[source] = texts
        change = put(self.catalogue, source, texts, reading=read_by("m", texts))
        assert change.replaced == bool(old)
        assert len(change.new) + len(change.kept) == len(texts)
        assert len(change.removed) + len(change.kept) == len(old)
        self.check_unused(change, old)

    @rule(source=sources)
    def remove(self, source):
        if source in self.expected:
            old = self.expected.pop(source)
            self.check_unused(self.catalogue.remove(source), old)

    @rule(source=sources, to=sources)
    def rename(self, source, to):
        renamed = self.catalogue.rename(source, to, lambda reading: reading)
        assert (renamed is not None) == (source in self.expected and to not in self.expected)
        if renamed is not None:
            self.expected[to] = self.expected.pop(source)

    def check_unused(self, change, old):
        named = {key for texts in self.expected.values() for key in read_by("m", texts).keys}
        assert set(change.unused) == set(read_by("m", old).keys) - named

    @invariant()
    def fits(self):
        assert {d.source: self.catalogue.texts(d.source) for d in self.catalogue} == self.expected
        assert self.catalogue.check() == []

    def teardown(self):
        self.catalogue.close()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
