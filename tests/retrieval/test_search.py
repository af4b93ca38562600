"""Hybrid search, hops, scores: over an embedder whose vectors are known."""

import threading

import numpy as np
import pytest

from ragkv.bundled import MODEL_PATH, documents, questions
from ragkv.errors import ArgumentTypeError, RetrievalError, UnknownArgumentError
from ragkv.retrieval import Retrieval, Retriever, TokenChunker
from ragkv.retrieval.found import within
from ragkv.retrieval.ranking import fused, names
from ragkv.retrieval.records import Document, Passage

from .conftest import HashEmbedder

TOWN = ["The town lies on a river.", "For years it has been governed by Ada Moor. Nets are sold.", "A fair is held."]
PERSON = ["Ada Moor keeps a goose.", "With friends she speaks Czech.", "She was a dentist."]


@pytest.fixture
def retriever(embedder):
    with Retriever.open(None, embedder) as retriever:
        retriever.add("Belmar", ["Belmar is described here.", *TOWN], {"kind": "town", "year": 1900})
        retriever.add("Ada", PERSON, {"kind": "person"})
        for number in range(8):
            retriever.add(f"other-{number}", [f"What language does the mayor of town {number} know? Nobody says."])
        yield retriever


def texts(hits):
    return [hit.text for hit in hits]


def test_ranks_are_fused_by_their_reciprocals():
    assert fused([[1, 2, 3], [3, 1, 4]]) == [1, 3, 2, 4]
    assert fused([[7, 5], [5, 7]]) == [5, 7], "the smaller id first among equals"
    assert fused([[1, 2], []]) == [1, 2]


def test_hybrid_finds_what_the_vector_hides(embedder):
    embedder.encode_query = lambda text: np.eye(64, dtype=np.float32)[0]
    embedder.encode_documents = lambda given: np.stack(
        [np.eye(64, dtype=np.float32)[1 if "XJ-900" in text else 0] for text in given]
    )
    with Retriever.open(None, embedder) as retriever:
        retriever.add("far", ["The part is called XJ-900."])
        retriever.add("near", [f"Something else, number {number}." for number in range(60)])
        assert retriever.search("what is XJ-900?", 3)[0].source == "near"
        hits = retriever.search("what is XJ-900?", 3, hybrid=True)
        assert "far" in {hit.source for hit in hits} and len(hits) == 3
        assert {hit.source: hit.score for hit in hits}["far"] == 0, "the score stays the vectors' inner product"
        assert "far" not in {hit.source for hit in retriever.search("XJ-900?", 9, hybrid=True, min_score=0.5)}
        assert len(retriever.search("XJ-900?", 9, hybrid=True, min_score=0.5)) == 9


def test_names():
    text = "The town is old. Two men, Ada Moor and Józef O'Neill, met in Belmar. Belmar has roofs. Moor Street ended."
    assert names([text], "Where is it?") == ["Ada Moor", "Józef O", "Neill", "Belmar", "Moor Street"]
    assert names([text], "who is moor in belmar?") == ["Józef O", "Neill"]
    assert names(["Nothing here.\nNor here: Nothing.", "“Some” say so. 3 Apples"], "x") == ["Apples"]
    assert names(["a " + " a ".join(f"N{number}" for number in range(99))], "x") == [
        f"N{number}" for number in range(16)
    ]


def test_a_second_hop_follows_the_names(retriever):
    question = "What language does the mayor of Belmar know?"
    assert "Ada" not in {hit.source for hit in retriever.search(question, 1, neighbours=2, hybrid=True)}
    hits = retriever.search("Belmar is described here.", 1, neighbours=2, hybrid=True, hops=2)
    assert [hit.source for hit in hits[:2]] == ["Belmar", "Ada"], "one for each hop, the first hop's first"
    assert len({hit.passage_id for hit in hits}) == len(hits)
    assert PERSON[1] in texts(hits), "neighbours of the second hop come along"
    alone = retriever.search("With friends she speaks Czech.", 1, hops=9)
    assert texts(alone) == [PERSON[1]], "names were found in neighbours only, or none: no hop"


def test_a_hop_finds_nothing_twice(retriever):
    hits = retriever.search("Belmar is described here.", 50, neighbours=1, hops=3, hybrid=True)
    assert sorted(hit.passage_id for hit in hits) == sorted(map(int, retriever.index.ids()))


def test_the_bundled_questions_need_two_hops():
    """What ``ragkv demo`` is set to, and what it was before."""
    from transformers import PreTrainedTokenizerFast

    from ragkv.evaluation.metrics import contains

    chunker = TokenChunker(PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True), 96)

    def retrieved(**options):
        count = 0
        for question in questions():
            hits = retriever.search(question.question, **options)
            found = " ".join(hit.text for hit in hits if hit.source in question.documents)
            count += not question.documents or all(contains(found, [part]) for part in question.answer.split(": "))
        return count

    with Retriever.open() as retriever:
        retriever.add_many([(name, chunker.split(text), None) for name, text in documents().items()])
        assert retrieved(top_k=3, neighbours=2, hybrid=True, hops=2) >= 29
        assert retrieved(top_k=5, neighbours=1) <= 23


def test_orders(retriever):
    question, options = "Belmar is governed by Ada Moor.", {"top_k": 4, "neighbours": 1, "hybrid": True}
    best_first = retriever.search(question, **options)
    places = [(hit.source, hit.position) for hit in best_first]
    assert places != sorted(places) and len({source for source, _ in places}) > 1
    assert retriever.search(question, **options, order="retrieved") == best_first
    assert retriever.search(question, **options, order="best-last") == best_first[::-1]
    by_document = retriever.search(question, **options, order="document")
    sources = list(dict.fromkeys(source for source, _ in places))
    assert [(hit.source, hit.position) for hit in by_document] == sorted(
        places, key=lambda place: (sources.index(place[0]), place[1])
    )


def test_min_score(retriever, embedder):
    query = "What language does the mayor of town 3 know?"
    every = retriever.search(query, 50)
    least = every[4].score
    assert retriever.search(query, 50, min_score=least) == [hit for hit in every if hit.score >= least]
    assert retriever.search(query, 50, min_score=2.0) == []
    assert retriever.search(query, 50, min_score=2, neighbours=3, hops=2, hybrid=True) == []
    followed = {"neighbours": 2, "hybrid": True, "hops": 2}
    one, two = retriever.search("Belmar is described here.", 1, **followed)[:2]
    assert one.source != two.source and one.score > two.score
    hits = retriever.search("Belmar is described here.", 1, min_score=(one.score + two.score) / 2, **followed)
    assert {hit.source for hit in hits} == {one.source}, "it holds in a second hop too"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 0}, RetrievalError, "top_k must be a whole number of at least 1, got 0"),
        ({"neighbours": True}, RetrievalError, "neighbours must be .* got True"),
        ({"hops": 0}, RetrievalError, "hops must be .* at least 1, got 0"),
        ({"hops": None}, RetrievalError, "hops must be"),
        ({"max_context_tokens": -3}, RetrievalError, "max_context_tokens must be"),
        ({"max_context_tokens": 100}, RetrievalError, r"needs a model that counts them: RAG\.retrieve"),
        ({"min_score": "0.3"}, ArgumentTypeError, "min_score must be a number, got '0.3'"),
        ({"min_score": float("nan")}, ArgumentTypeError, "min_score must be a number"),
        ({"hybrid": "yes"}, ArgumentTypeError, "hybrid must be True or False, got 'yes'"),
        ({"rerank": 3}, ArgumentTypeError, r"rerank must be .*predict\(\).* got 3"),
        ({"where": "kind=town"}, RetrievalError, "where must be a dict"),
        ({"order": "best"}, RetrievalError, "order must be one of document, retrieved, best-last, cache, got 'best'"),
        ({"order": ["retrieved"]}, ArgumentTypeError, r"order must be one of .*, got \['retrieved'\]"),
        ({"topk": 3}, UnknownArgumentError, "no option topk: it takes top_k, neighbours, "),
    ],
)
def test_bad_options(retriever, options, error, match):
    with pytest.raises(error, match=match):
        retriever.search("a question", **options)


def test_options_are_a_value():
    retrieval, others = Retrieval.split({"top_k": 3, "hybrid": True, "max_new_tokens": 5})
    assert retrieval == Retrieval(3, hybrid=True) and others == {"max_new_tokens": 5}
    assert (Retrieval().limit, Retrieval(2).limit) == (5, 2)
    assert Retrieval(max_context_tokens=1600).limit == 100 and Retrieval(max_context_tokens=10).limit == 5


def test_one_state_a_search_while_others_write(embedder):
    """Words, vectors and texts of a hit belong together, hop by hop, whatever is replaced meanwhile."""
    with Retriever.open(None, embedder) as retriever:
        stop, wrong = threading.Event(), []

        def version(number):
            return [f"Belmar has number {number} here.", f"It is led by Ada Moor, number {number} there."]

        def write():
            number = 0
            while not stop.is_set():
                number += 1
                retriever.add("Belmar", version(number))
                retriever.add("Ada", [f"Ada Moor speaks Czech {number}."])

        def read():
            for _ in range(40):
                hits = retriever.search("What is known of Belmar?", 2, neighbours=1, hybrid=True, hops=2)
                of = [hit.text for hit in hits if hit.source == "Belmar"]
                if len(of) != 2 or of[0].split("number ")[1].split()[0] != of[1].split("number ")[1].split()[0]:
                    wrong.append(of)

        retriever.add("Belmar", version(0))
        threads = [threading.Thread(target=write), *(threading.Thread(target=read) for _ in range(2))]
        for thread in threads:
            thread.start()
        for thread in threads[1:]:
            thread.join()
        stop.set()
        threads[0].join()
        assert not wrong


def test_two_retrievers_on_one_folder(tmp_path, embedder):
    with Retriever.open(tmp_path, embedder) as one, Retriever.open(tmp_path, HashEmbedder()) as two:
        one.add("a", ["the XJ-900 pump"])
        assert texts(two.search("xj-900", hybrid=True)) == ["the XJ-900 pump"]
        two.add("b", ["the XJ-900 valve"])
        two.remove("a")
        assert texts(one.search("xj-900", hybrid=True)) == ["the XJ-900 valve"]


@pytest.mark.parametrize("hybrid", [False, True])
def test_numbers_that_no_machine_counts_to(retriever, hybrid):
    def found(**options):
        return texts(retriever.search("Ada Moor", hybrid=hybrid, **options))

    assert found(top_k=10**30) == found(top_k=2**62) == found(top_k=99) and len(found(top_k=99)) == 15
    assert found(top_k=1, neighbours=10**30) == found(top_k=1, neighbours=9)
    assert found(min_score=10**400) == []
    assert Retrieval(max_context_tokens=10**30).limit < 2**62


@pytest.mark.parametrize(("budget", "fit"), [(9, [0, 1, 2]), (8, [0, 1]), (7, [0, 1]), (6, [0, 2]), (2, [2]), (1, [])])
def test_a_budget_is_filled_to_its_last_token_and_no_further(budget, fit):
    document = Document("a", "", (0, 1, 2))
    passages = [Passage(number, "", number, document) for number in range(3)]
    assert [passage.id for passage in within(budget, passages, lambda document: [3, 4, 2])] == fit


def test_half_a_surrogate_pair_is_no_question(retriever):
    for question in ("\ud800", "where is \udfff?"):
        with pytest.raises(RetrievalError, match="valid Unicode"):
            retriever.search(question)
