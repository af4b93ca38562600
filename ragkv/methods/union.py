"""Union: what either of two methods chooses is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout
from ragkv.methods.base import Method

if TYPE_CHECKING:
    from ragkv.fusion.fuse import Check
    from ragkv.fusion.scene import Scene
    from ragkv.library.depth import Depth


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
    def looks(self) -> bool:
        """Whether one of them has to look at the prompt."""
        return self.first.looks or self.second.looks

    @property
    def measured(self) -> bool:
        """Whether one of them needs sensitivities."""
        return self.first.measured or self.second.measured

    def pick(self, layout: Layout, depth: Depth) -> Union:
        """The union of what both pick."""
        return Union(self.first.pick(layout, depth), self.second.pick(layout, depth))

    def start(self, layout: Layout) -> Tensor:
        """What one of them starts with."""
        return torch.cat([self.first.start(layout), self.second.start(layout)])

    def survey(self, scene: Scene) -> Tensor:
        """The same, where one looks first."""
        return torch.cat([self.first.survey(scene), self.second.survey(scene)])

    def context(self, scene: Scene) -> Tensor | None:
        """What either lets its tokens see; all in front of them, unless both limit it."""
        limits = [context for member in (self.first, self.second) if (context := member.context(scene)) is not None]
        return torch.cat(limits) if len(limits) == 2 else None

    def checks(self, layers: int) -> Sequence[int]:
        """Those of the one that narrows."""
        first, second = self.first.checks(layers), self.second.checks(layers)
        if first and second:
            raise MethodError(f"Union: both {self.first!r} and {self.second!r} narrow with depth; at most one may")
        if (first and self.second.looks) or (second and self.first.looks):
            raise MethodError(f"Union: {self!r} joins a method that narrows with one that looks at the prompt first")
        return first or second

    def narrow(self, check: Check) -> Tensor:
        """What the one keeps, and what the other started with."""
        narrows = check.layer in self.first.checks(check.layers)
        keeps, other = (self.first, self.second) if narrows else (self.second, self.first)
        started = other.start(check.layout)
        return torch.cat([keeps.narrow(check), started[torch.isin(started, check.positions)]])
