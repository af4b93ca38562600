"""Slots: named places in a template's own text that every call fills with data."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ragkv.errors import PromptError

# Filled by RAG, where a template has it: the passages' places in the prompt, the most relevant first.
RANKS = "ranks"


def pieces(text: Any, names: Sequence[str]) -> list[Any]:
    """The template's own text and the names of slots by turns; text first and last. Ids have no slots."""
    if not names or not isinstance(text, str):
        return [text]
    return re.split(f"{{({'|'.join(map(re.escape, names))})}}", text)


def check_slots(slots: Any, question: Sequence[Any], others: Mapping[str, Any]) -> None:
    """See that a template's slots are named and stand where they may.

    Args:
        slots: the template's.
        question: its parts around the question.
        others: its other parts by name.

    Raises:
        PromptError: they do not.
    """
    if not isinstance(slots, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in slots):
        raise PromptError(
            f"slots must be a dict of names and what stands there by default, as {{'language': 'English'}}; got {slots!r:.80}"
        )
    for name in slots:
        held = [part for part, text in others.items() if len(pieces(text, [name])) > 1]
        if held:
            raise PromptError(
                f"the slot {name!r} stands in {held[0]}, on which stored KV depend: it may stand in before_question and "
                "after_question; what a call says in front of the passages is system="
            )
        if not any(len(pieces(text, [name])) > 1 for text in question):
            raise PromptError(
                f"the slot {name!r} stands nowhere: write {{{name}}} into before_question or after_question"
            )


def filled(slots: Mapping[str, Any], given: Mapping[str, Any] | None, ranks: str = "") -> dict[str, Any]:
    """What stands in each slot of a template in one call.

    Args:
        slots: the template's, with what stands there by default.
        given: by the call.
        ranks: what stands in the slot of this name where the call does not say it; empty: what stands there by default.

    Raises:
        PromptError: the template has no such slot.
    """
    if given is not None and not isinstance(given, Mapping):
        raise PromptError(f"slots must be a dict of names and what stands there, got {given!r:.80}")
    unknown = sorted(map(str, (given or {}).keys() - slots.keys()))
    if unknown:
        there = ", ".join(slots) or "none: PromptTemplate(slots={...}) names them"
        raise PromptError(f"the template has no slot {unknown[0]!r}; it has {there}")
    own = {RANKS: ranks} if ranks and RANKS in slots else {}
    return {**slots, **own, **(given or {})}
