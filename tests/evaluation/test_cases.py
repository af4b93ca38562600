"""Cases: orders of chunks."""

import pytest

from ragkv.evaluation import Case, EvaluationError

DOCUMENTS = (("a", "b", "c"), ("d",))


def case(**changes):
    fields = {
        "id": "1",
        "kind": "k",
        "question": "q?",
        "answers": ("x",),
        "documents": DOCUMENTS,
        "retrieved": ((0, 0), (0, 1), (0, 2), (1, 0)),
    }
    return Case(**{**fields, **changes})


def test_orders_are_shuffled_by_seed():
    first, again, other = (list(case().arranged(3, seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert [order for order, _ in first] == [0, 1, 2]
    assert first[0][1] == case()
    for _, arranged in first:
        assert sorted(arranged.retrieved) == sorted(case().retrieved)


def test_where_the_data_does_not_say_cases_of_the_same_documents_are_about_the_same():
    """In whatever order a retriever gave them."""
    other = case(documents=DOCUMENTS[::-1], retrieved=((0, 0), (1, 0)))
    assert case().about == other.about != case(documents=DOCUMENTS[:1], retrieved=((0, 0),)).about
    assert case(gold=((0, 1),)).about == case(documents=DOCUMENTS[::-1], retrieved=((1, 0),), gold=((1, 2),)).about


@pytest.mark.parametrize("fixed", [case(ordered=True), case(retrieved=((1, 0),))], ids=["ordered", "one chunk"])
def test_what_is_never_shuffled(fixed):
    assert list(fixed.arranged(3, 0)) == [(0, fixed)]


def test_whole_documents_of_what_was_retrieved():
    assert case(retrieved=((1, 0), (0, 2))).whole == ((1, 0), (0, 0), (0, 1), (0, 2))
    assert case(retrieved=((0, 1),)).whole == ((0, 0), (0, 1), (0, 2))


@pytest.mark.parametrize("place", [(0, 3), (2, 0), (-1, 0)])
def test_a_chunk_that_is_not_there(place):
    with pytest.raises(EvaluationError, match="case 1: there is no chunk"):
        case(gold=(place,))
