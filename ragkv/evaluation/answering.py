"""Greedy answers and the perplexity of the gold answer behind a fused prompt.

M tokens of the gold answer, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
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
def reply(decoder: Decoder, prompt: FusedPrompt, gold: Sequence[int], ends: frozenset[int], limit: int) -> Reply:
    """Score the gold answer and answer greedily. The prompt's cache is used up.

    The gold answer is run once, as a whole. As long as the model's own choice is the gold token, that pass is also its greedy
    answer, so that only what differs is decoded step by step.

    Args:
        decoder: the model.
        prompt: with room for ``max(limit, M)`` tokens.
        gold: ids of the gold answer; at least one.
        ends: ids that end an answer.
        limit: tokens of the longest answer.
    """
    cache = prompt.past_key_values
    assert isinstance(cache, FusedCache)
    start, device = prompt.input_ids.shape[1], prompt.input_ids.device
    draft, places = torch.tensor(gold, device=device), torch.arange(start, start + limit + len(gold), device=device)
    out = decoder.model(
        input_ids=draft[None], position_ids=places[None, : len(gold)], past_key_values=cache, use_cache=True
    )
    logits = torch.cat([prompt.logits, out.logits[0].to(device)])  # [M + 1, V]
    nll = -logits[:-1].double().log_softmax(-1).gather(1, draft[:, None]).mean()
    best = logits.argmax(-1).tolist()
    agreed = 0
    while agreed < min(len(gold), limit) and best[agreed] == gold[agreed] and gold[agreed] not in ends:
        agreed += 1
    ids = list(gold[:agreed])
    cache.set_length(start + agreed)
    token = best[agreed]
    while token not in ends and len(ids) < limit:
        ids.append(token)
        if len(ids) < limit:
            at = places[len(ids) - 1 : len(ids)]
            token = int(decoder.step(torch.tensor([token], device=device), at, cache).argmax())
    return Reply(tuple(ids), float(nll))
