"""Cases: questions with their documents, what was retrieved of them, and the right answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest

from ragkv.chunk import digest
from ragkv.evaluation.errors import EvaluationError
from ragkv.evaluation.metrics import LANGUAGES

#: A chunk of a case: number of its document, number of the chunk in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        id: unique in its data.
        kind: questions of one kind are counted together.
        question: as it is asked.
        answers: every answer that counts as right, the usual one first.
        documents: each one the texts of its chunks, in order.
        retrieved: the chunks that the prompt holds, in the order of the prompt.
        gold: the chunks that the answer rests on, in document order; empty where the data does not say.
        ordered: the answer hangs on the order of the chunks, so that they are never shuffled.
        language: of the answers, one of :data:`ragkv.evaluation.metrics.LANGUAGES`.
        classes: of which the answer is one, where the data is for classifying.
        behind: passages that each document is read behind for the arms ``@neighbours`` (:mod:`ragkv.evaluation.neighbours`).
        subject: what it was :attr:`about` when it had all of its documents, where some were left out.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[tuple[str, ...], ...]
    retrieved: tuple[Place, ...]
    gold: tuple[Place, ...] = ()
    ordered: bool = False
    language: str = "en"
    # No part of what is asked, nor of the fingerprint.
    classes: tuple[str, ...] = field(default=(), repr=False)
    behind: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    subject: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise EvaluationError(
                f"case {self.id}: language must be one of {', '.join(LANGUAGES)}, got {self.language!r}"
            )
        for document, chunk in (*self.retrieved, *self.gold):
            if not (0 <= document < len(self.documents) and 0 <= chunk < len(self.documents[document])):
                raise EvaluationError(
                    f"case {self.id}: there is no chunk {chunk} of document {document} among its {len(self.documents)} documents"
                )

    @property
    def whole(self) -> tuple[Place, ...]:
        """All chunks of the documents that something was retrieved of: documents in prompt order, chunks in document order."""
        documents = dict.fromkeys(document for document, _ in self.retrieved)
        return tuple((document, chunk) for document in documents for chunk in range(len(self.documents[document])))

    @property
    def about(self) -> str:
        """Equal where cases are answered from the same document, the first of several; where the data does not say, from all, in
        whatever order.
        """
        return self.subject or _name(self.documents[self.gold[0][0]] if self.gold else tuple(sorted(self.documents)))

    @property
    def fingerprint(self) -> str:
        """Equal for equal cases."""
        return _name(self)

    def text(self, place: Place) -> str:
        """A chunk's text."""
        return self.documents[place[0]][place[1]]

    def arranged(self, orders: int, seed: int) -> Iterator[tuple[int, Case]]:
        """The case in several orders of its chunks.

        Args:
            orders: at most so many: 0 is the order as it is, the others are shuffled.
            seed: of the shuffling.

        Yields:
            The number of the order and the case in it. Only the first where the order matters or there is nothing to shuffle.
        """
        yield 0, self
        if self.ordered or len(self.retrieved) < 2:
            return
        for order in range(1, orders):
            retrieved = list(self.retrieved)
            random.Random(f"{seed}/{self.id}/{order}").shuffle(retrieved)
            yield order, replace(self, retrieved=tuple(retrieved))


def _name(of: object) -> str:
    """Equal for what is written alike."""
    return digest(repr(of)).hex()[:16]


def narrowed(case: Case, places: Sequence[Place]) -> Case:
    """The case with these chunks retrieved, in their order, and without the documents that none of them is of."""
    kept = {document: number for number, document in enumerate(dict.fromkeys(document for document, _ in places))}
    return replace(
        case,
        documents=tuple(case.documents[document] for document in kept),
        retrieved=tuple((kept[document], chunk) for document, chunk in places),
        gold=tuple((kept[document], chunk) for document, chunk in case.gold if document in kept),
        subject=case.about,
    )


def everything(documents: Iterable[Iterable[str]]) -> tuple[Place, ...]:
    """All chunks of all documents, in order."""
    return tuple((number, chunk) for number, parts in enumerate(documents) for chunk, _ in enumerate(parts))


def spread(cases: Iterable[Case]) -> list[Case]:
    """Order cases so that the first few, however many, stand for all: files list one document's or one kind's after another's.

    Cases that are answered from the same document come in turns with those of others, and within it those of the same chunk, one
    document beginning with its first chunk, the next with its second. Among the first few every kind has the share that it has
    among all.

    Returns:
        All cases. Where no two share a document, those of one kind are in the same order.
    """
    documents: dict[str, dict[tuple[Place, ...], list[Case]]] = {}
    for case in cases:
        documents.setdefault(case.about, {}).setdefault(case.gold[:1], []).append(case)
    turns = _turns(_turns(_from(number, [*chunks.values()])) for number, chunks in enumerate(documents.values()))
    of_kind, before = Counter(case.kind for case in turns), Counter[str]()
    shares = []
    for case in turns:
        shares.append((before[case.kind] + 0.5) / of_kind[case.kind])
        before[case.kind] += 1
    return [turns[number] for number in sorted(range(len(turns)), key=shares.__getitem__)]


def _from(number: int, groups: list[list[Case]]) -> list[list[Case]]:
    first = number % len(groups)
    return groups[first:] + groups[:first]


def _turns(groups: Iterable[Iterable[Case]]) -> list[Case]:
    return [case for case in chain.from_iterable(zip_longest(*groups)) if case is not None]


def usable(cases: Iterable[Case]) -> tuple[list[Case], Counter[str]]:
    """Leave out what cannot be scored.

    Returns:
        The cases that can be, and how many cannot, by reason.

    Raises:
        EvaluationError: none can be, or two have the same id.
    """
    kept: list[Case] = []
    left_out: Counter[str] = Counter()
    for case in cases:
        if not any(answer.strip() for answer in case.answers):
            left_out["no answer"] += 1
        elif not case.question.strip():
            left_out["no question"] += 1
        elif not case.retrieved or any(not case.text(place).strip() for place in case.whole):
            left_out["no passages, or an empty one"] += 1
        else:
            kept.append(case)
    if not kept:
        raise EvaluationError(f"no case can be scored; left out: {dict(left_out) or 'nothing, there were none'}")
    twice = [name for name, count in Counter(case.id for case in kept).items() if count > 1]
    if twice:
        raise EvaluationError(f"case ids must be unique, {len(twice)} are not, {twice[0]!r} among them")
    return kept, left_out
