"""Conditions on documents and passages: a small language of dicts over metadata, source, page and heading."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ragkv.errors import RetrievalError
from ragkv.retrieval.records import Document

#: Whether a document may be found.
Condition = Callable[[Document], bool]

_RANGES = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
_SIGNS = ("$eq", "$ne", "$in", *_RANGES)
_JOINS = ("$and", "$or", "$not")
_OF_PASSAGES = {"page", "heading"}
_MISSING = object()
_DEEPEST = 32


def condition(where: Mapping[str, Any] | Condition, depth: int = 0) -> Condition:
    """The condition that a dict writes; a function is one already.

    Names are those of the metadata, and ``source``; of passages (:func:`admitted`) ``page`` and ``heading``, too.

    - ``{"kind": "manual"}``: is equal; ``{"kind": ["manual", "faq"]}``: is one of these
    - ``{"year": {"$gte": 2020, "$lt": 2024}}``: a range; also ``$gt``, ``$lte``, and ``$eq``, ``$ne``, ``$in``
    - several names: all of them hold; ``{"$and": [...]}``, ``{"$or": [...]}`` and ``{"$not": {...}}`` join conditions

    A list in the metadata, of tags say, fits where one of its values does. What a document does not have fits ``$ne`` and ``$not``
    only.

    Args:
        where: the dict; 32 deep at most.
        depth: how deep it stands in another one.

    Raises:
        RetrievalError: it is written in another way.
    """
    if callable(where):
        return where
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise RetrievalError(
            f"where must be a dict, as {{'year': {{'$gte': 2020}}}}, or a function of a document, got {where!r:.80}"
        )
    if depth > _DEEPEST:
        raise RetrievalError(f"where: $and, $or and $not may stand {_DEEPEST} deep in each other, got more")
    parts = [_part(name, wanted, depth + 1) for name, wanted in where.items()]
    return lambda document: all(part(document) for part in parts)


def admitted(where: Mapping[str, Any] | Condition) -> Callable[[Document], Sequence[int]]:
    """The ids of a document's passages that may be found.

    A dict may name a passage's ``page`` (from 1) and ``heading``; where the document's metadata have such a name, theirs counts.

    Args:
        where: as for :func:`condition`.
    """
    holds = condition(where)
    if not _names(where) & _OF_PASSAGES:
        return lambda document: document.passage_ids if holds(document) else ()
    return lambda document: [
        passage_id for at, passage_id in enumerate(document.passage_ids) if holds(_with_place(document, at))
    ]


def _names(where: Mapping[str, Any] | Condition) -> set[str]:
    """What a condition names, however deep."""
    if callable(where):
        return set()
    inner = [*where.get("$and", ()), *where.get("$or", ()), *([where["$not"]] if "$not" in where else ())]
    return set(where).union(*map(_names, inner))


def _with_place(document: Document, at: int) -> Document:
    """A document with the page and the heading of one of its passages among its metadata."""
    places = (("page", document.pages), ("heading", document.headings))
    place = {name: of[at] for name, of in places if of}
    return replace(document, metadata={**place, **document.metadata})


def _part(name: str, wanted: Any, depth: int) -> Condition:
    if name == "$not":
        inner = condition(wanted, depth)
        return lambda document: not inner(document)
    if name in _JOINS:
        if not isinstance(wanted, list | tuple):
            raise RetrievalError(f"where: {name} takes a list of dicts, got {wanted!r:.80}")
        each, joined = [condition(one, depth) for one in wanted], all if name == "$and" else any
        return lambda document: joined(one(document) for one in each)
    if name.startswith("$"):
        raise RetrievalError(f"where: {name!r} is none of {', '.join(_JOINS)}")
    tests = [_test(name, sign, value) for sign, value in _signs(name, wanted)]
    return lambda document: all(test(_value(document, name)) for test in tests)


def _signs(name: str, wanted: Any) -> list[tuple[str, Any]]:
    if isinstance(wanted, Mapping):
        if not wanted or not wanted.keys() <= set(_SIGNS):
            raise RetrievalError(
                f"where: {name!r} takes a value, a list or a dict of {', '.join(_SIGNS)}, got {wanted!r:.80}"
            )
        return list(wanted.items())
    return [("$in" if isinstance(wanted, list | tuple | set | frozenset) else "$eq", wanted)]


def _test(name: str, sign: str, wanted: Any) -> Callable[[Any], bool]:
    if sign == "$in":
        if not isinstance(wanted, list | tuple | set | frozenset):
            raise RetrievalError(f"where: $in of {name!r} takes a list, got {wanted!r:.80}")
        return lambda value: any(_any(value, one, _same) for one in wanted)
    if isinstance(wanted, Mapping | list | tuple) or (sign in _RANGES and not _kind(wanted)):
        raise RetrievalError(f"where: {sign} of {name!r} takes a number or a text, got {wanted!r:.80}")
    if sign in _RANGES:
        compare = _RANGES[sign]
        return lambda value: _any(value, wanted, lambda a, b: _kind(a) == _kind(b) and compare(a, b))
    return lambda value: _any(value, wanted, _same) is (sign == "$eq")


def _any(value: Any, wanted: Any, holds: Callable[[Any, Any], bool]) -> bool:
    return any(holds(one, wanted) for one in (value if isinstance(value, list) else [value]))


def _same(value: Any, wanted: Any) -> bool:
    return isinstance(value, bool) is isinstance(wanted, bool) and value == wanted


def _kind(value: Any) -> str:
    """What may be compared with what: numbers, and texts."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    return "text" if isinstance(value, str) else ""


def _value(document: Document, name: str) -> Any:
    return document.source if name == "source" else document.metadata.get(name, _MISSING)
