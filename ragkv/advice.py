"""When reuse pays: what was measured of this machine and a model, and what it means for prompts and for a corpus."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

from ragkv.calibration.kept import resolved
from ragkv.errors import ArgumentError, CalibrationError
from ragkv.fusing import Places
from ragkv.fusion.layout import lay_out
from ragkv.library.documents import Documents
from ragkv.library.rates import measured_rates
from ragkv.library.sizes import codec_bytes
from ragkv.machine import machine
from ragkv.methods import Method
from ragkv.methods.calibrated import Chosen
from ragkv.store import Rates

_LENGTHS = (256, 1024, 4096, 16384, 65536)
_FAR = 1 << 20
_DOCUMENT, _QUESTION = 2048, 32
# Passages of a prompt that methods are asked about, and the tokens of each.
_PASSAGES, _PASSAGE = 8, 256


@dataclass(frozen=True)
class Advice:
    """What pays on this machine with this model. Prompts are chunks and a question of :attr:`question_tokens`.

    Attributes:
        machine: what computes.
        rates: what was measured; :class:`~ragkv.Auto` goes by it.
        codec_bytes: that a token's KV take where they are kept, by codec; what packages are missing for is left out.
        codec: that the store uses.
        method: by which prompts are put together; in the place of :class:`~ragkv.Calibrated` what was chosen.
        budget: share of the chunk tokens that it recomputes, about, of passages of several documents
            (:meth:`ragkv.Method.expected_budget`). What is computed whole is not loaded: a full prefill's prompts take the same
            time from every tier.
        runs_question: the question is run over the stored chunks first, to choose what is recomputed.
        passes: how often a document is read when it is added: twice where sensitivities are measured.
        lengths: chunk tokens of a prompt, for the table.
        most_tokens: chunk tokens that a prompt may have.
        document_tokens: of one document that are read at once.
        question_tokens: of the question.
    """

    machine: str
    rates: Rates
    codec_bytes: dict[str, float]
    codec: str
    method: str
    budget: float
    runs_question: bool
    passes: int
    lengths: tuple[int, ...]
    most_tokens: int
    document_tokens: int
    question_tokens: int = _QUESTION

    def full_s(self, tokens: int) -> float:
        """Seconds until the first token, all computed."""
        return self.rates.compute_s(tokens + self.question_tokens)

    def reuse_s(self, tier: str, tokens: int) -> float:
        """Seconds until the first token, with all chunks from one tier and the budget recomputed."""
        if self.budget == 1 and not self.runs_question:
            return self.full_s(tokens)
        rows = round(self.budget * tokens) + self.question_tokens
        compute_s = self.rates.compute_s(rows, tokens + self.question_tokens - rows)
        if self.runs_question:
            compute_s += self.rates.compute_s(self.question_tokens, tokens)
        return self.rates.prompt_s({tier: tokens}, compute_s)

    def pays_from(self, tier: str) -> int | None:
        """The chunk tokens from which on a prompt from a tier is ready before a full prefill; ``None``: none that is allowed."""

        def pays(tokens: int) -> bool:
            return self.reuse_s(tier, tokens) < self.full_s(tokens)

        high = self.most_tokens
        if not pays(high):
            return None
        while high > 1 and pays(high // 2):
            high //= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if pays(middle) else (middle, high)
        return high

    def uses(self, tier: str, tokens: int) -> int | None:
        """In how many prompts of so many tokens a chunk has to stand before reading it has paid; ``None``: in however many."""
        saved_s = (self.full_s(tokens) - self.reuse_s(tier, tokens)) / tokens
        return ceil(self.corpus_s(1) / saved_s) if saved_s > 0 else None

    def read_s(self, tokens: int) -> float:
        """Seconds of computing that adding one document of so many tokens takes."""
        return self.passes * self.rates.read_s(tokens, self.document_tokens)

    def corpus_s(self, tokens: int) -> float:
        """Seconds that adding documents of so many tokens in all takes, of about 2,048 each."""
        return self.read_s(_DOCUMENT) * tokens / _DOCUMENT

    def as_dict(self, corpus_tokens: int) -> dict[str, Any]:
        """Plain values, for JSON.

        Args:
            corpus_tokens: of documents that are to be added.
        """
        costs = self.rates.costs
        return {
            "machine": self.machine,
            "method": self.method,
            "budget": self.budget,
            "prefill": [
                {"tokens": new, "seconds": costs(0, new), "tokens_per_s": new / costs(0, new)}
                for new in costs.new
                if costs(0, new)
            ],
            "loading_beside_computing": self.rates.beside,
            "full_prefill": {str(tokens): self.full_s(tokens) for tokens in self.lengths},
            "tiers": {tier: self._tier(tier) for tier in self.rates.tiers},
            "codec": self.codec,
            "corpus": {
                "tokens": corpus_tokens,
                "seconds": self.corpus_s(corpus_tokens),
                "bytes": {codec: round(size * corpus_tokens) for codec, size in self.codec_bytes.items()},
            },
            "token_bytes": self.codec_bytes,
        }

    def _tier(self, tier: str) -> dict[str, Any]:
        loading = self.rates.tiers[tier]
        return {
            "bytes_per_s": loading.bytes_per_s,
            "tokens_per_s": loading.bytes_per_s / loading.token_bytes,
            "start_seconds": loading.start_s,
            "pays_from_tokens": self.pays_from(tier),
            "seconds": {str(tokens): self.reuse_s(tier, tokens) for tokens in self.lengths},
            "uses": {str(tokens): self.uses(tier, tokens) for tokens in self.lengths},
        }


def advise(documents: Documents, method: Method, limit_s: float = 10.0, again: bool = False) -> Advice:
    """See :meth:`ragkv.Engine.advise`."""
    if not isinstance(limit_s, int | float) or not limit_s > 0:
        raise ArgumentError(f"limit_s must be seconds above 0, got {limit_s!r}")
    with suppress(CalibrationError):  # there is none yet
        method = resolved(method, documents)
    method = method.method if isinstance(method, Chosen) else method
    rates = measured_rates(documents, limit_s, again)
    decoder = documents.reader.decoder
    most = _FAR if decoder.max_positions is None else decoder.max_positions
    most = max(1, most - _QUESTION - len(documents.anchor))
    lengths = tuple(length for length in _LENGTHS if length <= most) or (most,)
    return Advice(
        machine(decoder.device),
        rates,
        codec_bytes(documents),
        documents.store.codecs[0].name,
        repr(method),
        _budget(method, documents, most),
        method.runs_question,
        documents.passes,
        lengths,
        most,
        documents.document_tokens,
    )


def _budget(method: Method, documents: Documents, most: int) -> float:
    """What a method is charged in a prompt of passages that stand apart from each other."""
    length = max(1, min(_PASSAGE, most // _PASSAGES))
    chunks = [documents.passage([number] * length) for number in range(_PASSAGES)]
    anchor, suffix = documents.anchor, [0] * min(_QUESTION, length)
    layout = lay_out(anchor, anchor, chunks, suffix, documents.reader.decoder.device)
    keys = [documents.key(chunk) for chunk in chunks]
    return min(1.0, method.expected_budget(Places(documents, layout, keys, method.looks)))
