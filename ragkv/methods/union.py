"""Union: what either of two methods chooses is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ragkv.errors import MethodError
from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method


@dataclass(frozen=True)
class Union(Method):
    """Compute what either method would.

    One of the two may narrow its choice with depth; the other's tokens are then kept through its checks.

    Attributes:
        first: a method.
        second: another.
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        for member in (self.first, self.second):
            if not isinstance(member, Method):
                raise MethodError(f"Union: joins two methods, got {member!r}")

    @property
    def _parts(self) -> tuple[Method, ...]:
        return self.first, self.second

    def expected_budget(self, view: View) -> float:
        """Of both, as if they chose different tokens."""
        return min(1.0, self.first.expected_budget(view) + self.second.expected_budget(view))

    def spares(self, view: View) -> frozenset[int]:
        """Those that one of them does; none where one looks at them."""
        return frozenset() if self.looks else self.first.spares(view) | self.second.spares(view)

    def select(self, view: View) -> Selection:
        """What either selects, behind what both let it see."""
        one, two = (Selection.of(method.select(view), method) for method in (self.first, self.second))
        if one.checks and two.checks:
            raise MethodError(f"Union: both {self.first!r} and {self.second!r} narrow with depth; at most one may")
        narrows, other = (one, two) if one.checks else (two, one)
        limits = [selection.context for selection in (one, two) if selection.context is not None]
        return Selection(
            tokens=torch.cat([one.tokens, two.tokens]),
            context=torch.cat(limits) if len(limits) == 2 else None,
            checks=narrows.checks,
            keep=other.tokens if narrows.keep is None else torch.cat([other.tokens, narrows.keep]),
            method=narrows.method,
            name=f"Union(first={one.name}, second={two.name})",
            why="; ".join(filter(None, (one.why, two.why))),
            variants=one.variants or two.variants,
            saved=one.saved or two.saved,
        )
