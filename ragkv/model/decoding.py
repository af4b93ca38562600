"""Decoding behind a fused prompt, with transformers' own logits processors and stopping criteria.

``model.generate`` would run the prompt's last token a second time, because it knows no ready logits. The loop here begins with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ragkv.errors import NonFiniteError
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.model.generation import Settings
from ragkv.model.inspection import non_finite
from ragkv.model.rows import Rows
from ragkv.report import FusedPrompt


def decode(
    settings: Settings,
    prompt: FusedPrompt,
    begin: float,
    forward: Callable[[Rows], Tensor],
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    note: Callable[[Tensor, int], object] | None = None,
) -> Iterator[int]:
    """Token ids one by one, an end token included; the prompt's cache grows with them.

    The first one comes from the prompt's logits, without running the model. Tokens that are proposed, from the prompt or by a
    smaller model, are computed along with each token, and their logits used as far as just they are chosen: the answer is the
    same, by fewer passes.

    Args:
        settings: resolved for this prompt.
        prompt: with its cache.
        begin: ``perf_counter()`` from which ``max_time`` counts.
        forward: runs rows.
        turn: taken where logits processors run the model.
        note: told the processed scores ``[1, V]`` of every token, and the token.

    Raises:
        NonFiniteError: the logits are NaN or infinite.
    """
    decoder, cache, streamer = settings.decoder, prompt.past_key_values, settings.streamer
    assert isinstance(cache, FusedCache)
    ids, logits = prompt.input_ids, prompt.logits
    processors, criteria = settings.resolve(ids, begin)
    scoring = turn if settings.runs_model else nullcontext
    room = ids.shape[1] + settings.new_tokens(ids.shape[1])  # for prompt and answer
    proposals = settings.proposer.begin(room, settings.ends)
    proposed: list[int] = []
    ahead: list[int] = []  # those of them that are computed and not used yet,
    behind: list[Tensor] = []  # and the logits behind each
    if streamer is not None:
        streamer.put(ids.cpu())
    try:
        while True:
            with torch.no_grad(), scoring():
                scores = processors(ids, logits.to(ids.device, torch.float32, copy=True))
            token = _chosen(decoder, scores, settings.config.do_sample)
            if note is not None:
                note(scores, token)
            ids = torch.cat([ids, torch.tensor([[token]], device=ids.device)], dim=1)
            if streamer is not None:
                streamer.put(ids[0, -1:].cpu())
            yield token
            if bool(criteria(ids, None).all()):
                return
            if ahead and ahead[0] == token:
                logits = behind.pop(0)
                ahead.pop(0)
                continue
            cache.crop(-len(ahead))
            proposals.judge(ids, len(proposed), len(proposed) - len(ahead))
            ahead = []
            proposed = proposals.propose(ids, room - ids.shape[1] - 1)
            first = prompt.next_position + ids.shape[1] - prompt.input_ids.shape[1] - 1
            at = torch.arange(first, first + 1 + len(proposed), device=ids.device)
            run = torch.cat([ids[0, -1:], ids.new_tensor(proposed)])
            logits, *behind = forward(Rows(run, at, cache, wanted=len(run), first=first)).split(1)
            ahead = proposed.copy()
    finally:
        cache.crop(-len(ahead))
        if streamer is not None:
            streamer.end()


def _chosen(decoder: Decoder, scores: Tensor, sample: bool | None) -> int:
    """The next token by scores ``[1, V]``. They are looked at together with it, so that a device is waited for once."""
    best, token = scores.max(-1).values, scores.argmax(-1)  # NaN where any score is
    if sample:
        token = torch.multinomial(scores.softmax(-1).nan_to_num(1.0), 1)[:, 0]
    value, chosen = torch.cat([best, token.float()]).tolist()  # a token id is exact in fp32
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the best score of a next token is {value}: {non_finite(decoder.dtype)}; or logits processors left no token"
        )
    return int(chosen)


def beam_search(settings: Settings, prompt: FusedPrompt, begin: float) -> list[int]:
    """The best beam's ids, by ``model.generate`` over the fused cache; before each token ``prompt.spoken`` may end it.

    transformers needs one token to begin with: the prompt's last one is run again, and only that one.
    """
    cache, ids = prompt.past_key_values, prompt.input_ids
    cache.crop(-1)
    cache.batch_repeat_interleave(settings.beams)
    arguments = settings.for_generate(ids.shape[1], begin)

    def wanted(ids: Tensor, scores: Tensor) -> Tensor:
        prompt.spoken(0)
        return scores

    arguments["logits_processor"].append(wanted)
    out = settings.decoder.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **arguments)
    return out[0, ids.shape[1] :].tolist()
