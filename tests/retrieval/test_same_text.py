"""Passages of equal text: for a model one stands for all; who searches sees them all."""

import pytest

from ragkv.retrieval import Retrieval, Retriever

TEXT = "The XJ-900 pump lifts forty litres."
NEAR = [
    "The XJ-900 pump lifts fifty litres.",
    "The XJ-900 pump lifts forty litres",
    "the XJ-900 pump lifts forty litres.",
]
OTHERS = ["The pump is blue.", "The valve is green."]


@pytest.fixture
def retriever(embedder):
    with Retriever.open(None, embedder) as retriever:
        for source in ("a", "b", "c"):
            retriever.add(source, [TEXT])
        retriever.add("near", NEAR)
        retriever.add("others", OTHERS)
        yield retriever


def found(retriever, top_k, query=TEXT, **options):
    return retriever.find(query, Retrieval(top_k, order="retrieved", **options))


@pytest.mark.parametrize(
    "options", [{}, {"hybrid": True}, {"rerank": lambda question, texts: [-len(t) for t in texts]}]
)
def test_one_stands_for_all_and_the_next_hits_come_in_the_places_of_the_others(retriever, options):
    hits = found(retriever, 6, **options)
    assert sorted(hit.text for hit in hits) == sorted([TEXT, *NEAR, *OTHERS]), "what is nearly equal stays"
    (first,) = (hit for hit in hits if hit.copies)
    assert (first.text, first.source) == (TEXT, "a")
    assert [(hit.source, hit.text, hit.score) for hit in first.copies] == [
        ("b", TEXT, first.score),
        ("c", TEXT, first.score),
    ]
    assert len(found(retriever, 2, **options)) == 2
    raw = retriever.search(TEXT, 3)
    assert {hit.source for hit in raw} == {"a", "b", "c"} and not any(hit.copies for hit in raw)


def test_a_reranker_is_not_asked_for_a_text_twice(retriever):
    asked = []
    found(retriever, 2, rerank=lambda question, texts: asked.extend(texts) or [1.0] * len(texts))
    assert len(asked) == len(set(asked)) == 6


def test_only_documents_that_may_be_found_are_copies(retriever):
    (first,) = (hit for hit in found(retriever, 9, where={"source": {"$ne": "a"}}) if hit.copies)
    assert first.source == "b" and [hit.source for hit in first.copies] == ["c"]


def test_a_document_that_repeats_itself(retriever):
    retriever.add("again", ["Rules.", "One.", "Rules.", "Two.", "Rules."])
    hits = found(retriever, 1, "Rules.", neighbours=1)
    assert [(hit.source, hit.position) for hit in hits] == [("again", 0), ("again", 1)]
    beside = found(retriever, 1, "One.", neighbours=1)
    assert [hit.position for hit in beside] == [1, 0] and [hit.position for hit in beside[1].copies] == [2]
    assert [hit.position for hit in retriever.search("One.", 1, neighbours=1)] == [1, 0, 2]


def test_a_hundred_copies_do_not_hide_the_rest(retriever, monkeypatch):
    for number in range(100):
        retriever.add(f"copy {number}", [TEXT])
    asked, search = [], retriever.index.search
    monkeypatch.setattr(
        retriever.index, "search", lambda vector, k, *among: asked.append(k) or search(vector, k, *among)
    )
    hits = found(retriever, 4)
    assert len({hit.text for hit in hits}) == 4 and len(hits[0].copies) == 102
    del asked[:]
    assert len(found(retriever, 4, min_score=hits[0].score)) == 2, "another text has the same words, and its vector"
    assert max(asked) <= 128, "it is looked no deeper than the score allows"
    del asked[:]
    assert len(found(retriever, 9)) == 6, "that is all there is"
    assert asked[-1] >= 107


def test_a_second_hop_finds_no_text_of_the_first_again(embedder):
    with Retriever.open(None, embedder) as retriever:
        retriever.add("town", ["The mayor of Belmar is Ada Moor."])
        retriever.add("copy", ["The mayor of Belmar is Ada Moor."])
        retriever.add("person", ["Ada Moor speaks Czech."])
        hits = found(retriever, 1, "The mayor of Belmar is whom?", hops=2)
        assert [hit.source for hit in hits] == ["town", "person"]
