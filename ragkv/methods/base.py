"""What a method is: which tokens of a prompt are computed afresh, and in which layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from ragkv.errors import MethodError
from ragkv.fusion.layout import Layout, Placed
from ragkv.fusion.view import Check, Selection, View


class Method(ABC):
    """Chooses the reusable tokens that are computed afresh. The suffix always is, by every method.

    A method keeps no state between prompts: a frozen dataclass whose fields are its knobs, checked in ``__post_init__``. Most
    decide by ``view.layout`` alone. What else a :class:`~ragkv.View` shows is worked out when it is asked for.
    """

    @property
    def _parts(self) -> tuple[Method, ...]:
        """The methods that it is made of: what one of them needs, it does."""
        return ()

    @property
    def needs_sensitivity(self) -> bool:
        """Whether it asks for ``view.sensitivity``, which is then measured when documents are read."""
        return any(part.needs_sensitivity for part in self._parts)

    @property
    def needs_attended(self) -> bool:
        """Whether it goes by what chunks attend to in those in front, as :class:`ragkv.CacheCraft` does: that is then measured
        when documents are read and prompts are computed."""
        return any(part.needs_attended for part in self._parts)

    @property
    def runs_question(self) -> bool:
        """Whether the question is run over the stored chunks before it chooses, as by ``view.attention``; for reckoning."""
        return any(part.runs_question for part in self._parts)

    @property
    def looks(self) -> bool:
        """Whether it looks at stored KV to choose, so that all of them are loaded; not so where the layout and sensitivities do."""
        return not self._parts or any(part.looks for part in self._parts)

    def expected_budget(self, view: View) -> float:
        """The budget that it will be charged, about: its ``ratio`` if it has one. What :class:`~ragkv.Auto` reckons with."""
        return float(getattr(self, "ratio", 0.0))

    @abstractmethod
    def select(self, view: View) -> Tensor | Selection:
        """The chunk tokens to compute from layer 0 on, a subset of ``view.layout.reusable``; or a selection that says more."""

    def spares(self, view: View) -> frozenset[int]:
        """Numbers of the chunks that it computes whole, whatever is stored of them: they are not moved to memory beforehand.

        ``view`` tells where they lie, and what was measured; nothing of them is opened for that.
        """
        return frozenset()

    def narrow(self, check: Check) -> Tensor:
        """The tokens to go on with from ``check.layer`` on, a subset of ``check.tokens``; asked at the selection's ``checks``."""
        return check.tokens


def check_share(method: Method, name: str, share: float) -> None:
    """Refuse a share of the tokens that is none.

    Raises:
        MethodError: it is no number, or lies outside [0, 1].
    """
    if not isinstance(share, int | float) or not 0 <= share <= 1:
        raise MethodError(f"{type(method).__name__}: {name} must lie in [0, 1], got {share!r}")


def check_number(method: Method, name: str, value: int, least: int, why: str = "") -> None:
    """Refuse a whole number that is none, or too small.

    Raises:
        MethodError: it is; ``why`` says what it counts.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or index(value) < least:
        raise MethodError(f"{type(method).__name__}: {name} must be >= {least}{why}, got {value!r}")


def highest_of(scores: Tensor, chunks: Mapping[int, Placed], ratio: float, layout: Layout) -> Selection:
    """As :func:`highest`, among the tokens of some chunks, by their numbers; no device is waited for."""
    tokens = layout.span(*chunks.values())
    chosen = highest(scores, tokens, ratio, layout)
    return Selection(chosen, whole=frozenset(chunks if len(chosen) == len(tokens) else ()))


def highest(scores: Tensor, candidates: Tensor, ratio: float, layout: Layout) -> Tensor:
    """The tokens of the highest scores.

    Args:
        scores: ``[R]``, one for each of ``layout.reusable``.
        candidates: tokens to choose among.
        ratio: share of all R tokens to take; fewer where there are fewer candidates.
        layout: the prompt.
    """
    wanted = min(len(candidates), round(ratio * layout.chunk_tokens))
    return candidates[torch.topk(scores[candidates - layout.chunks_start], wanted).indices]
