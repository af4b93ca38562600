"""Log-probabilities of an answer's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ragkv.errors import whole_number
from ragkv.tokenizer import text_of


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer, and how likely it was.

    It is the natural logarithm under the distribution that the token was taken from: behind all logits processors, temperature and
    schema, as ``compute_transition_scores(..., normalize_logits=True)`` of transformers says it.

    Attributes:
        id: of the token.
        text: of the token alone; empty without a tokenizer.
        logprob: its log-probability.
        top: the likeliest tokens at its place, the likeliest first; empty unless they were asked for.
    """

    id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain: dict[str, Any] = {"id": self.id, "text": self.text, "logprob": self.logprob}
        return {**plain, "top": [other.as_dict() for other in self.top]} if self.top else plain


def asked_logprobs(value: bool | int | None) -> int | None:
    """How many of the likeliest tokens are wanted beside each; ``None`` for no log-probabilities at all.

    Raises:
        ArgumentError, ArgumentTypeError: it is neither a bool nor a whole number of at least 1.
    """
    if value is None or value is False:
        return None
    return 0 if value is True else whole_number("logprobs", value, 1)


class Logprobs(list[TokenLogprob]):
    """Those of an answer as it grows.

    Args:
        tokenizer: ``None`` where there is none.
        top: how many of the likeliest tokens are kept beside each.
    """

    def __init__(self, tokenizer: Any, top: int):
        super().__init__()
        self._tokenizer, self._top = tokenizer, top

    def note(self, scores: Tensor, token: int) -> None:
        """One step: processed scores ``[1, V]`` and the token that was taken."""
        logprobs = scores[0].float().log_softmax(-1)
        best = logprobs.topk(min(self._top, len(logprobs))) if self._top else None
        pairs = [] if best is None else zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top = tuple(self._one(i, value) for i, value in pairs if value != float("-inf"))
        self.append(self._one(token, float(logprobs[token]), top))

    def _one(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        text = "" if self._tokenizer is None else text_of(self._tokenizer, [token])
        return TokenLogprob(token, text, logprob, top)
