"""What a fusion and an answer cost, and where the time went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from ragkv.errors import ArgumentError
from ragkv.fusion.timing import Timer
from ragkv.logprobs import TokenLogprob
from ragkv.model.schema import Schema
from ragkv.past import Past
from ragkv.scheduling.figures import SchedulerStats
from ragkv.store import StoreStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ChunkReport:
    """One chunk as it stands in a prompt.

    Attributes:
        name: what its document is called; empty where it was not found in a folder.
        document, number: as of :class:`ragkv.Chunk`.
        tokens: how many it has.
        source: where its KV came from, as in :attr:`FusionReport.hits`.
        saved: tokens that the method would have computed, where an engine keeps what it computes (docs/paths.md): they were
            computed before behind just these tokens, or are exact where they stand.
        level: the lossy level at which it was taken from a pool (docs/remote.md); empty where it is as it was stored.
    """

    name: str
    document: str
    number: int
    tokens: int
    source: str
    saved: int = 0
    level: str = ""


@dataclass
class FusionReport:
    """What one fusion did.

    Attributes:
        method: the method with its knobs, as it ran.
        attention: the attention implementation that ran.
        kernels: the implementation of ``ragkv.kernels`` that ran: ``"triton"`` or ``"reference"``.
        why: what :class:`~ragkv.Auto` weighed to choose it, with the figures; empty where nothing was weighed.
        reckoned: milliseconds that the prompt should take, by what was weighed: as ``"chosen"``, with stored chunks ``"loaded"``,
            with all ``"computed"``. What it took is ``milliseconds["total"]``. Empty where nothing was weighed.
        prefix_tokens: tokens of the prefix.
        chunk_tokens: tokens of all chunks.
        suffix_tokens: tokens of the suffix.
        reused_tokens: tokens of the prefix whose KV were there already: an earlier conversation's, or those of a prefix that was
            computed before.
        hits: chunks by where their KV came from: ``"gpu"``, ``"cpu"``, ``"disk"``, ``"remote"``; ``"computed"``: not stored,
            prefilled now; ``"unused"``: the method computes it whole; ``"late"``: it came so slowly from a pool that it was
            computed instead; ``"path"``: computed before behind just these tokens, and
            exact; ``"variant"``: the same, as far as the method computes it (:mod:`ragkv.library.paths`).
        sources: the same for each chunk that was given, in order; ``prompt`` where a session's prompt had it already.
        chunks: those that were placed behind the prefix, in the prompt's order. In a session they may be fewer than those that were
            found for the question, or others too, where earlier turns were put together anew.
        bytes_read: bytes read from disk.
        budget: the recompute really charged: fresh reusable tokens over layers x reusable tokens.
        fresh_by_layer: reusable tokens computed, layer by layer.
        read_tokens: of chunks that were not stored, each read once.
        ran: how the model ran over what was placed (docs/kernels.md): ``"eager"``, as transformers runs it; ``"fixed"``, in fixed
            shapes; ``"graph"``, replayed as a CUDA graph. ``"eager: WHY"`` where a graph was wanted and cannot be had.
        looked: what a method that follows the question read its attention from: ``"scored (triton)"``,
            ``"scored (reference)"`` or ``"eager"``; empty for others.
        gate: why the engine's gate (:class:`ragkv.Gate`) has acted, and what it put in the method's place; empty where it has not.
        speculated: ``"used"``: the prompt was begun while a reranker worked, with the passages that were found first, and these
            stayed; the times of its stages passed, in part, before that was known. ``"dropped"``: it was begun, and made anew.
            Empty: neither.
        rows: ``[R]`` slots of all tokens computed in the last layer, on the device; see :attr:`recomputed`.
        timer: took the times.
    """

    method: str
    attention: str
    kernels: str
    prefix_tokens: int
    chunk_tokens: int
    suffix_tokens: int
    hits: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    chunks: list[ChunkReport] = field(default_factory=list)
    bytes_read: int = 0
    budget: float = 0.0
    fresh_by_layer: list[int] = field(default_factory=list)
    reused_tokens: int = 0
    read_tokens: int = 0
    ran: str = "eager"
    looked: str = ""
    gate: str = ""
    why: str = ""
    speculated: str = ""
    reckoned: dict[str, float] = field(default_factory=dict)
    rows: Tensor | None = field(default=None, repr=False, compare=False)
    timer: Timer = field(default_factory=Timer, repr=False, compare=False)

    @property
    def saved_tokens(self) -> int:
        """What was saved of all chunks, see :attr:`ChunkReport.saved`."""
        return sum(chunk.saved for chunk in self.chunks)

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that were run through the model, as full layers' worth."""
        fresh = self.prefix_tokens - self.reused_tokens + self.suffix_tokens
        return fresh + self.read_tokens + round(self.budget * self.chunk_tokens)

    @property
    def milliseconds(self) -> dict[str, float]:
        """By stage: ``read`` (chunks not stored), ``place`` (load, decode, rotate), ``select``, ``compute``, and ``total``;
        where what is computed is kept (docs/paths.md), ``keep``: copying it.

        The total is from the call to the next-token logits. A device is waited for when this is first asked for.
        """
        return self.timer.milliseconds()

    @property
    def tokens(self) -> dict[str, int]:
        """The prompt's tokens in the last layer: ``reused`` where they stood, ``placed`` from the store, ``recomputed`` though
        they were stored, ``fresh``.
        """
        recomputed = self.fresh_by_layer[-1] if self.fresh_by_layer else 0
        return {
            "reused": self.reused_tokens,
            "placed": self.chunk_tokens - recomputed,
            "recomputed": recomputed,
            "fresh": self.prefix_tokens - self.reused_tokens + self.suffix_tokens,
        }

    @property
    def recomputed(self) -> list[tuple[int, int]]:
        """Runs of chunk tokens that were computed in the last layer though they were stored, each by its first slot in the prompt
        and the one behind its last. A device is waited for whenever this is asked for.
        """
        begin, runs = self.prefix_tokens, list[tuple[int, int]]()
        for slot in [] if self.rows is None else self.rows.tolist():
            if not begin <= slot < begin + self.chunk_tokens:
                continue
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return runs

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("rows", "timer")}
        chunks = [asdict(chunk) for chunk in self.chunks]
        return {**plain, "chunks": chunks, "recomputed": self.recomputed, "milliseconds": self.milliseconds}


def _unheard(tokens: int) -> None:
    """Nobody counts an answer's tokens."""


@dataclass
class FusedPrompt:
    """A prompt whose keys and values are ready. N tokens, vocabulary V.

    Attributes:
        input_ids: LongTensor ``[1, N]``: the ids that a full prefill would be given.
        logits: FloatTensor ``[1, V]``: next-token logits.
        past_key_values: transformers ``Cache`` that holds the N tokens; generation appends to it.
        next_position: where the answer's first token stands: N, unless chunks stand apart or share positions.
        recomputed: LongTensor ``[R]``: positions computed afresh in the last layer, the suffix among them.
        report: what it cost.
        fingerprint: of the model that computed it; another one cannot go on behind it.
        past: what the next turn goes on from; ``None`` where that was not asked for.
        spoken: told how many more tokens of the answer there are; raises DeadlineError where nobody wants it any more.
        said: ``input_ids`` once more, on the CPU, where they came from there: to look at them waits for no device.
    """

    input_ids: Tensor
    logits: Tensor
    past_key_values: Cache
    recomputed: Tensor
    report: FusionReport
    next_position: int
    fingerprint: str
    past: Past | None = None
    spoken: Callable[[int], object] = _unheard
    said: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"spoken": _unheard}  # no copy stands in a line


@dataclass(frozen=True)
class EngineStats:
    """What an engine did since it was made, or its model was first used.

    Attributes:
        line: its scheduler's figures.
        forwards: how many forwards of the model served so many prompts at once.
        store: what its store holds and did.
        paths: the same of the store of what prompts computed; ``None`` where that is not kept.
    """

    line: SchedulerStats
    forwards: dict[int, int]
    store: StoreStats
    paths: StoreStats | None = None


@dataclass
class AnswerReport:
    """What one answer cost.

    Attributes:
        fusion: the prompt's report.
        first_token_ms: from the call to the first token.
        decode_ms: for all further tokens.
        new_tokens: tokens generated, an end token included.
        ran: how the model ran for the last of them, as of :class:`FusionReport`; empty where the prompt's logits were enough.
    """

    fusion: FusionReport
    first_token_ms: float = 0.0
    decode_ms: float = 0.0
    new_tokens: int = 0
    ran: str = ""

    def plot(self) -> Figure:
        """A picture of the answer: the prompt with its chunks, coloured by where their KV came from, above it the recomputed
        tokens, and the time by stage until the first token. Save it with ``figure.savefig("answer.png")``.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        from ragkv.pictures import answer_picture

        return answer_picture(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**{item.name: getattr(self, item.name) for item in fields(self)}, "fusion": self.fusion.as_dict()}


class Structured:
    """A text that may have a schema."""

    text: str
    schema: Schema | None

    @property
    def value(self) -> Any:
        """What an answer to ``schema=`` says: plain values, or an object of the pydantic model.

        Raises:
            ArgumentError: no ``schema=`` was given.
            IncompleteAnswerError: the answer ended in the middle; ``text`` is what there is.
        """
        if self.schema is None:
            raise ArgumentError("the answer is free text: ask with schema= for one that has a value")
        return self.schema.value(self.text)


@dataclass
class Answer(Structured):
    """A generated answer.

    Attributes:
        text: without special tokens, and without the stop text that ended it; empty when the engine has no tokenizer.
        token_ids: the generated ids, an end token and the ids of a stop text included.
        report: what it cost.
        past: prompt and answer with their KV, to go on from; ``None`` where that was not asked for.
        logprobs: of each of ``token_ids``; ``None`` where they were not asked for.
        schema: that it was to fit; see :attr:`value`.
    """

    text: str
    token_ids: Sequence[int]
    report: AnswerReport
    past: Past | None = field(default=None, repr=False, kw_only=True)
    logprobs: Sequence[TokenLogprob] | None = field(default=None, repr=False, kw_only=True)
    schema: Schema | None = field(default=None, repr=False, kw_only=True)

    def __str__(self) -> str:
        return self.text
