"""One prompt under the glass: how far each token's stored KV are off, what the question looks at, what methods recompute.

L layers, N tokens of the prompt, H heads, S tokens of the suffix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ragkv.engine import Engine
from ragkv.evaluation.arms import CONTEXTS, Arm
from ragkv.evaluation.bench import REFUSALS, Bench, CaseChunks
from ragkv.evaluation.cases import Case
from ragkv.methods import FullPrefill, Reuse
from ragkv.model.attention import eager_attention
from ragkv.model.cache import cache_argument
from ragkv.report import FusedPrompt

#: Of each family and context, the arm is looked at that recomputes most within this share of the tokens.
_SHARE = 0.2


def look_at(bench: Bench, case: Case, arms: Sequence[Arm], charged: dict[str, float]) -> dict[str, Any]:
    """Look at the tokens of one case's prompt.

    Args:
        bench: the model.
        case: in its order.
        arms: one of each family and context is looked at.
        charged: budgets charged to arms for this case.

    Returns:
        Plain values: ``tokens`` (texts), ``chunks`` (first and last position of each), ``deviation`` by context, ``attention`` (or
        ``None`` where the model does not show it), ``recomputed`` (positions by arm).
    """
    reading = bench.read(case)
    chunks = reading.at(case.retrieved, "alone")
    full, _ = bench.fuse(chunks, case, FullPrefill())
    found: dict[str, Any] = {
        "case": case.id,
        "kind": case.kind,
        "question": case.question,
        "answers": list(case.answers),
        "tokens": _pieces(bench, full.input_ids[0].tolist()),
        "chunks": list(pairwise(accumulate(map(len, chunks), initial=full.report.prefix_tokens))),
        "gold": [case.retrieved.index(place) for place in case.gold if place in case.retrieved],
        "deviation": {},
        "recomputed": _recomputed(bench, case, reading, arms, charged),
    }
    for context in CONTEXTS:
        reused, _ = bench.fuse(reading.at(case.retrieved, context), case, Reuse())
        found["deviation"][context] = [round(value, 4) for value in deviation(reused, full).tolist()]
    attention = question_attention(bench.engine, full)
    found["attention"] = None if attention is None else [round(value, 6) for value in attention.tolist()]
    bench.forget(reading)
    return found


def deviation(prompt: FusedPrompt, truth: FusedPrompt) -> Tensor:
    """``[N]``: relative distance of a token's keys and values from the true ones, mean over keys, values and layers."""
    pairs = zip(prompt.past_key_values.layers, truth.past_key_values.layers, strict=True)
    both = [(a, b) for mine, true in pairs for a, b in ((mine.keys, true.keys), (mine.values, true.values))]
    apart = [(a - b).float()[0].norm(dim=(0, 2)) / b.float()[0].norm(dim=(0, 2)).clamp_min(1e-9) for a, b in both]
    return torch.stack([each.cpu() for each in apart]).mean(0)


@torch.no_grad()
def question_attention(engine: Engine, prompt: FusedPrompt) -> Tensor | None:
    """``[N]``: attention of the suffix's tokens to every position, mean over tokens, heads and layers.

    The suffix is run once more, over the prompt's keys and values, by eager attention. ``None`` where the model shows no weights.
    """
    start, ids = prompt.report.prefix_tokens + prompt.report.chunk_tokens, prompt.input_ids[0]
    cache, positions = prompt.past_key_values, torch.arange(start, len(ids), device=ids.device)
    cache.crop(start - len(ids))
    try:
        with eager_attention(engine.model, engine.decoder.config):
            out = engine.model(
                input_ids=ids[None, start:],
                position_ids=positions[None],
                use_cache=True,
                **{cache_argument(type(engine.model).forward): cache},
                output_attentions=True,
            )
    except (ValueError, NotImplementedError):
        return None
    weights = [layer for layer in (out.attentions or ()) if layer is not None and layer.shape[-1] == len(ids)]
    return torch.stack([layer[0].float().mean((0, 1)).cpu() for layer in weights]).mean(0) if weights else None


def _pieces(bench: Bench, ids: list[int]) -> list[str]:
    """Each token as it reads behind the one before it: alone, many a tokenizer drops the space in front."""
    decode = bench.tokenizer.decode
    pairs = [(ids[max(0, at - 1) : at], ids[max(0, at - 1) : at + 1]) for at in range(len(ids))]
    return [decode(both)[len(decode(before)) :] for before, both in pairs]


def _recomputed(
    bench: Bench, case: Case, reading: CaseChunks, arms: Sequence[Arm], charged: dict[str, float]
) -> dict[str, list[int]]:
    """Positions of chunk tokens computed in the last layer, one arm of each family and context."""
    most: dict[tuple[str, str], tuple[str, list[int]]] = {}
    for arm in arms:
        if arm.reads != "retrieved" or not arm.context or arm.like:
            continue
        try:
            chunks, method = reading.given(arm, case, charged)
            prompt, _ = bench.fuse(chunks, case, method, arm.rotated)
        except REFUSALS:
            continue
        first, tokens = prompt.report.prefix_tokens, prompt.report.chunk_tokens
        rows = [row for row in prompt.recomputed.tolist() if first <= row < first + tokens]
        series = (arm.family, arm.context)
        if 0 < len(rows) <= _SHARE * tokens and len(rows) > len(most.get(series, ("", []))[1]):
            most[series] = (arm.name, rows)
    return dict(most.values())
