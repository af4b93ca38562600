"""Writes cases of the bundled model's world for `ragkv eval --data`: `python -m training.cases`. The same ones every time.

Without arguments the cases that ship, those of seed 0; those of another seed with ``--seed 3 --out cases-3.jsonl``.
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ragkv.bundled import CASES_PATH
from ragkv.evaluation.cases import Case, everything
from training.world.generator import Question, possible_kinds, questions
from training.world.names import HELDOUT_NAMES
from training.world.writer import Context, Shape, write_context

SHIPPED = 480
UNNAMED = "unnamed"
"""A *cross* question for which the chunks that name its subject were not retrieved."""


def generated_cases(seed: int, n: int, documents: int = 6) -> list[Case]:
    """Cases over fresh documents with held-out names, the kinds in turn (two-hop from 4 documents on).

    Args:
        seed: The same seed gives the same cases; more cases begin with the fewer.
        n: How many.
        documents: In a case, 2 to 12; notes come on top. Three sizes of chunk, about 40 to 150 tokens.

    Raises:
        ValueError: If ``documents`` is out of range.
    """
    if not 2 <= documents <= 12:
        raise ValueError(f"documents must be 2 to 12; got {documents}.")
    kinds = (*possible_kinds(documents), UNNAMED)
    return [_case(f"{seed}/{number}", kinds[number % len(kinds)], documents) for number in range(n)]


def _case(name: str, kind: str, documents: int) -> Case:
    """Writes contexts until one has a question of the kind."""
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


def write_cases(cases: Iterable[Case], file: Path) -> None:
    """Writes JSON lines of ragkv's own form, packed where the file's name ends in ``.bz2``."""
    lines = "".join(json.dumps(_written(case), ensure_ascii=False) + "\n" for case in cases).encode()
    file.write_bytes(bz2.compress(lines) if file.suffix == ".bz2" else lines)


def _written(case: Case) -> dict[str, Any]:
    """The fields of a line; not the language, which is the one that is taken where none is named."""
    unwritten = ("language", "classes", "behind", "subject")
    return {name: value for name, value in asdict(case).items() if name not in unwritten}


def main() -> None:
    """Reads the arguments and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=SHIPPED)
    parser.add_argument("--documents", type=int, default=6, help="in a case, 2 to 12")
    parser.add_argument("--out", type=Path, default=CASES_PATH)
    args = parser.parse_args()
    write_cases(generated_cases(args.seed, args.n, args.documents), args.out)
    print(f"wrote {args.n} cases to {args.out}")


if __name__ == "__main__":
    main()
