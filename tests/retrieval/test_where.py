import pytest

from ragkv.errors import RetrievalError
from ragkv.retrieval import Document, Retriever
from ragkv.retrieval.where import condition

MANUAL = {"kind": "manual", "year": 2021, "tags": ["pump", "valve"], "draft": False, "title": None}


def fits(where, metadata=MANUAL, source="a.md"):
    return condition(where)(Document(source, "", (), metadata))


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"kind": "manual"},
        {"kind": "manual", "year": 2021},
        {"kind": ["faq", "manual"]},
        {"kind": {"$in": ("faq", "manual")}},
        {"year": {"$gte": 2021, "$lt": 2022}},
        {"year": {"$gt": 2020.5, "$lte": 2021.0}},
        {"kind": {"$gt": "faq"}},
        {"tags": "pump"},
        {"tags": ["boat", "valve"]},
        {"draft": False},
        {"title": None},
        {"kind": {"$ne": "faq"}},
        {"missing": {"$ne": 3}},
        {"source": "a.md"},
        {"source": ["a.md", "b.md"]},
        {"$or": [{"kind": "faq"}, {"year": 2021}]},
        {"$and": [{"kind": "manual"}, {"year": {"$gt": 2000}}]},
        {"$not": {"kind": "faq"}},
        {"$not": {"missing": 3}, "kind": "manual"},
        lambda document: document.metadata["year"] == 2021,
    ],
    ids=lambda where: "function" if callable(where) else str(where),
)
def test_what_fits(where):
    assert fits(where)


@pytest.mark.parametrize(
    "where",
    [
        {"kind": "faq"},
        {"kind": "manual", "year": 2020},
        {"kind": []},
        {"year": {"$gte": 2021, "$lt": 2021}},
        {"year": "2021"},
        {"year": {"$gt": "2000"}},
        {"draft": {"$gte": 0}},
        {"draft": 0},
        {"year": True},
        {"tags": {"$ne": "pump"}},
        {"missing": 3},
        {"missing": None},
        {"missing": {"$lt": 3}},
        {"source": "b.md"},
        {"$or": []},
        {"$or": [{"kind": "faq"}, {"year": 1}]},
        {"$and": [{"kind": "manual"}, {"year": 1}]},
        {"$not": {"kind": "manual"}},
        lambda document: document.source == "b.md",
    ],
    ids=lambda where: "function" if callable(where) else str(where),
)
def test_what_does_not(where):
    assert not fits(where)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("kind=manual", "where must be a dict"),
        ([{"kind": 3}], "where must be a dict"),
        ({3: 4}, "where must be a dict"),
        ({"$nor": []}, r"'\$nor' is none of \$and, \$or, \$not"),
        ({"$or": {"kind": 3}}, r"\$or takes a list of dicts"),
        ({"$not": [3]}, "where must be a dict"),
        ({"$and": ["x"]}, "where must be a dict"),
        ({"year": {"$near": 3}}, r"'year' takes a value, a list or a dict of \$eq"),
        ({"year": {}}, "'year' takes a value"),
        ({"year": {"$gt": None}}, r"\$gt of 'year' takes a number or a text"),
        ({"year": {"$in": "2021"}}, r"\$in of 'year' takes a list"),
        ({"year": {"$eq": [1]}}, r"\$eq of 'year' takes"),
    ],
)
def test_bad_conditions(where, match):
    with pytest.raises(RetrievalError, match=match):
        condition(where)


@pytest.mark.parametrize("hybrid", [False, True])
def test_what_orders_candidates_sees_only_what_fits(embedder, hybrid):
    seen = []
    with Retriever.open(None, embedder) as retriever:
        for number in range(99):
            retriever.add(f"{number}.md", [f"a boat in the harbour, number {number}"], {"number": number})
        rerank = lambda question, texts: seen.extend(texts) or [1.0] * len(texts)  # noqa: E731
        found = retriever.search("a boat", 5, where={"number": {"$lt": 3}}, rerank=rerank, hybrid=hybrid)
    assert {hit.source for hit in found} == {"0.md", "1.md", "2.md"} and len(seen) == 3


@pytest.mark.parametrize("hybrid", [False, True])
def test_only_what_fits_is_found_however_far_it_is(embedder, hybrid):
    with Retriever.open(None, embedder) as retriever:
        for number in range(99):
            retriever.add(f"{number}.md", [f"a boat in the harbour, number {number}"], {"number": number})
        retriever.add("far.md", ["something else altogether", "and more of it, with a boat"], {"number": 100})
        found = retriever.search("a boat in the harbour", 2, where={"number": {"$gte": 100}}, hybrid=hybrid)
        assert sorted(hit.position for hit in found) == [0, 1] and {hit.source for hit in found} == {"far.md"}
        assert retriever.search("a boat", 5, where={"number": 1000}, hybrid=hybrid, hops=2) == []
        found = retriever.search(
            "a boat",
            5,
            where=lambda document: int(document.source[:-3]) < 3 if document.source[0].isdigit() else False,
            hybrid=hybrid,
        )
        assert {hit.source for hit in found} == {"0.md", "1.md", "2.md"}
        retriever.add("far.md", ["something else altogether", "and more of it, with a boat"], {"number": 1})
        assert retriever.search("a boat", 5, where={"number": 100}, hybrid=hybrid) == [], "metadata as they are now"


@pytest.mark.parametrize(
    "join", [lambda inner: {"$not": inner}, lambda inner: {"$and": [inner, inner]}], ids=["not", "and"]
)
def test_how_deep_it_may_be(join):
    where = {"kind": "manual"}
    for _ in range(2):
        where = join(where)
    assert fits(where)
    for _ in range(5000):
        where = {"$not": where}
    cycle = {}
    cycle["$not"] = cycle
    for deep in (where, cycle):
        with pytest.raises(RetrievalError, match="32 deep"):
            condition(deep)


PARTS = ["Pumps lift water.", "Pumps need oil.", "Valves stop water."]


@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ({"page": 2}, [1, 2]),
        ({"page": {"$lt": 2}}, [0]),
        ({"heading": "Valves"}, [2]),
        ({"page": 2, "kind": "manual", "heading": {"$ne": "Valves"}}, [1]),
        ({"$or": [{"page": 1}, {"$and": [{"heading": "Valves"}]}]}, [0, 2]),
        ({"$not": {"page": 1}}, [1, 2]),
        ({"kind": "manual"}, [0, 1, 2]),
        ({"kind": "manual", "page": 3}, []),
    ],
    ids=str,
)
def test_passages_are_found_by_their_page_and_heading(embedder, where, positions):
    with Retriever.open(None, embedder) as retriever:
        stands = {"pages": [1, 2, 2], "headings": ["Pumps", "Pumps", "Valves"]}
        retriever.add("a.pdf", PARTS, {"kind": "manual"}, **stands)
        retriever.add("b.pdf", [f"{part} Boats!" for part in PARTS], {"kind": "faq"}, **stands)
        mine = {"$and": [{"source": "a.pdf"}, where]}
        assert [hit.position for hit in retriever.search("water", 9, where=mine, order="document")] == positions


def test_metadata_come_before_a_passages_page(embedder):
    with Retriever.open(None, embedder) as retriever:
        retriever.add("a.pdf", PARTS, {"page": "xii"}, pages=[1, 2, 2])
        retriever.add("b.md", ["Boats float."])
        assert retriever.search("water", 9, where={"page": 1}) == []
        assert len(retriever.search("water", 9, where={"page": "xii"})) == 3
        assert {hit.source for hit in retriever.search("water", 9, where={"page": {"$ne": "xii"}})} == {"b.md"}
