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
from ragkv.fusion.compute import recompute
from ragkv.methods import CacheBlend, FullPrefill, Reuse
from ragkv.model.cache import FusedCache
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
    reading = bench.read(case)
    try:
        alone, whole = reading.at(case.retrieved, "alone"), _one_document(bench, case, reading)
        truth = _own_prefill(bench.engine, bench.engine.fuse(alone, case.question, method=FullPrefill()).input_ids[0])
        floor = _noise_floor(bench.engine, truth)
        yield floor
        limit = max(1e-4, 10 * floor.error, 10 * torch.finfo(bench.engine.decoder.dtype).eps)
        for gate in (_all_recomputed, _scattered, _first_layer):
            yield gate(bench, case, alone, truth, limit)
        yield _in_place(bench, case, whole, limit)
    finally:
        bench.forget(reading)


@dataclass(eq=False)
class _Truth:
    """The model's own prefill, without anything of ragkv: ids ``[N]``; logits ``[1, V]``, keys and values of every layer."""

    ids: Tensor
    found: list[Tensor]


def _one_document(bench: Bench, case: Case, reading: CaseChunks) -> list[Chunk]:
    """The beginning of the document of the most chunks: as much as was read in one window and fits into a prompt."""
    numbers = dict.fromkeys(document for document, _ in case.whole)
    longest = max(numbers, key=lambda number: len(case.documents[number]))
    places = [place for place in case.whole if place[0] == longest]
    chunks = reading.at(places, "document")
    fitting = 1
    while fitting < len(chunks) and chunks[fitting].offset == sum(map(len, chunks[:fitting])):
        if not bench.fits(case, places[: fitting + 1]):
            break
        fitting += 1
    return chunks[:fitting]


@torch.no_grad()
def _own_prefill(engine: Engine, ids: Tensor) -> _Truth:
    cache = DynamicCache()  # made without a configuration it keeps what a window hides
    out = engine.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return _Truth(ids, _tensors(out.logits[:, -1], cache))


def _tensors(logits: Tensor, cache: Cache) -> list[Tensor]:
    return [logits, *(each[0] for layer in cache.layers for each in (layer.keys, layer.values))]


def _error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative difference of pairs of tensors."""
    pairs = [(a.double(), b.double().to(a.device)) for a, b in zip(got, want, strict=True)]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def _compare(prompt: FusedPrompt, truth: _Truth) -> float:
    return _error(_tensors(prompt.logits, prompt.past_key_values), truth.found)


def _noise_floor(engine: Engine, truth: _Truth) -> Gate:
    """The same prefill in two pieces: equal on paper, off by what the dtype rounds."""
    decoder, ids = engine.decoder, truth.ids
    cache, half = decoder.cache(len(ids)), len(ids) // 2
    positions = torch.arange(len(ids), device=ids.device)
    decoder.step(ids[:half], positions[:half], cache)
    logits = decoder.step(ids[half:], positions[half:], cache)
    kl = divergence(truth.found[0], logits)
    return Gate(
        f"noise floor of {str(decoder.dtype).removeprefix('torch.')}",
        _error([logits], truth.found[:1]),
        min(0.1, 1000 * torch.finfo(decoder.dtype).eps),
        f"one prefill in two pieces against in one; KL of the first token {kl:.1e}",
    )


def _all_recomputed(bench: Bench, case: Case, chunks: list[Chunk], truth: _Truth, limit: float) -> Gate:
    """In one ordinary pass, and by a method that looks at stored KV and then keeps every token."""
    layers = len(bench.engine.decoder.layers)
    methods = [FullPrefill(), *([CacheBlend(ratio=1.0)] if layers > 1 else [])]
    errors = [_compare(bench.engine.fuse(chunks, case.question, method=method), truth) for method in methods]
    return Gate("100 % = full prefill", max(errors), limit, "logits, keys and values of all layers")


def _scattered(bench: Bench, case: Case, chunks: list[Chunk], truth: _Truth, limit: float) -> Gate:
    """Every second token over an exact cache: what recomputation at scattered positions must not change."""
    prompt = bench.engine.fuse(chunks, case.question, method=FullPrefill())
    cache, last = prompt.past_key_values, len(truth.ids) - 1
    assert isinstance(cache, FusedCache)
    rows = torch.arange(last % 2, last + 1, 2, device=truth.ids.device)
    logits = recompute(bench.engine.decoder, cache, truth.ids, rows)
    cache.set_length(len(truth.ids))
    prompt.logits = logits
    return Gate("scattered tokens are exact", _compare(prompt, truth), limit, "every second token computed again")


def _first_layer(bench: Bench, case: Case, chunks: list[Chunk], truth: _Truth, limit: float) -> Gate:
    """Layer 0's keys depend on token and position alone, so turning them must give what is computed in place."""
    prompt = bench.engine.fuse(chunks, case.question, method=Reuse())
    error = _error([prompt.past_key_values.layers[0].keys[0]], truth.found[1:2])
    return Gate("layer-0 keys rotated = computed there", error, limit, f"{len(chunks)} chunks read alone and moved")


def _in_place(bench: Bench, case: Case, chunks: list[Chunk], limit: float) -> Gate:
    prompt = bench.engine.fuse(chunks, case.question, method=Reuse())
    truth = _own_prefill(bench.engine, prompt.input_ids[0])
    note = f"a document of {len(chunks)} chunks, nothing recomputed"
    return Gate("a chunk where it was made = full prefill", _compare(prompt, truth), limit, note)
