"""How near to a full prefill any choice of tokens comes: the default beside one that knows what it cannot know.

    python -P benchmarks/ceiling.py --model PATH --data FILE [--dtype bfloat16] [--cases 20] [--skip 60] [--json FILE]

`knowing` runs the full prefill first, and takes the tokens whose values it changes most, each weighted by the attention that the
question then pays to it, layer by layer. `looking twice` is the default in two halves: it looks at the question's attention again
once the first half is computed. KL of the first token to the full prefill, in nats; cases whose chunks do not fit are left out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ragkv import FullPrefill, FusedPrompt, Method, Reuse
from ragkv.closeness import divergence
from ragkv.evaluation import Bench, read_cases
from ragkv.evaluation.cases import Case, usable
from ragkv.evaluation.statistics import Resampling, difference
from ragkv.fusion.layout import Layout
from ragkv.fusion.view import View
from ragkv.machine import machine
from ragkv.methods.base import highest
from ragkv.model.loading import load_model
from ragkv.testing import as_cache

INSTRUCTION = "Only give me the answer and do not output any other words."
RATIOS = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class These(Method):
    """Computes what it is told."""

    tokens: tuple[int, ...]

    def select(self, view: View) -> Tensor:
        """The tokens."""
        return torch.tensor(self.tokens, device=view.layout.ids.device)


class Look(Method):
    """Computes nothing, and keeps what can be seen of the prompt."""

    needs_sensitivity = True

    def __init__(self) -> None:
        self.layout: Layout | None = None

    def select(self, view: View) -> Tensor:
        """Nothing."""
        self.layout, self.changes = view.layout, view.sensitivity.clamp_min(0).sqrt()
        return view.layout.reusable[:0]


@torch.no_grad()
def attention(model: PreTrainedModel, prompt: FusedPrompt, layout: Layout) -> Tensor:
    """``[L, R]`` the question's attention over a prompt's KV, the mean of heads; its last token counts as much as all of it."""
    cache = DynamicCache()
    for number, layer in enumerate(prompt.past_key_values.layers):
        keys, values = (each[:, :, : layout.suffix_start].clone() for each in (layer.keys, layer.values))
        cache.update(keys, values, number)
    kept = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(
            prompt.input_ids[:, layout.suffix_start :],
            **as_cache(cache),
            position_ids=layout.suffix[None],
            output_attentions=True,
        )
    finally:
        model.set_attn_implementation(kept)
    heads = [each[0].float().mean(0) for each in out.attentions]
    return torch.stack([(each.mean(0) + each[-1]) / 2 for each in heads])[:, layout.chunks_start : layout.suffix_start]


def asked(bench: Bench, case: Case) -> dict[str, float]:
    """KL by arm."""
    reading = bench.read(case)
    chunks, model = reading.at(case.retrieved, "document"), bench.engine.model

    def fuse(method: Method) -> FusedPrompt:
        return bench.engine.fuse(chunks, case.question, method=method)

    look = Look()
    full, stored = fuse(FullPrefill()), fuse(look)
    layout = look.layout
    assert layout is not None
    span = slice(layout.chunks_start, layout.suffix_start)
    layers = zip(full.past_key_values.layers, stored.past_key_values.layers, strict=True)
    changed = [(true.values[0, :, span].float() - held.values[0, :, span].float()).square() for true, held in layers]
    known = (attention(model, full, layout) * torch.stack([each.sum((0, 2)).sqrt() for each in changed])).mean(0)
    seen = attention(model, stored, layout).mean(0) * look.changes

    def chosen(scores: Tensor, ratio: float, among: Tensor = layout.inexact) -> list[int]:
        return highest(scores, among, ratio, layout).sort().values.tolist()

    def loss(tokens: list[int]) -> float:
        return divergence(full.logits, fuse(These(tuple(tokens))).logits)

    result = {"reuse": divergence(full.logits, fuse(Reuse()).logits)}
    for ratio in RATIOS:
        result[f"default {ratio}"] = loss(chosen(seen, ratio))
        half = chosen(seen, ratio / 2)
        again = attention(model, fuse(These(tuple(half))), layout).mean(0) * look.changes
        rest = layout.inexact[~torch.isin(layout.inexact, torch.tensor(half))]
        result[f"looking twice {ratio}"] = loss(sorted([*half, *chosen(again, ratio / 2, rest)]))
        result[f"knowing {ratio}"] = loss(chosen(known, ratio))
    bench.forget(reading)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="How near any choice of tokens comes to a full prefill.")
    parser.add_argument("--model", required=True, help="name or path of a transformers decoder with a chat template")
    parser.add_argument("--data", type=Path, required=True, help="as for ragkv eval")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0, help="cases in front of those")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    model, tokenizer, template, foreign, *_ = load_model(args.model, None, {"dtype": args.dtype})
    bench = Bench(model, tokenizer, template, max_new_tokens=0, instruction=INSTRUCTION, foreign=foreign)
    kept = [case for case in usable(read_cases(args.data)[1])[0] if not bench.unfit(case)]
    by_case: dict[str, dict[str, float]] = {}
    for case in kept[args.skip : args.skip + args.cases]:
        by_case[case.id] = asked(bench, case)
        print(case.id, {name: round(value, 3) for name, value in by_case[case.id].items()}, flush=True)
    figures = summed(by_case)
    for name, figure in figures.items():
        print(f"{name}: " + ", ".join(f"{value:.3f}" for value in figure["kl"][:3]))
    if args.json:
        about: dict[str, Any] = {"data": args.data.name, "dtype": args.dtype, "machine": machine(model.device)}
        args.json.write_text(json.dumps({**about, "cases": len(by_case), "arms": figures}, indent=1) + "\n")


def summed(by_case: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Means with 95 % intervals, and how much more than `knowing` at the same share."""
    resampling = Resampling(list(by_case), seed=0)

    def values(name: str) -> dict[str, list[float]]:
        return {case: [held[name]] for case, held in by_case.items()}

    figures: dict[str, dict[str, Any]] = {}
    for name in next(iter(by_case.values()), {}):
        figures[name] = {"kl": resampling.estimate(values(name))}
        best = f"knowing {name.rpartition(' ')[2]}"
        if best != name and name != "reuse":
            figures[name]["more than knowing"] = resampling.estimate(difference(values(name), values(best)))
    return figures


if __name__ == "__main__":
    main()
