"""Gates: what must hold before any score means something. They are run on the first case, whose text is real.

N tokens of the prompt, V words of the vocabulary, H kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.evaluation.bench import Bench, CaseChunks
from ragkv.evaluation.cases import Case
from ragkv.evaluation.metrics import divergence
from ragkv.fusion.passes import recompute
from ragkv.methods import CacheBlend, FullPrefill, Method, Reuse
from ragkv.model.cache import FusedCache, cache_argument
from ragkv.model.decoder import Decoder
from ragkv.report import FusedPrompt


@dataclass(frozen=True)
class Gate:
    """One thing that must hold.

    Attributes:
        name: what must hold.
        error: relative difference (Frobenius) of what was found from what must be.
        limit: the largest error that passes.
        note: what was compared, in words.
    """

    name: str
    error: float
    limit: float
    note: str

    @property
    def passed(self) -> bool:
        """Whether it holds. An error that is no number does not."""
        return self.error <= self.limit


def run_gates(bench: Bench, case: Case) -> Iterator[Gate]:
    """The gates one after the other, the noise floor first: what it is decides how much the others may be off.

    Args:
        bench: the model.
        case: its text is what the gates are run on.
    """
    engine, reading = bench.engine, bench.read(case)
    eps = torch.finfo(engine.decoder.dtype).eps

    def fuse(chunks: Sequence[Chunk], method: Method) -> FusedPrompt:
        return engine.fuse(chunks, case.question, method=method)

    try:
        alone, document = reading.at(case.retrieved, "alone"), _one_document(bench, case, reading)
        full = fuse(alone, FullPrefill())
        truth = _own_prefill(engine, full.input_ids[0])

        logits = _in_two_pieces(engine.decoder, full.input_ids[0])
        error = _error([logits], truth[:1])
        kl = f"KL of the first token {divergence(truth[0], logits):.1e}"
        name = f"noise floor of {str(engine.decoder.dtype).removeprefix('torch.')}"
        yield Gate(name, error, min(0.1, 1000 * eps), f"one prefill in two pieces against in one; {kl}")
        limit = max(1e-4, 10 * error, 10 * eps)

        error = _compare(full, truth)
        if len(engine.decoder.layers) > 1:  # by a method that looks at stored KV and then keeps every token, too
            error = max(error, _compare(fuse(alone, CacheBlend(ratio=1.0)), truth))
        yield Gate("100 % = full prefill", error, limit, "logits, keys and values of all layers")

        _recompute_every_second(engine.decoder, full)
        yield Gate("scattered tokens are exact", _compare(full, truth), limit, "every second token computed again")

        # Layer 0's keys depend on token and position alone, so turning them must give what is computed in place.
        error = _error([fuse(alone, Reuse()).past_key_values.layers[0].keys[0]], truth[1:2])
        note = f"{len(alone)} chunks read alone and moved"
        yield Gate("layer-0 keys rotated = computed there", error, limit, note)

        reused = fuse(document, Reuse())
        error = _compare(reused, _own_prefill(engine, reused.input_ids[0]))
        note = f"a document of {len(document)} chunks, nothing recomputed"
        yield Gate("a chunk where it was made = full prefill", error, limit, note)
    finally:
        bench.forget(reading)


def _one_document(bench: Bench, case: Case, reading: CaseChunks) -> list[Chunk]:
    """The beginning of the document of the most chunks: as much as was read in one window and fits into a prompt."""
    numbers = dict.fromkeys(document for document, _ in case.whole)
    longest = max(numbers, key=lambda number: len(case.documents[number]))
    places = [place for place in case.whole if place[0] == longest]
    chunks = reading.at(places, "document")
    fitting = 1
    while (
        fitting < len(chunks)
        and chunks[fitting].offset == sum(map(len, chunks[:fitting]))
        and bench.fits(case, places[: fitting + 1])
    ):
        fitting += 1
    return chunks[:fitting]


@torch.no_grad()
def _own_prefill(engine: Engine, ids: Tensor) -> list[Tensor]:
    """The model's own prefill, without anything of ragkv: logits ``[1, V]``, keys and values of every layer."""
    cache = DynamicCache()  # made without a configuration it keeps what a window hides
    out = engine.model(input_ids=ids[None], use_cache=True, **{cache_argument(type(engine.model).forward): cache})
    return _tensors(out.logits[:, -1], cache)


def _tensors(logits: Tensor, cache: Cache) -> list[Tensor]:
    return [logits, *(each[0] for layer in cache.layers for each in (layer.keys, layer.values))]


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative difference of pairs of tensors."""
    pairs = [(a.double(), b.double().to(a.device)) for a, b in zip(got, want, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def _compare(prompt: FusedPrompt, truth: Sequence[Tensor]) -> float:
    return _error(_tensors(prompt.logits, prompt.past_key_values), truth)


def _in_two_pieces(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits of a prefill: equal on paper to those of one in one piece, off by what the dtype rounds."""
    cache, half, positions = decoder.cache(len(ids)), len(ids) // 2, torch.arange(len(ids), device=ids.device)
    decoder.step(ids[:half], positions[:half], cache)
    return decoder.step(ids[half:], positions[half:], cache)


def _recompute_every_second(decoder: Decoder, prompt: FusedPrompt) -> None:
    """Over an exact cache: what recomputation at scattered positions must not change."""
    cache, ids = prompt.past_key_values, prompt.input_ids[0]
    assert isinstance(cache, FusedCache)
    rows = torch.arange((len(ids) - 1) % 2, len(ids), 2, device=ids.device)
    prompt.logits = recompute(decoder, cache, ids, rows)
    cache.set_length(len(ids))
