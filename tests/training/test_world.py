"""Invariants of the bundled model's world: documents, questions, cases."""

import itertools
import random
import re

import pytest

from ragkv.bundled import CASES_PATH, TEMPLATE, documents, load
from ragkv.evaluation import read_cases
from training import cases as writing
from training import documents as fixed
from training.cases import generated_cases
from training.world import language
from training.world.generator import KINDS, questions
from training.world.names import HELDOUT_NAMES, MIXED_NAMES, TRAINING_NAMES
from training.world.writer import Shape, write_context


@pytest.fixture(scope="module")
def contexts():
    rng = random.Random(3)
    made = [write_context(rng, Shape(documents=(2, 12))) for _ in range(150)]
    return [(context, questions(rng, context)) for context in made]


@pytest.fixture(scope="module")
def tokenizer():
    return load()[1]


def texts(case):
    return [text for parts in case.documents for text in parts]


def test_the_cases_that_ship_are_the_generated_ones(tmp_path, monkeypatch):
    form, shipped = read_cases(CASES_PATH)
    assert (form, shipped) == ("ragkv", generated_cases(0, 480))
    monkeypatch.setattr("sys.argv", ["cases", "--out", str(tmp_path / "cases.jsonl.bz2")])
    writing.main()
    assert (tmp_path / "cases.jsonl.bz2").read_bytes() == CASES_PATH.read_bytes()


def test_cases_of_another_seed_are_read_back(tmp_path, monkeypatch):
    file = tmp_path / "cases-3.jsonl"
    monkeypatch.setattr("sys.argv", ["cases", "--seed", "3", "--n", "12", "--documents", "3", "--out", str(file)])
    writing.main()
    assert read_cases(file) == ("ragkv", generated_cases(3, 12, 3))
    assert generated_cases(3, 20, 3)[:12] == generated_cases(3, 12, 3) != generated_cases(2, 12, 3)


def test_the_documents_that_ship_are_the_generated_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["documents", "--out", str(tmp_path)])
    fixed.main()
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "documents").iterdir()} == documents()
    for name in ("questions.json", "foreign.txt"):
        assert (tmp_path / name).read_bytes() == (CASES_PATH.parent / name).read_bytes()


def test_kinds_in_turn():
    assert tuple(case.kind for case in generated_cases(4, 9)) == (*KINDS, "unnamed", KINDS[0])


@pytest.mark.parametrize("count", [2, 6, 12])
def test_case_has_its_documents(count):
    for case in generated_cases(5, 8, documents=count):
        assert count <= len(case.documents) <= 2 * count, "notes come on top of the documents"


@pytest.mark.parametrize("count", [1, 13])
def test_out_of_range_is_refused(count):
    with pytest.raises(ValueError, match="documents must be 2 to 12"):
        generated_cases(0, 1, documents=count)


def test_gold_chunks_hold_the_answer():
    for case in generated_cases(4, 64):
        if case.kind not in ("order", "absent"):
            assert any(case.answers[0].split(": ")[-1] in case.text(place) for place in case.gold)
        rests_on_note = any(case.text(place).startswith(language.CONTINUATIONS) for place in case.gold)
        assert case.ordered == (case.kind == "order" or rests_on_note)


def test_unnamed_cases_lack_the_naming_chunks():
    unnamed = [made for made in generated_cases(5, 32) if made.kind == "unnamed"]
    assert len(unnamed) == 4
    for made in unnamed:
        missing = set(made.whole) - set(made.retrieved)
        assert missing and set(made.gold) <= set(made.retrieved)
        names = set.intersection(*(set(made.text(place).replace(".", " ").split()) for place in missing))
        assert any(name in made.question for name in names)


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
    for case in generated_cases(6, 16):
        assert not set(re.findall(r"\w+", " ".join(texts(case)))) & trained


def test_chunk_lengths(tokenizer):
    lengths = [
        len(tokenizer(chunk + TEMPLATE["after_chunk"], add_special_tokens=False).input_ids)
        for case in generated_cases(7, 60)
        for chunk in texts(case)
    ]
    assert min(lengths) >= 25
    assert max(lengths) <= 150
    assert sum(40 <= n <= 150 for n in lengths) / len(lengths) > 0.9
