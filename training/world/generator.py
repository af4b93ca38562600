"""Asks questions of generated documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.world import language as lang
from training.world.names import TRAINING_NAMES, Names
from training.world.writer import Context, Fact

KINDS = ("direct", "local", "cross", "two-hop", "cross-document", "order", "absent")


@dataclass(frozen=True)
class Question:
    """A question with its answer; ``facts`` are what it rests on, in the order in which the answer needs them."""

    text: str
    answer: str
    kind: str
    facts: tuple[Fact, ...] = ()


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
