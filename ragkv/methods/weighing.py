"""What a prompt costs by the figures that were measured: loaded, loaded in part, or computed (CacheBlend, arXiv:2405.16444).

T_load = what the tiers take to hand over the tokens that are loaded; T_rec(r) = what computing the share r of them takes, with all
that every method computes. Where both go on side by side a prompt takes the longer of the two, else their sum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, cast

from ragkv.fusion.view import View
from ragkv.methods.base import Method
from ragkv.store import Rates

#: Computing what is stored has to save more than this share of the time.
_WORTH = 0.05


class Way(NamedTuple):
    """One way to put a prompt together.

    Attributes:
        computed: tiers whose chunks are computed whole instead of loaded.
        load_s: seconds of loading the others.
        compute_s: seconds of computing.
        prompt_s: seconds until the prompt is ready.
    """

    computed: tuple[str, ...]
    load_s: float
    compute_s: float
    prompt_s: float


class Weighed(NamedTuple):
    """What a prompt's figures say.

    Attributes:
        method: with as much recompute as loading leaves time for; ``None`` for a full prefill.
        computed: tiers whose chunks are computed, because loading them takes longer.
        why: the figures, for the report.
    """

    method: Method | None
    computed: tuple[str, ...]
    why: str


def weighed(method: Method, view: View, rates: Rates) -> Weighed | None:
    """Whether to load a prompt's chunks from where they lie now; ``None`` where a tier of theirs was not measured.

    It hangs on the prompt, on the tiers that hold its chunks and on the figures, and on nothing else.

    Args:
        method: that would be taken where loading takes no time.
        view: the prompt.
        rates: the figures.
    """
    layout = view.layout
    tokens = Counter[str]()
    for placed, tier in zip(layout.chunks, view.tiers, strict=True):
        tokens.update({} if tier is None else {tier: len(placed.chunk)})
    if not tokens or tokens.keys() - rates.tiers.keys():
        return None
    reusable, known = len(layout.reusable), layout.held or layout.opening
    fresh, missing = layout.tokens - reusable - known, reusable - tokens.total()  # missing chunks are read in any case

    def compute_s(budget: float, computed: tuple[str, ...]) -> float:
        whole = missing + sum(tokens[tier] for tier in computed)
        rows = round(whole + budget * (reusable - whole)) + fresh
        return rates.compute_s(rows, layout.tokens - rows)

    def way(*computed: str) -> Way:
        load_s = rates.load_s({tier: count for tier, count in tokens.items() if tier not in computed})
        took_s = compute_s(budget, computed)
        return Way(computed, load_s, took_s, rates.prompt_s(load_s, took_s))

    budget = min(1.0, method.expected_budget(view))
    slowest = sorted(tokens, key=lambda tier: (-rates.tiers[tier].seconds(tokens[tier]) / tokens[tier], tier))
    full_s = rates.compute_s(layout.tokens - layout.held, layout.held)
    loaded = best = way()
    parts = [] if method.looks else [way(*slowest[:count]) for count in range(1, len(slowest))]
    for other in [*parts, Way(tuple(slowest), 0.0, full_s, full_s)]:
        if other.prompt_s < (1 - _WORTH) * best.prompt_s:
            best = other
    why = _said(tokens, loaded, best, full_s)
    if len(best.computed) == len(slowest):
        return Weighed(None, best.computed, why)
    if rates.beside and best.load_s > best.compute_s:
        method = _raised(method, view, lambda more: compute_s(more, best.computed) <= best.load_s)
    return Weighed(method, best.computed, why)


def _raised(method: Method, view: View, fits: Callable[[float], bool]) -> Method:
    """The method with the largest ratio, in whole percent, whose budget fits; itself where it has no ratio."""
    if not is_dataclass(method) or "ratio" not in {field.name for field in fields(method)}:
        return method
    ratio = cast(Any, method).ratio

    def more(percent: int) -> Method:
        return cast(Method, replace(cast(Any, method), ratio=percent / 100))

    steps = range(int(ratio * 100) + 1, 101)
    most = bisect_right(steps, False, key=lambda percent: not fits(min(1.0, more(percent).expected_budget(view))))
    return more(steps[most - 1]) if most else method


def _said(tokens: Counter[str], loaded: Way, best: Way, full_s: float) -> str:
    stored = ", ".join(f"{count:,} tokens from {tier}" for tier, count in tokens.items())
    said = f"{stored} are loaded in {_ms(loaded.load_s)}, the prompt takes {_ms(loaded.prompt_s)}; a full prefill {_ms(full_s)}"
    if 0 < len(best.computed) < len(tokens):
        said += f"; computing those from {', '.join(best.computed)} {_ms(best.prompt_s)}"
    return said


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
