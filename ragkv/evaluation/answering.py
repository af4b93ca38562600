"""Greedy answers and the perplexity of the gold answer behind fused prompts, several side by side.

M tokens of the gold answer, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan

import torch
from torch import Tensor

from ragkv.model.cache import FusedCache
from ragkv.model.packing import run_packed
from ragkv.model.rows import Rows
from ragkv.model.steps import Steps
from ragkv.report import FusedPrompt


@dataclass(frozen=True)
class Reply:
    """What the model says.

    Attributes:
        ids: greedy token ids, without the end token.
        gold_nll: mean negative log-likelihood of a token of the gold answer, in nats; the end token is not counted.
    """

    ids: tuple[int, ...]
    gold_nll: float


@torch.no_grad()
def replies(
    steps: Steps, prompts: Sequence[FusedPrompt], gold: Sequence[int], ends: frozenset[int], limit: int
) -> list[Reply]:
    """Score the gold answer behind each prompt and answer greedily. The prompts' caches are used up.

    The gold answer is run once, as a whole. As long as the model's own choice is the gold token, that pass is also its greedy
    answer, so that only what differs is decoded step by step. Prompts share their forwards where the model packs them.

    Args:
        steps: of the model.
        prompts: each with room for ``max(limit, M)`` tokens.
        gold: ids of the gold answer; at least one.
        ends: ids that end an answer.
        limit: tokens of the longest answer.
    """
    said = [_Said(prompt, gold, ends, limit) for prompt in prompts]
    while asked := [one for one in said if len(one.next)]:
        rows = [one.rows() for one in asked]
        together = len(rows) > 1 and steps.packs
        logits = run_packed(steps.decoder, rows) if together else map(steps.decoder.forward, rows)
        for one, its in zip(asked, logits, strict=True):
            one.see(its)
    return [Reply(tuple(one.ids), one.gold_nll) for one in said]


class _Said:
    """One reply while it is made.

    Attributes:
        ids: so far.
        next: what is run next, first the gold answer; nothing at the end.
        gold_nll: as of :class:`Reply`.
    """

    def __init__(self, prompt: FusedPrompt, gold: Sequence[int], ends: frozenset[int], limit: int):
        assert isinstance(prompt.past_key_values, FusedCache)
        self._cache, self._first, self._start = prompt.past_key_values, prompt.logits, prompt.input_ids.shape[1]
        self._gold, self._ends, self._limit = gold, ends, limit
        self.ids: list[int] = []
        self.next: Sequence[int] = gold
        self.gold_nll: float = nan  # until it is seen

    def rows(self) -> Rows:
        device, at = self._first.device, self._start + max(0, len(self.ids) - 1)
        ids, places = torch.tensor(self.next, device=device), torch.arange(at, at + len(self.next), device=device)
        return Rows(ids, places, self._cache, wanted=len(self.next))

    def see(self, logits: Tensor) -> None:
        """The logits of what was run."""
        token = self._agreed(logits) if isnan(self.gold_nll) else int(logits.argmax())
        self.next = ()
        if token not in self._ends and len(self.ids) < self._limit:
            self.ids.append(token)
            self.next = (token,) if len(self.ids) < self._limit else ()

    def _agreed(self, logits: Tensor) -> int:
        """Takes over what of the gold answer the model says itself; returns what it says next."""
        gold, logits = self._gold, torch.cat([self._first, logits.to(self._first.device)])  # [M + 1, V]
        truth = torch.tensor(gold, device=logits.device)[:, None]
        self.gold_nll = float(-logits[:-1].double().log_softmax(-1).gather(1, truth).mean())
        best = logits.argmax(-1).tolist()
        agreed = 0
        while agreed < min(len(gold), self._limit) and best[agreed] == gold[agreed] and gold[agreed] not in self._ends:
            agreed += 1
        self.ids = list(gold[:agreed])
        self._cache.set_length(self._start + agreed)
        return int(best[agreed])
