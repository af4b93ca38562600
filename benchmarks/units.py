"""What to keep at equal bytes, for policies.py: chunks, exact paths, or chunks and what was repaired on top of them.

- ``chunks``: a chunk's KV, whatever stands in front. Behind other chunks ``repair`` of its tokens are computed for a question.
- ``paths``: a chunk's KV behind the chunks that stood in front of it, exact; the longest leading run is found.
- ``both``: chunks, and for a path only the repaired tokens of its last chunk: ``repair`` of the bytes, useless without the chunk
  and without the path before it. What is found on a path is as it was repaired then, not exact.

What others stand on outlives them: leaves are evicted first, the least priority of the store's own policy among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from math import ceil

from streams import Question

from ragkv.chunk import digest
from ragkv.errors import StoreFullError
from ragkv.store.books import MemoryBooks
from ragkv.store.planner import Planner
from ragkv.store.policy import Policy
from ragkv.store.terms import Terms


class Shelf(Container[bytes]):
    """A tier as its planner sees it, with entries that stand on others. As a container it holds what must not be evicted.

    Args:
        budget: tokens' worth of KV.
        policy: which leaves go first.
    """

    def __init__(self, budget: int, policy: Policy) -> None:
        self.asked: set[bytes] = set()
        self._on: dict[bytes, Sequence[bytes]] = {}
        self._leaning: Counter[bytes] = Counter()
        self._planner = Planner(MemoryBooks(), policy, budget, self, delete=self._delete)

    def __contains__(self, key: object) -> bool:
        return key in self.asked or self._leaning[key] > 0  # type: ignore[index]

    def found(self, key: bytes) -> bool:
        """Whether an entry is there; that is a use of it."""
        self.asked.add(key)
        if key not in self._on:
            return False
        row = self._planner.books.row(key)
        assert row is not None
        self._planner.use(key, row)
        return True

    def put(self, key: bytes, size: int, worth: float, on: Sequence[bytes] = ()) -> bool:
        """Keeps an entry that stands on others; whether there is room for it."""
        self.asked.add(key)
        if not all(base in self._on for base in on):
            return False
        try:
            self._planner.admit(key, size, Terms(cost_s=worth))
        except StoreFullError:
            return False
        self._on[key] = on
        self._leaning.update(on)
        return True

    def _delete(self, key: bytes) -> bool:
        there = key in self._on
        self._leaning.subtract(self._on.pop(key, ()))
        return there


def chunks(shelf: Shelf, question: Question, repair: float) -> float:
    """Tokens that are not computed for a question."""
    saved = 0.0
    for place, one in enumerate(question):
        if shelf.found(one.key):
            saved += one.tokens * (1 - repair if place else 1)
        else:
            shelf.put(one.key, one.tokens, (1 - repair) * one.tokens)
    return saved


def paths(shelf: Shelf, question: Question, repair: float) -> float:
    """See :func:`chunks`."""
    saved, node, same = 0.0, b"", True
    for one in question:
        before, node = node, digest(node, one.key)
        same = same and shelf.found(node)
        if same:
            saved += one.tokens
        elif not shelf.put(node, one.tokens, one.tokens, [before] if before else []):
            break
    return saved


def both(shelf: Shelf, question: Question, repair: float) -> float:
    """See :func:`chunks`."""
    saved, node, same = 0.0, b"", True
    for one in question:
        before, node = node, digest(node, one.key) if node else one.key
        there = shelf.found(one.key)
        if not there:
            shelf.put(one.key, one.tokens, (1 - repair) * one.tokens)
        if not before:
            same, saved = there, saved + there * one.tokens
            continue
        same = same and there and shelf.found(node)
        saved += there * one.tokens * (1 if same else 1 - repair)
        if not same:
            shelf.put(node, ceil(repair * one.tokens), repair * one.tokens, [before, one.key])
    return saved


UNITS: dict[str, Callable[[Shelf, Question, float], float]] = {"chunks": chunks, "paths": paths, "both": both}


def saved_share(unit: str, stream: Sequence[Question], policy: Policy, budget: int, repair: float) -> float:
    """The share of all questions' tokens that need not be computed, from a tier that is empty at first."""
    shelf, saved = Shelf(budget, policy), 0.0
    for question in stream:
        shelf.asked.clear()
        saved += UNITS[unit](shelf, question, repair)
    return saved / sum(one.tokens for question in stream for one in question)
