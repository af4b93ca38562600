"""Decoding behind a fused prompt, with transformers' own logits processors and stopping criteria.

``model.generate`` would run the prompt's last token a second time, because it knows no ready logits. The loop here begins with
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ragkv.errors import ArgumentTypeError, NonFiniteError
from ragkv.model.cache import FusedCache, cache_argument
from ragkv.model.capture import capturing
from ragkv.model.decoder import Decoder
from ragkv.model.generation import Settings, Stop
from ragkv.model.inspection import non_finite
from ragkv.model.rows import Rows
from ragkv.report import FusedPrompt

# They go by ids wherever these are. Somebody's own may not.
_ANYWHERE = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, StopStringCriteria, Stop)


def decode(
    settings: Settings,
    prompt: FusedPrompt,
    begin: float,
    forward: Callable[[Rows], Tensor],
    turn: Callable[[], AbstractContextManager[object]] = nullcontext,
    note: Callable[[Tensor, int], object] | None = None,
    early: bool = False,
) -> Generator[int, None, None]:
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
        early: run the model for each token before it is known on the host, so that a device has work while the token is looked at.
            What was run behind the last token is dropped. Not where tokens are proposed.

    Raises:
        NonFiniteError: the logits are NaN or infinite.
        ArgumentTypeError: a logits processor gives something else than scores.
    """
    decoder, cache, streamer = settings.decoder, prompt.past_key_values, settings.streamer
    assert isinstance(cache, FusedCache)
    ids, logits = prompt.input_ids, prompt.logits
    here = ids.cpu() if prompt.said is None else prompt.said
    processors, criteria = settings.resolve(ids, here, begin)
    scoring = turn if settings.runs_model else nullcontext
    room = ids.shape[1] + settings.new_tokens(ids.shape[1])  # for prompt and answer
    proposals = settings.proposer.begin(room, settings.ends)
    early = early and not settings.proposer.proposes
    said = here if early and all(type(one) in _ANYWHERE for one in criteria) else None
    coming: Future[Tensor] | None = None  # the logits behind the token at hand
    proposed: list[int] = []
    ahead: list[int] = []  # those of them that are computed and not used yet,
    behind: list[Tensor] = []  # and the logits behind each
    if streamer is not None:
        streamer.put(here)
    try:
        while True:
            with torch.no_grad(), scoring():
                scores = processors(ids, logits.to(ids.device, torch.float32, copy=True))
            if not isinstance(scores, Tensor) or scores.shape != logits.shape:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else scores
                raise ArgumentTypeError(
                    f"logits_processor must give scores {[*logits.shape]}, as it takes them, got {got!r:.80}"
                )
            choice = _Choice(scores, settings.config.do_sample)
            if early and ids.shape[1] + 1 < room:
                first = prompt.next_position + ids.shape[1] - prompt.input_ids.shape[1]
                at = torch.arange(first, first + 1, device=ids.device)
                coming = Future()
                try:
                    coming.set_result(forward(Rows(choice.ids, at, cache, first=first)))
                except Exception as error:
                    coming.set_exception(error)  # asked for later, as what comes of it is
            token = choice.read(decoder)
            if note is not None:
                note(scores, token)
            ids = torch.cat([ids, choice.ids[None]], dim=1)
            if said is not None:
                said = torch.cat([said, torch.tensor([[token]], device="cpu")], dim=1)
            if streamer is not None:
                streamer.put(torch.tensor([token], device="cpu"))
            yield token
            if _ends(criteria, ids if said is None else said):
                return
            if coming is not None:
                logits, coming = coming.result(), None
                continue
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
        cache.crop(-len(ahead) if coming is None or coming.exception() is not None else -1)
        coming = None  # an error in it holds this frame, and so the cache
        if streamer is not None:
            streamer.end()


class _Choice:
    """The next token by scores ``[1, V]``, chosen where they are.

    Attributes:
        ids: ``[1]`` the token, on the device of the scores.
    """

    def __init__(self, scores: Tensor, sample: bool | None):
        best, self.ids = scores.max(-1).values, scores.argmax(-1)  # NaN where any score is
        if sample:
            with capturing if scores.device.type == "cuda" else nullcontext():
                self.ids = torch.multinomial(scores.softmax(-1).nan_to_num(1.0), 1)[:, 0]
        self._numbers = _reading(torch.cat([best, self.ids.float()]))  # a token id is exact in fp32

    def read(self, decoder: Decoder) -> int:
        """The token. The scores are looked at together with it, so that a device is waited for once."""
        value, chosen = self._numbers()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the best score of a next token is {value}: {non_finite(decoder.dtype)}; or logits processors left no token"
            )
        return int(chosen)


def _reading(numbers: Tensor) -> Callable[[], list[float]]:
    """Reads numbers of a device, and waits for nothing that is launched behind this."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True, device="cpu")
    here.copy_(numbers, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(numbers.device))

    def read() -> list[float]:
        there.synchronize()
        return here.tolist()

    return read


def _ends(criteria: StoppingCriteriaList, ids: Tensor) -> bool:
    return bool(criteria(ids, None).all())


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
    model = settings.decoder.model
    arguments[cache_argument(type(model).prepare_inputs_for_generation)] = cache
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    return out[0, ids.shape[1] :].tolist()
