"""Writes documents about people, firms and towns, cut into chunks, and keeps what is stated in them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from training.world import language as lang
from training.world.names import TRAINING_NAMES, Entity, Names

TYPES = ("person", "firm", "town")


@dataclass(frozen=True)
class Shape:
    """How large a context is; every pair is an inclusive range.

    Attributes:
        documents: Documents about a subject of their own (notes on the previous document come on top).
        chunks: Chunks a document.
        words: Words a chunk (a word is about 1.3 tokens), before the last sentence is completed.
        facts: Facts a chunk.
        types: How many types of subject a context has.
        notes: Chance that a document is followed by a note that speaks of "the document above".
    """

    documents: tuple[int, int] = (6, 6)
    chunks: tuple[int, int] = (1, 3)
    words: tuple[int, int] = (34, 100)
    facts: tuple[int, int] = (1, 3)
    types: tuple[int, int] = (1, 3)
    notes: float = 0.25


@dataclass(frozen=True)
class Fact:
    """A stated value and where it stands.

    Attributes:
        subject: Whom it is about.
        relation: What is said.
        value: The text of the value.
        kind: "direct", "local", "cross" or "cross-document".
        chunk: The chunk it stands in.
        start: The first character of the value in that chunk.
    """

    subject: Entity
    relation: lang.Relation
    value: str
    kind: str
    chunk: int
    start: int


@dataclass
class Context:
    """Documents cut into chunks, with all that is stated in them."""

    chunks: list[str] = field(default_factory=list)
    chunk_documents: list[int] = field(default_factory=list)
    entities: list[Entity] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


class _Writer:
    """Writes one context; holds what must stay consistent while it is written."""

    def __init__(self, rng: random.Random, names: Names, shape: Shape):
        self.rng, self.names, self.shape = rng, names, shape
        self.context = Context()
        self.taken: set[str] = set()
        self.values: dict[str, list[str]] = {}

    def write(self) -> Context:
        rng, shape = self.rng, self.shape
        for type_ in self._types():
            self.context.entities.append(self.names.draw(rng, type_, self.taken))
        self.relations = {type_: self._popular(type_) for type_ in TYPES}
        document = 0
        for entity in self.context.entities:
            todo = self._facts(entity)
            note = bool(todo) and rng.random() < shape.notes
            held_back = [todo.pop() for _ in range(min(len(todo), rng.randint(1, 2)))] if note else []
            self._document(document, entity, todo, note=False)
            document += 1
            if note:
                self._document(document, entity, held_back, note=True)
                document += 1
        return self.context

    def _types(self) -> list[str]:
        """Types of the documents, each at least twice as long as there are two documents or more."""
        count = self.rng.randint(*self.shape.documents)
        kinds = self.rng.sample(TYPES, min(self.rng.randint(*self.shape.types), max(1, count // 2)))
        types = (kinds * 2 + [self.rng.choice(kinds) for _ in range(count)])[:count]
        self.rng.shuffle(types)
        return types

    def _popular(self, type_: str) -> list[lang.Relation]:
        """The relations that documents of a type use here: few, so that several subjects share each."""
        relations = lang.RELATIONS[type_]
        return self.rng.sample(relations, self.rng.randint(min(5, len(relations)), len(relations)))

    def _facts(self, entity: Entity) -> list[tuple[lang.Relation, str]]:
        chunks = self.rng.randint(*self.shape.chunks)
        self.chunk_count = chunks
        count = sum(self.rng.randint(*self.shape.facts) for _ in range(chunks))
        relations = self.relations[entity.type]
        return [(r, self._value(r, entity)) for r in self.rng.sample(relations, min(count, len(relations)))]

    def _value(self, relation: lang.Relation, subject: Entity) -> str:
        """A value that no other subject here has for this relation."""
        if relation.name not in self.values:
            self.values[relation.name] = self._candidates(relation)
        pool = self.values[relation.name]
        if pool and not (relation.link and pool[-1] == subject.name):
            return pool.pop()
        return (
            self.names.draw(self.rng, relation.link, self.taken).name
            if relation.link
            else self.rng.choice(relation.values)
        )

    def _candidates(self, relation: lang.Relation) -> list[str]:
        """Values in the order in which they are used up; a link prefers entities that have a document."""
        rng = self.rng
        if not relation.link:
            return rng.sample(relation.values, len(relation.values))
        here = [entity.name for entity in self.context.entities if entity.type == relation.link]
        return rng.sample(here, len(here))

    def _document(self, number: int, entity: Entity, facts: list[tuple[lang.Relation, str]], note: bool) -> None:
        count = 1 if note else self.chunk_count
        shares: list[list[tuple[lang.Relation, str]]] = [[] for _ in range(count)]
        for fact in facts:
            self.rng.choice(shares).append(fact)
        for index, share in enumerate(shares):
            self._chunk(number, entity, share, first=index == 0, note=note)

    def _chunk(
        self, document: int, entity: Entity, facts: list[tuple[lang.Relation, str]], first: bool, note: bool
    ) -> None:
        """Writes a chunk: an opening, then facts and fillers in any order.

        A first chunk names its subject before it says anything of it, a note never does, another chunk may.
        """
        pronouns = self.rng.choice(lang.PRONOUNS[entity.pronoun])
        plan = self._plan(facts)
        text, named = self._opening(entity, first and not note, note, empty=not facts)
        may_name = not note and (first or self.rng.random() < 0.4)
        for fact in plan:
            if fact is None:
                text = self._join(text, self._filler())
                continue
            direct = may_name and ((first and not named) or self.rng.random() < 0.5)
            kind = "direct" if direct else "cross-document" if note else "local" if named else "cross"
            sentence, start = self._sentence(fact, entity, pronouns, direct)
            named |= direct
            text = self._join(text, sentence)
            start += len(text) - len(sentence)
            self.context.facts.append(Fact(entity, *fact, kind, len(self.context.chunks), start))
        self.context.chunks.append(text)
        self.context.chunk_documents.append(document)

    def _plan(self, facts: list[tuple[lang.Relation, str]]) -> list[tuple[lang.Relation, str] | None]:
        """The facts with fillers (None) between them, until there are enough words."""
        target = self.rng.randint(*self.shape.words)
        plan: list[tuple[lang.Relation, str] | None] = list(facts)
        while sum(8 if fact else 9 for fact in plan) + 5 < target:
            plan.insert(self.rng.randint(0, len(plan)), None)
        return plan

    def _opening(self, entity: Entity, introduces: bool, note: bool, empty: bool) -> tuple[str, bool]:
        """The first sentence, or nothing, and whether it names the subject."""
        if note:
            return self.rng.choice(lang.CONTINUATIONS), False
        if introduces and (empty or self.rng.random() < 0.6):
            return self.rng.choice(lang.INTRODUCTIONS).format(n=entity.name), True
        return "", False

    def _join(self, text: str, sentence: str) -> str:
        """Appends a sentence, mostly on the same line."""
        return f"{text}{' ' if self.rng.random() < 0.95 else chr(10)}{sentence}" if text else sentence

    def _filler(self) -> str:
        slots = lang.FILLER_SLOTS
        words = self.rng.choice(lang.FILLERS).split(" ")
        return " ".join(
            word.format(**{slot: self.rng.choice(options) for slot, options in slots.items()}) if "{" in word else word
            for word in words
        )

    def _sentence(
        self, fact: tuple[lang.Relation, str], entity: Entity, pronouns: tuple[str, str, str], direct: bool
    ) -> tuple[str, int]:
        """The sentence of a fact and the place of its value in it."""
        name = entity.name
        subject = (name, name, f"{name}'s") if direct else pronouns
        before, after = self.rng.choice(fact[0].sentences).split("{v}")
        before = before.format(S=subject[0], s=subject[1], P=subject[2])
        return before + fact[1] + after, len(before)


def write_context(rng: random.Random, shape: Shape, names: Names = TRAINING_NAMES) -> Context:
    """Writes documents.

    Args:
        rng: What all choices are drawn from.
        shape: How large the context is.
        names: Where names come from.
    """
    return _Writer(rng, names, shape).write()
