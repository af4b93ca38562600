"""Orders of passages: two joined into one, that of a prompt, and what to look for in a second hop."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ragkv.retrieval.records import Passage

#: Orders that passages may have in a prompt, see :class:`~ragkv.retrieval.Retrieval`.
ORDERS = ("document", "retrieved", "best-last", "cache")

# Reciprocal rank fusion: Cormack, Clarke, Buettcher, SIGIR 2009, with their k.
_RRF_K = 60
_WORD = re.compile(r"\w+")
_SENTENCE_ENDS = frozenset(".!?…:;•*#|>。！？\n")  # noqa: RUF001 - stops of other scripts are meant
_MOST_NAMES = 16


def fused(orders: Iterable[Sequence[int]]) -> list[int]:
    """Orders joined by the sum of 1 / (60 + rank); the smaller id first among equals."""
    scores: defaultdict[int, float] = defaultdict(float)
    for order in orders:
        for rank, item in enumerate(order, 1):
            scores[item] += 1 / (_RRF_K + rank)
    return sorted(scores, key=lambda item: (-scores[item], item))


def ordered(passages: Sequence[Passage], order: str) -> list[Passage]:
    """Passages in one of :data:`ORDERS`.

    Args:
        passages: the best first.
        order: which.
    """
    if order == "retrieved":
        return list(passages)
    if order == "best-last":
        return list(reversed(passages))
    rank = {passage.document.id: number for number, passage in reversed(list(enumerate(passages)))}
    return sorted(passages, key=lambda passage: (rank[passage.document.id], passage.position))


def names(texts: Iterable[str], question: str) -> list[str]:
    """The names in texts: runs of capitalised words, 16 at most, without those that share a word with the question.

    A single word at the beginning of a sentence is none: any word is capitalised there.
    """
    asked = set(_WORD.findall(question.casefold()))
    found: dict[str, None] = {}
    for text in texts:
        for words, begins in _capitalised(text):
            if (len(words) > 1 or not begins) and not asked & {word.casefold() for word in words}:
                found.setdefault(" ".join(words))
    return list(found)[:_MOST_NAMES]


def _capitalised(text: str) -> Iterable[tuple[list[str], bool]]:
    """Runs of capitalised words with single blanks between them, and whether a sentence begins there."""
    run, begins, end = list[str](), False, 0
    for match in _WORD.finditer(text):
        between, capital = text[end : match.start()], match[0][0].isupper()
        if run and not (capital and between == " "):
            yield run, begins
            run = []
        if capital:
            if not run:
                before = between.strip(" \t\"'“”‘’«»()[]_")  # noqa: RUF001 - quotes of other scripts are meant
                begins = not end or before[-1:] in _SENTENCE_ENDS
            run.append(match[0])
        end = match.end()
    if run:
        yield run, begins
