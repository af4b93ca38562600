"""Auto: picks a method for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf

import torch

from ragkv.errors import ArgumentError, instance
from ragkv.fusion.layout import Layout
from ragkv.fusion.view import Selection, View
from ragkv.methods.base import Method
from ragkv.methods.full_prefill import FullPrefill
from ragkv.methods.reuse import Reuse
from ragkv.methods.sensitive_tokens import SensitiveTokens
from ragkv.methods.weighing import Weighed, patience_s, weighed
from ragkv.store import Rates


@dataclass(frozen=True)
class Auto(Method):
    """Pick by what stands in the prompt; the report names what was picked, and why. ``method="auto"`` is short for it.

    Every chunk exact where it stands, or all of one document: :class:`Reuse`. No more chunk tokens than suffix tokens:
    :class:`FullPrefill`, for there is nothing to gain. Else ``repair``.

    Where this machine and this model were measured (``ragkv advise``), loading the chunks from where they lie is weighed against
    computing them, as by CacheBlend's loading controller (arXiv:2405.16444). Chunks that are slow to load are computed, all of them
    if need be, those in front first; where loading goes on beside computing, as on a GPU, as many tokens more are repaired as fit
    into its time. A chunk that then comes from a pool more slowly than it is computed is computed, too.

    Attributes:
        repair: the method for prompts that put chunks where they were not made.
        rates: figures in place of those that were measured.
        ttft_s: seconds within which a first token is wanted. Where that takes it, and a pool has them, chunks are taken at lossy
            levels (:class:`~ragkv.store.RemoteTier`); never without.
    """

    repair: Method = field(default_factory=SensitiveTokens)
    rates: Rates | None = None
    ttft_s: float | None = None

    def __post_init__(self) -> None:
        instance("repair", self.repair, Method, "a ragkv.Method, as ragkv.LegoLink(k=16)")
        instance("ttft_s", self.ttft_s, int | float | None, "seconds until the first token")
        if self.ttft_s is not None and not self.ttft_s > 0:
            raise ArgumentError(f"ttft_s must be more than 0 seconds, got {self.ttft_s}")
        instance("rates", self.rates, Rates | None, "a ragkv.Rates, as ragkv.Engine.advise(...).rates")

    @property
    def _parts(self) -> tuple[Method, ...]:
        return (self.repair,)

    def expected_budget(self, view: View) -> float:
        """That of the method for this prompt."""
        return self._picked(view.layout).expected_budget(view)

    def select(self, view: View) -> Selection:
        """What the method for this prompt selects; it also decides further."""
        picked, rates = self._picked(view.layout), self.rates or view.rates
        found = None if rates is None or isinstance(picked, FullPrefill) else self._weighed(picked, view, rates)
        method = picked if found is None else found.method or FullPrefill()
        if rates is not None and not isinstance(method, FullPrefill):
            computed, levels = (frozenset(), {}) if found is None else (found.computed, found.levels)
            view.open(computed, patience_s(method, view, rates), levels)
        chosen = replace(Selection.of(method.select(view), method), rates=rates)
        if found is not None:
            name = f"{chosen.name}, and {found.name}" if found.name else chosen.name
            why = "; ".join(filter(None, [found.why, chosen.why]))
            chosen = replace(chosen, why=why, reckoned=found.reckoned, name=name)
        if not view.spared:
            return chosen
        spared = view.layout.span(*(view.layout.chunks[number] for number in view.spared))
        tokens = torch.cat([chosen.tokens, spared])  # some may be among both
        keep = spared if chosen.keep is None else torch.cat([chosen.keep, spared])  # nothing is loaded for them
        return replace(chosen, tokens=tokens, keep=keep, whole=None)

    def spares(self, view: View) -> frozenset[int]:
        """Those that are slower to load than to compute, or to be taken at a lossy level."""
        picked, rates = self._picked(view.layout), self.rates or view.rates
        if isinstance(picked, FullPrefill):
            return picked.spares(view)
        found = None if rates is None else self._weighed(picked, view, rates)
        return picked.spares(view) if found is None else found.computed | found.levels.keys()

    def _weighed(self, picked: Method, view: View, rates: Rates) -> Weighed | None:
        return weighed(picked, view, rates, inf if self.ttft_s is None or not view.lossy else self.ttft_s)

    def _picked(self, layout: Layout) -> Method:
        if not len(layout.behind_another):
            return Reuse()
        if layout.chunk_tokens <= layout.suffix_tokens:
            return FullPrefill()
        return self.repair
