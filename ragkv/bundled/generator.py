"""Asks questions of generated documents; a `Case` is one question with its documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ragkv.bundled import language as lang
from ragkv.bundled.writer import HELDOUT_NAMES, TRAINING_NAMES, Context, Fact, Names, Shape, write_context

KINDS = ("direct", "local", "cross", "two-hop", "cross-document", "order", "absent")


@dataclass(frozen=True)
class Question:
    """A question with its answer; ``facts`` are what it rests on, in the order in which the answer needs them."""

    text: str
    answer: str
    kind: str
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Case:
    """One question over some documents.

    Attributes:
        chunks: The texts of the chunks, in document order.
        chunk_documents: For each chunk the number of its document.
        question: The question.
        answer: Its answer.
        kind: One of `KINDS`.
    """

    chunks: tuple[str, ...]
    chunk_documents: tuple[int, ...]
    question: str
    answer: str
    kind: str


def questions(
    rng: random.Random,
    context: Context,
    names: Names = TRAINING_NAMES,
    orders: int = 3,
    absents: int = 2,
    near: float = 0.0,
) -> list[Question]:
    """Every fact once, and as many questions of the other kinds as the context gives, in random order.

    Args:
        rng: What all choices are drawn from.
        context: What is asked about.
        names: Where the names come from that no document knows (kind *absent*).
        orders: How many pairs are drawn for *order*.
        absents: How many questions of *absent*.
        near: Share of the pairs for *order* that are mentioned one right after the other: the hardest.
    """
    found = _fact_questions(rng, context) + _two_hop(rng, context)
    found += _order(rng, context, orders, near) + _absent(rng, context, names, count=absents)
    rng.shuffle(found)
    return found


def _ask(rng: random.Random, relation: lang.Relation, name: str) -> str:
    return rng.choice(relation.questions).format(n=name)


def _fact_questions(rng: random.Random, context: Context) -> list[Question]:
    """Questions on facts whose relation is also stated of another subject with another value."""
    found = []
    for fact in context.facts:
        rivals = [f for f in context.facts if f.relation == fact.relation and f.value != fact.value]
        if rivals:
            found.append(Question(_ask(rng, fact.relation, fact.subject.name), fact.value, fact.kind, (fact,)))
    return found


def _two_hop(rng: random.Random, context: Context) -> list[Question]:
    """Questions on what is said of the entity that another document links to; the answer names that entity first."""
    found = []
    for link in (f for f in context.facts if f.relation.link):
        if sum(f.relation == link.relation for f in context.facts) < 2:
            continue
        ends = [f for f in context.facts if f.subject.name == link.value]
        ends = [f for f in ends if sum(g.relation == f.relation for g in context.facts) > 1]
        if ends:
            end = rng.choice(ends)
            text = _ask(rng, end.relation, link.relation.phrase.format(n=link.subject.name))
            found.append(Question(text, f"{link.value}: {end.value}", "two-hop", (link, end)))
    return found


def _order(rng: random.Random, context: Context, count: int, near: float) -> list[Question]:
    """Which of two subjects is mentioned first, wherever that mention stands."""
    text = "\n".join(context.chunks)
    if len(context.entities) < 2:
        return []
    mentioned = sorted((e.name for e in context.entities if e.name in text), key=text.find)
    found = []
    for _ in range(count):
        a, b = (entity.name for entity in rng.sample(context.entities, 2))
        if near and len(mentioned) > 1 and rng.random() < near:
            at = rng.randrange(len(mentioned) - 1)
            a, b = rng.sample(mentioned[at : at + 2], 2)
        if a in mentioned and b in mentioned:
            question = rng.choice(lang.ORDER_QUESTIONS).format(a=a, b=b)
            found.append(Question(question, min(a, b, key=mentioned.index), "order"))
    return found


def _absent(rng: random.Random, context: Context, names: Names, count: int) -> list[Question]:
    """Questions on what is said of others but not of this subject, or on somebody whom no document knows."""
    stated = {(f.subject.name, f.relation.name) for f in context.facts}
    found = []
    for _ in range(count):
        model = rng.choice(context.facts) if context.facts else None
        if model is None:
            break
        type_ = model.subject.type
        others = [e for e in context.entities if e.type == type_ and (e.name, model.relation.name) not in stated]
        taken = {e.name for e in context.entities} | {f.value for f in context.facts}
        subject = rng.choice(others) if others and rng.random() < 0.7 else names.draw(rng, type_, taken)
        found.append(Question(_ask(rng, model.relation, subject.name), lang.ABSENT, "absent"))
    return found


def possible_kinds(documents: int) -> tuple[str, ...]:
    """The kinds that can be asked over so many documents: *two-hop* needs two subjects of each of two types."""
    return tuple(kind for kind in KINDS if kind != "two-hop" or documents >= 4)


def cases(seed: int, n: int, documents: int = 6, heldout: bool = True) -> list[Case]:
    """Makes cases, each over documents of its own, the kinds in turn.

    Args:
        seed: The same seed gives the same cases.
        n: How many cases, at least 0; the kinds come in turn (two-hop from 4 documents on, where it can be).
        documents: Documents in a case, 2 to 12; of three sizes of chunk, about 40 to 150 tokens.
        heldout: Use only name parts that the model never saw in training; otherwise only parts that it saw.

    Raises:
        ValueError: If ``n`` or ``documents`` is out of range.
    """
    if n < 0 or not 2 <= documents <= 12:
        raise ValueError(f"n must be 0 or more and documents 2 to 12; got n={n}, documents={documents}.")
    kinds = possible_kinds(documents)
    return [_case(random.Random(f"{seed}/{i}"), kinds[i % len(kinds)], documents, heldout) for i in range(n)]


def _case(rng: random.Random, kind: str, documents: int, heldout: bool) -> Case:
    """Writes contexts until one has a question of the kind."""
    shape = Shape(documents=(documents, documents), notes=1.0 if kind == "cross-document" else 0.25)
    names = HELDOUT_NAMES if heldout else TRAINING_NAMES
    while True:
        context = write_context(rng, shape, names)
        fitting = [q for q in questions(rng, context, names) if q.kind == kind]
        if fitting:
            question = rng.choice(fitting)
            return Case(
                tuple(context.chunks), tuple(context.chunk_documents), question.text, question.answer, question.kind
            )
