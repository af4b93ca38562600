"""Haystack's retriever over a folder: filters and options."""

import pytest
from haystack.errors import FilterError

from ragkv import ArgumentError, ArgumentTypeError, RetrievalError
from ragkv.adapters.haystack import RagKVRetriever
from tests.rag.rags import QUESTION, open_rag


def test_filters_and_top_k(model):
    with open_rag(model=model) as rag:
        texts = [
            *(f"Clearport lies on the river Exe. Number {n}." for n in range(12)),
            "Something else.",
            "Another thing.",
        ]
        extras = [{"wanted": 0}] * 12 + [{"wanted": 1}, {"wanted": 2}]
        rag.add_texts(texts, [str(n) for n in range(14)], extras)
        one = {"field": "meta.wanted", "operator": ">=", "value": 1}
        retriever = RagKVRetriever(rag, top_k=2, filters=one)

        def found(**more):
            return {document.meta["wanted"] for document in retriever.run(QUESTION, **more)["documents"]}

        assert found() == {1, 2}
        assert found(filters={"field": "meta.wanted", "operator": "==", "value": 2}) == {2}
        assert found(filters={"field": "meta.source", "operator": "in", "value": ["12"]}) == {1}
        assert found(filters={}) == {0}
        assert len(retriever.run(QUESTION, {}, 5)["documents"]) == 5
        with pytest.raises(FilterError):
            found(filters={"operator": "AND"})
        with pytest.raises(RetrievalError, match="at least 1, got 0"):
            found(top_k=0)


def test_filters_do_not_look_at_passages(model):
    """What documents show of a passage is not asked of its document, which has it nowhere."""
    with open_rag(model=model) as rag:
        rag.add_texts(
            ["# Harbours\n\nClearport lies on the Exe.", "Tar."], ["a.md", "b.md"], [{}, {"heading": "Goods"}]
        )
        retriever = RagKVRetriever(rag)
        assert {document.meta["heading"] for document in retriever.run(QUESTION)["documents"]} == {"Harbours", "Goods"}
        for name in ("meta.heading", "heading"):
            one = {"field": name, "operator": "==", "value": "Goods"}
            with pytest.raises(ArgumentError, match=r"heading is a passage's, as in a\.md"):
                retriever.run(QUESTION, {"operator": "OR", "conditions": [one]})
        of_a = {"field": "meta.source", "operator": "==", "value": "a.md"}
        for heading, count in (("Harbours", 1), ("Goods", 0)):
            found = retriever.run(QUESTION, of_a, retrieval={"where": {"heading": heading}})
            assert len(found["documents"]) == count
        rag.remove("a.md")
        (found,) = retriever.run(QUESTION, one)["documents"]
        assert found.meta["source"] == "b.md"


@pytest.mark.parametrize("wrong", ["x", 5])
def test_filters_and_options_of_another_type(rag, wrong):
    for found in (
        lambda: RagKVRetriever(rag, filters=wrong).run(QUESTION),
        lambda: RagKVRetriever(rag).run(QUESTION, filters=wrong),
        lambda: RagKVRetriever(rag).run(QUESTION, retrieval=wrong),
    ):
        with pytest.raises(ArgumentTypeError, match="must be a dict"):
            found()
