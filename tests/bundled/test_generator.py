"""Invariants of the bundled documents and questions."""

import itertools
import random
import re

import pytest

from ragkv.bundled import KINDS, TEMPLATE, cases, language, load
from ragkv.bundled.generator import questions
from ragkv.bundled.writer import HELDOUT_NAMES, MIXED_NAMES, TRAINING_NAMES, Shape, write_context


@pytest.fixture(scope="module")
def contexts():
    rng = random.Random(3)
    made = [write_context(rng, Shape(documents=(2, 12))) for _ in range(150)]
    return [(context, questions(rng, context)) for context in made]


@pytest.fixture(scope="module")
def tokenizer():
    return load()[1]


def test_same_seed_same_cases_and_other_seed_others():
    assert cases(1, 14) == cases(1, 14)
    assert cases(1, 14) != cases(2, 14)
    assert cases(1, 20)[:14] == cases(1, 14), "a longer list begins like a shorter one"


def test_kinds_in_turn():
    assert tuple(case.kind for case in cases(4, 7)) == KINDS


@pytest.mark.parametrize("documents", [2, 6, 12])
def test_case_has_its_documents(documents):
    for case in cases(5, 7, documents=documents):
        numbers = list(case.chunk_documents)
        assert len(case.chunks) == len(numbers)
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(numbers[-1] + 1))
        assert documents <= numbers[-1] + 1 <= 2 * documents, "notes come on top of the documents"


@pytest.mark.parametrize(("n", "documents"), [(-1, 6), (1, 1), (1, 13)])
def test_out_of_range_is_refused(n, documents):
    with pytest.raises(ValueError, match="documents 2 to 12"):
        cases(0, n, documents=documents)


def test_answers_stand_in_the_documents(contexts):
    for context, asked in contexts:
        for question in asked:
            text = "\n".join(context.chunks)
            if question.kind == "absent":
                assert question.answer == language.ABSENT
            elif question.kind != "order":
                assert all(fact.value in text for fact in question.facts)
            else:
                assert question.answer in text
            for fact in question.facts:
                assert context.chunks[fact.chunk][fact.start :].startswith(fact.value)


def test_relation_alone_does_not_give_the_answer(contexts):
    for context, asked in contexts:
        for fact in (question.facts[-1] for question in asked if question.facts):
            rivals = {f.value for f in context.facts if f.relation == fact.relation and f.subject != fact.subject}
            assert rivals - {fact.value}


def test_kinds_are_what_they_say(contexts):
    """The name stands in the sentence, earlier in the chunk, in an earlier chunk, or in another document."""
    for context, _ in contexts:
        for fact in context.facts:
            before = context.chunks[fact.chunk][: fact.start]
            sentence = re.split(r"\. |\.\n", before)[-1]
            document = context.chunk_documents[fact.chunk]
            earlier = "\n".join(
                chunk
                for chunk, number in zip(context.chunks[: fact.chunk], context.chunk_documents, strict=False)
                if number == document
            )
            name = fact.subject.name
            assert (name in sentence) == (fact.kind == "direct")
            assert (name in before) == (fact.kind in ("direct", "local"))
            if fact.kind == "cross":
                assert name in earlier
            if fact.kind == "cross-document":
                own = [c for c, n in zip(context.chunks, context.chunk_documents, strict=True) if n == document]
                assert name not in "\n".join(own)
                assert name in "\n".join(context.chunks[: fact.chunk])


def test_order_asks_for_the_earlier_of_two(contexts):
    for context, asked in contexts:
        text = "\n".join(context.chunks)
        for question in (q for q in asked if q.kind == "order"):
            names = [e.name for e in context.entities if e.name in question.text]
            assert question.answer == min(names, key=text.find)


def test_near_pairs_are_mentioned_one_after_the_other(contexts):
    for context, _ in contexts[:30]:
        text = "\n".join(context.chunks)
        mentioned = sorted((e.name for e in context.entities), key=text.find)
        pairs = set(itertools.pairwise(mentioned))
        for question in questions(random.Random(0), context, orders=6, near=1.0):
            if question.kind == "order":
                names = sorted((n for n in mentioned if n in question.text), key=text.find)
                assert tuple(names) in pairs and question.answer == names[0]


def test_absent_is_absent(contexts):
    for context, asked in contexts:
        stated = {(f.relation.name, f.subject.name) for f in context.facts}
        for question in (q for q in asked if q.kind == "absent"):
            for relation, name in stated:
                for form in (
                    q for rs in language.RELATIONS.values() for r in rs if r.name == relation for q in r.questions
                ):
                    assert question.text != form.format(n=name)


def test_heldout_names_share_no_part_with_training():
    for group in ("first", "last", "firm", "town"):
        trained, held_out = set(getattr(TRAINING_NAMES, group)), set(getattr(HELDOUT_NAMES, group))
        assert held_out and not trained & held_out
        mixed = set(getattr(MIXED_NAMES, group))
        assert trained < mixed and not mixed & held_out
        share = len(held_out) / len(trained | held_out)
        assert 0.12 < share < 0.28


def test_heldout_cases_use_heldout_parts_only(contexts):
    held_out = {p for g in ("first", "last", "firm", "town") for p in getattr(HELDOUT_NAMES, g)}
    words = set(re.findall(r"\w+", " ".join(c for context, _ in contexts for c in context.chunks)))
    assert not words & held_out
    trained = {p for g in ("first", "last", "firm", "town") for p in getattr(TRAINING_NAMES, g)}
    for case in cases(6, 14):
        assert not set(re.findall(r"\w+", " ".join(case.chunks))) & trained


def test_chunk_lengths(tokenizer):
    lengths = [
        len(tokenizer(chunk + TEMPLATE["after_chunk"], add_special_tokens=False).input_ids)
        for case in cases(7, 60)
        for chunk in case.chunks
    ]
    assert min(lengths) >= 25
    assert max(lengths) <= 150
    assert sum(40 <= n <= 150 for n in lengths) / len(lengths) > 0.9
