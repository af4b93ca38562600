"""Cases: orders of chunks, and the generated ones."""

import pytest

from ragkv import bundled
from ragkv.bundled.language import CONTINUATIONS
from ragkv.evaluation import Case, EvaluationError, generated_cases

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


def test_generated_cases_are_the_bundled_ones():
    """Kinds come in turn in both; ours have one kind more, so only the first seven are the same."""
    ours, theirs = generated_cases(3, 8), bundled.cases(3, 7)
    assert generated_cases(3, 16)[:8] == ours
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.kind, mine.question, mine.answers) == (other.kind, other.question, (other.answer,))
        assert tuple(text for parts in mine.documents for text in parts) == other.chunks


def test_generated_cases_know_their_gold_chunks():
    for made in generated_cases(4, 64):
        if made.kind not in ("order", "absent"):
            assert any(made.answers[0].split(": ")[-1] in made.text(place) for place in made.gold)
        rests_on_note = any(made.text(place).startswith(CONTINUATIONS) for place in made.gold)
        assert made.ordered == (made.kind == "order" or rests_on_note)


def test_unnamed_cases_lack_the_naming_chunks():
    unnamed = [made for made in generated_cases(5, 32) if made.kind == "unnamed"]
    assert len(unnamed) == 4
    for made in unnamed:
        missing = set(made.whole) - set(made.retrieved)
        assert missing and set(made.gold) <= set(made.retrieved)
        names = set.intersection(*(set(made.text(place).replace(".", " ").split()) for place in missing))
        assert any(name in made.question for name in names)
