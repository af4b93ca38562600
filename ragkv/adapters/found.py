"""Passages that were found lately: a chat model is given one text, and finds them in it again. Knows no framework."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ragkv.adapters.passages import Passage
from ragkv.engine import Engine
from ragkv.forks import ForkedLock

# Passages that are remembered for each engine: those of the last questions.
_REMEMBERED = 1024


class _Match(NamedTuple):
    start: int
    stop: int
    passage: Passage


class FoundPassages:
    """The last passages that retrievers over an engine have found. Safe for several threads."""

    _of: WeakKeyDictionary[Engine, FoundPassages] = WeakKeyDictionary()
    _lock = ForkedLock()  # what is left anew is not gone for a moment

    def __init__(self) -> None:
        self._passages: dict[str, Passage] = {}

    @classmethod
    def of(cls, engine: Engine) -> FoundPassages:
        """Those of an engine."""
        return cls._of.setdefault(engine, cls())

    def leave(self, passages: Iterable[Passage]) -> None:
        """Remember passages that were found, and forget the oldest."""
        with self._lock.held:
            for passage in passages:
                self._passages.pop(passage.text, None)
                self._passages[passage.text] = passage
            for text in list(self._passages)[:-_REMEMBERED]:
                del self._passages[text]

    def reference(self, text: Any) -> Any:
        """That of the last passage that was found with a text; None where none was."""
        with self._lock.held:
            return self._passages[text].reference if isinstance(text, str) and text in self._passages else None

    def split(self, text: str) -> tuple[list[Passage], str]:
        """The passages that stand in front of a question, and the text without them.

        Passages count where moving them changes nothing but the place of what stood before them: they are lines of their own,
        nothing but white space stands between them, and a question follows. Anywhere else they are text like any other.

        Args:
            text: a user's message.

        Returns:
            The passages in their order, and the rest; no passages, and the whole text, where none are found so.
        """
        matches = self._matches(text)
        if not matches:
            return [], text
        start, stop = matches[0].start, matches[-1].stop
        between = pairwise(matches)
        if not text[stop:].strip() or any(text[one.stop : two.start].strip() for one, two in between):
            return [], text
        before, after = text[:start].strip(), text[stop:].strip()
        return [match.passage for match in matches], f"{before}\n\n{after}" if before else after

    def _matches(self, text: str) -> list[_Match]:
        """Where passages stand as lines of their own, from the left, the longest first."""
        with self._lock.held:
            known = [passage for name, passage in self._passages.items() if name in text]
        found = [
            _Match(at.start(), at.end(), passage)
            for passage in known
            for at in re.finditer(rf"(?<![^\n]){re.escape(passage.text)}(?![^\n])", text)
        ]
        matches: list[_Match] = []
        for match in sorted(found, key=lambda match: (match.start, -match.stop)):
            if not matches or match.start >= matches[-1].stop:
                matches.append(match)
        return matches
