"""What a prompt costs by the figures that were measured: loaded, loaded in part, or computed (CacheBlend, arXiv:2405.16444).

T_load = what the tiers take to hand over the tokens that are loaded; T_rec(r) = what computing the share r of them takes, with all
that every method computes. Where both go on side by side a prompt takes the longer of the two, else their sum; what comes over a
network comes beside what can be computed without it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple, cast

from ragkv.amounts import milliseconds
from ragkv.fusion.view import View
from ragkv.methods.base import Method
from ragkv.store import Rates
from ragkv.store.rates import LevelRate

#: Computing what is stored has to save more than this share of the time.
_WORTH = 0.05
#: How many numbers of chunks to compute are weighed, about.
_STEPS = 32


class Way(NamedTuple):
    """One way to put a prompt together.

    Attributes:
        computed: numbers of the chunks that are computed whole instead of loaded.
        load_s: seconds of loading the others.
        compute_s: seconds of computing.
        prompt_s: seconds until the prompt is ready.
        levels: lossy levels of a pool at which some are loaded, by their numbers.
        loss: tokens that are loaded so, each as often as there are levels better than its own, and what was stored.
    """

    computed: frozenset[int]
    load_s: float
    compute_s: float
    prompt_s: float
    levels: Mapping[int, str] = MappingProxyType({})
    loss: int = 0


def patience_s(method: Method, view: View, rates: Rates) -> float:
    """How much longer than lately a prompt waits for a pool to say what it has, before it computes that."""
    layout = view.layout
    return inf if method.looks else rates.patience_s(layout.tokens - layout.held, layout.held)


class Weighed(NamedTuple):
    """What a prompt's figures say.

    Attributes:
        method: with as much recompute as loading leaves time for; ``None`` for a full prefill.
        computed: numbers of the stored chunks that are computed, because loading them takes longer.
        name: which these are; empty where there are none, or the method is a full prefill.
        why: the figures, for the report.
        reckoned: milliseconds of the prompt as it is put together, with all loaded, and with all computed.
        levels: see :class:`Way`.
    """

    method: Method | None
    computed: frozenset[int]
    name: str
    why: str
    reckoned: dict[str, float]
    levels: Mapping[int, str] = MappingProxyType({})


def weighed(method: Method, view: View, rates: Rates, ttft_s: float = inf) -> Weighed | None:
    """Whether to load a prompt's chunks from where they lie now; ``None`` where a tier of theirs was not measured.

    Chunks are computed from the front of the prompt, those of the slowest tier first: what stands in front costs least to compute,
    and needs nothing of what is still on its way from a pool (Cake, arXiv:2410.03065). The choice hangs on the prompt, on the tiers
    that hold its chunks and on the figures, and on nothing else but the time that is left.

    Where no way keeps within the time, chunks are taken at lossy levels, by CacheGen's rule (arXiv:2310.07240): of each
    the best whose bytes, and as many of all that are left, come in time. Among the ways that then keep within it the one that loses
    least is taken, or else the fastest of all.

    Args:
        method: that would be taken where loading takes no time.
        view: the prompt.
        rates: the figures.
        ttft_s: seconds since the prompt was asked for in which it should be ready.
    """
    tiers, limit_s = view.tiers, ttft_s - view.elapsed_s  # in this order: a pool is asked, which takes time
    stored = Counter[str]()
    for placed, tier in zip(view.layout.chunks, tiers, strict=True):
        stored.update({} if tier is None else {tier: len(placed.chunk)})
    if not stored or stored.keys() - rates.tiers.keys():
        return None
    budget = min(1.0, method.expected_budget(view))

    def slowness(number: int) -> tuple[float, str, int]:
        tier = str(tiers[number])
        return -rates.tiers[tier].seconds(stored[tier]) / stored[tier], tier, number

    def way(count: int) -> Way:
        return _way(view, rates, budget, frozenset(order[:count]))

    order = sorted((number for number, tier in enumerate(tiers) if tier is not None), key=slowness)
    full_s = rates.compute_s(view.layout.tokens - view.layout.held, view.layout.held)
    full = Way(frozenset(order), 0.0, full_s, full_s)
    # What the question is run for before anything is chosen; such a method looks at all that is stored.
    look_s = rates.compute_s(view.layout.suffix_tokens, view.layout.suffix_start) if method.runs_question else 0.0
    loaded = way(0)
    loaded = loaded._replace(compute_s=loaded.compute_s + look_s, prompt_s=loaded.prompt_s + look_s)
    steps = range(1, len(order), -(-len(order) // _STEPS))
    parts = [] if method.looks else [way(count) for count in sorted({*steps, *_ends(order, tiers)})]
    best = min([loaded, *parts, full], key=lambda each: each.prompt_s)
    if best.prompt_s >= (1 - _WORTH) * loaded.prompt_s:
        best = loaded
    name = _named(best.computed, tiers) if best is not full else ""
    if best.prompt_s > limit_s and any(rates.tiers[tier].levels for tier in stored):
        lossy = [_at_levels(view, rates, budget, each.computed, limit_s) for each in [loaded, *parts]]
        best = min(
            [best, *lossy],
            key=lambda each: (each.prompt_s > limit_s, each.loss * (each.prompt_s <= limit_s), each.prompt_s),
        )
        name = _named(best.computed, tiers) if best is not full else ""
    at = ", ".join(f"{count} at {level}" for level, count in Counter(best.levels.values()).items())
    reckoned = {"chosen": best.prompt_s * 1e3, "loaded": loaded.prompt_s * 1e3, "computed": full_s * 1e3}
    why = _said(stored, loaded, full_s) + (f"; computing {name} {_ms(best.prompt_s)}" if name else "")
    why += f"; {at} of the pool {_ms(best.prompt_s)}, with {_ms(max(0.0, limit_s))} left" if at else ""
    if best is full:
        return Weighed(None, best.computed, name, why, reckoned)
    if rates.beside and best.load_s > best.compute_s:
        method = _raised(
            method, view, lambda more: _way(view, rates, more, best.computed).compute_s + look_s <= best.load_s
        )
    return Weighed(method, best.computed, name, why, reckoned, best.levels)


def _at_levels(view: View, rates: Rates, budget: float, computed: frozenset[int], limit_s: float) -> Way:
    """A way with what it loads from a pool at lossy levels, as far as keeping within a limit takes that."""
    chunks = view.layout.chunks
    held = {
        number: rates.tiers[tier].levels
        for number, tier in reversed(list(enumerate(view.tiers)))  # in the order in which they are asked for
        if tier is not None and number not in computed and rates.tiers[tier].levels
    }

    def way(count: int) -> Way:
        """So many steps down, of one chunk each, the first of all before the second of any."""
        every, more = divmod(count, len(held))
        ranks = {n: min(every + (at < more), len(levels)) for at, (n, levels) in enumerate(held.items())}
        levels = {number: held[number][rank - 1] for number, rank in ranks.items() if rank}
        loss = sum(rank * len(chunks[number].chunk) for number, rank in ranks.items())
        names = {number: level.name for number, level in levels.items()}
        return _way(view, rates, budget, computed, levels)._replace(levels=names, loss=loss)

    most = len(held) * max(map(len, held.values()), default=0)
    if not most:
        return _way(view, rates, budget, computed)
    return way(min(most, bisect_left(range(1, most + 1), True, key=lambda count: way(count).prompt_s <= limit_s) + 1))


def _way(
    view: View,
    rates: Rates,
    budget: float,
    computed: frozenset[int],
    levels: Mapping[int, LevelRate] = MappingProxyType({}),
) -> Way:
    """A prompt some of whose stored chunks are computed, and of the others a share; some of these come at lossy levels."""
    layout, tiers = view.layout, view.tiers
    reusable, known = layout.chunk_tokens, layout.held or layout.opening
    loaded, open_to_repair, kept, decode_s = dict[str, float](), Counter[bool](), 0, 0.0
    for number, (placed, tier) in enumerate(zip(layout.chunks, tiers, strict=True)):
        there = tier is not None and number not in computed  # missing chunks are read in any case
        if there and tier is not None:
            tokens, level = len(placed.chunk), levels.get(number)
            kept += tokens
            decode_s += tokens * level.token_s if level else 0.0
            share = level.token_bytes / rates.tiers[tier].token_bytes if level else 1.0
            loaded[tier] = loaded.get(tier, 0.0) + tokens * share
        open_to_repair[there] += 0 if placed.exact else len(placed.chunk)
    share = open_to_repair[True] / open_to_repair.total() if open_to_repair.total() else kept / reusable
    rows = round(reusable - kept + min(budget * reusable * share, kept)) + layout.tokens - reusable - known
    # In front of the first chunk that is on its way: while it comes.
    away = [
        number
        for number, tier in enumerate(tiers)
        if tier in loaded and rates.tiers[tier].beside and number not in computed
    ]
    front = sum(len(layout.chunks[number].chunk) for number in computed if away and number < away[0])
    front_s = rates.compute_s(front, layout.chunks[away[0]].start - front) if front else 0.0
    compute_s = front_s + rates.compute_s(rows - front, layout.tokens - rows + front)
    load_s, prompt_s = rates.load_s(loaded), rates.prompt_s(loaded, compute_s, front_s)
    return Way(computed, load_s + decode_s, compute_s, prompt_s + decode_s)


def _ends(order: list[int], tiers: Sequence[str | None]) -> set[int]:
    """How many chunks the slowest tier has, the two slowest, and so on, but for all."""
    return {count for count in range(1, len(order)) if tiers[order[count - 1]] != tiers[order[count]]}


def _named(computed: frozenset[int], tiers: Sequence[str | None]) -> str:
    """Which chunks these are."""
    held, some = Counter(tier for tier in tiers if tier), Counter(tiers[number] for number in sorted(computed))
    names = [
        f"all from {tier}" if count == held[tier] else f"{count} of {held[tier]} from {tier}"
        for tier, count in some.items()
        if tier
    ]
    return ", ".join(names)


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


def _said(tokens: Counter[str], loaded: Way, full_s: float) -> str:
    stored = ", ".join(f"{count:,} tokens from {tier}" for tier, count in tokens.items())
    return f"{stored} are loaded in {_ms(loaded.load_s)}, the prompt takes {_ms(loaded.prompt_s)}; a full prefill {_ms(full_s)}"


def _ms(seconds: float) -> str:
    return milliseconds(seconds * 1e3)
