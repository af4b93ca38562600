"""The bundled model's generated cases, with the chunks that each answer rests on."""

from __future__ import annotations

import random
from dataclasses import replace

from ragkv.bundled.generator import Question, possible_kinds, questions
from ragkv.bundled.writer import HELDOUT_NAMES, Context, Shape, write_context
from ragkv.evaluation.cases import Case, everything

UNNAMED = "unnamed"
"""A *cross* question for which the chunks that name its subject were not retrieved."""


def generated_cases(seed: int, n: int, documents: int = 6) -> list[Case]:
    """Cases over fresh documents with held-out names, as :func:`ragkv.bundled.cases` makes them, the kinds in turn.

    Args:
        seed: the same seed gives the same cases; more cases begin with the fewer.
        n: how many.
        documents: in a case, 2 to 12.
    """
    kinds = (*possible_kinds(documents), UNNAMED)
    return [_case(f"{seed}/{number}", kinds[number % len(kinds)], documents) for number in range(n)]


def _case(name: str, kind: str, documents: int) -> Case:
    rng, asked = random.Random(name), "cross" if kind == UNNAMED else kind
    shape = Shape(documents=(documents, documents), notes=1.0 if kind == "cross-document" else 0.25)
    while True:
        context = write_context(rng, shape, HELDOUT_NAMES)
        fitting = [question for question in questions(rng, context, HELDOUT_NAMES) if question.kind == asked]
        if kind == UNNAMED:  # the chunk of the fact must not name its subject further on
            fitting = [q for q in fitting if q.facts[0].subject.name not in context.chunks[q.facts[0].chunk]]
        if fitting:
            case = _as_case(f"{kind}-{name}", kind, context, rng.choice(fitting))
            return _without_names(case, context) if kind == UNNAMED else case


def _as_case(name: str, kind: str, context: Context, question: Question) -> Case:
    documents: list[list[str]] = [[] for _ in range(max(context.chunk_documents) + 1)]
    places = []
    for text, document in zip(context.chunks, context.chunk_documents, strict=True):
        places.append((document, len(documents[document])))
        documents[document].append(text)
    found = tuple(tuple(parts) for parts in documents)
    gold = tuple(sorted({places[fact.chunk] for fact in question.facts}))
    # "The document above" and "mentioned first" mean something else once the chunks are shuffled.
    ordered = kind == "order" or any(fact.kind == "cross-document" for fact in question.facts)
    return Case(name, kind, question.text, (question.answer,), found, everything(found), gold, ordered)


def _without_names(case: Case, context: Context) -> Case:
    name = next(entity.name for entity in context.entities if entity.name in case.question)
    return replace(case, retrieved=tuple(place for place in case.retrieved if name not in case.text(place)))
