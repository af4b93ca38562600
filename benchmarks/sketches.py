"""Whether a sketch of chunks' keys tells what a question needs (InfiniGen, arXiv:2406.19707), before their KV are loaded.

    python -P benchmarks/sketches.py --model PATH --data FILE [--layerwise] [--cases N] [--dtype bfloat16] [--json FILE]

A chunk's sketch are the keys of some layers, of each key head the pairs of channels that weigh most (the product of the mean
squares of queries and keys, over the first cases, which are not counted), in four bits. The question's queries are those that it
has behind the prefix alone, at its place in the prompt. Attention as in `ragkv.RelevantTokens`: half of it the last token's.

A share of all passages' KV is loaded: whole passages, those of the highest attention to a token first; or groups of 16 tokens,
the others left out where they stood. Compared at equal bytes with the retriever's order (the offline embedder's), with what the
model itself attends to when all is placed, and with chance. Sketches load 0.1 to 1 % of a chunk's KV more.

With `--layerwise` groups are chosen in each layer, as the paper does, by the queries that the question has there, behind what was
loaded of the layers before: sketches of all layers, 3.1 % of KV more, and as many round trips as layers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import ragkv
from ragkv.closeness import divergence, same_top
from ragkv.evaluation.cases import Case
from ragkv.evaluation.formats import read_cases
from ragkv.evaluation.statistics import Resampling, difference
from ragkv.fusion.view import Selection, View
from ragkv.retrieval import offline_embedder
from ragkv.testing import as_cache

INSTRUCTION = "Only give me the answer and do not output any other words."
SHARES = (0.75, 0.5, 0.3)
GROUP = 16
CALIBRATION = 3
#: Layers, as shares of the depth, and channels of a key head.
SKETCHES = {
    "keys of all layers": ([index / 24 for index in range(24)], None),
    "8 layers, 16 channels": ([(1 + 3 * index) / 24 for index in range(8)], 16),
    "2 layers, 8 channels": ([0.58, 0.75], 8),
}


#: Channels of a key head, of all layers.
LAYERWISE = {"all channels": None, "16 channels": 16}


@dataclass(frozen=True)
class Looks(ragkv.QuestionAware):
    """Recomputes nothing, and keeps the question's attention to each token ``[R]``."""

    seen: Any = None

    def select(self, view: View) -> Selection:
        self.seen.append(view.attention("both").mean(0).float())
        return Selection(view.layout.reusable[:0])


class Study:
    """One model's. Its attention must have ``q_proj``, and rotate halves, as Llama's and Qwen2's."""

    def __init__(self, path: str, dtype: str) -> None:
        self.rag = ragkv.RAG.from_pretrained(path, dtype=dtype, method="reuse")
        self.engine, self.model = self.rag.engine, self.rag.engine.model
        config = self.model.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.layers = config.num_hidden_layers
        self.weights: list[Tensor] = [torch.zeros(self.key_heads, self.dim // 2) for _ in range(self.layers)]

    def queries(self, ids: Tensor, prefix: int, positions: Tensor) -> list[Tensor]:
        """Of the question ``[heads, S, D]`` in each layer, behind the prefix alone."""
        caught: list[Tensor] = []
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(lambda module, given, answer: caught.append(answer[0]))
            for layer in self.model.model.layers
        ]
        try:
            with torch.inference_mode():
                hidden = self.model.model(input_ids=ids[None], position_ids=positions[None], use_cache=False)
                cos, sin = self.model.model.rotary_emb(hidden.last_hidden_state, positions[None])
        finally:
            for hook in hooks:
                hook.remove()
        turned = []
        for each in caught:
            query = each.view(len(ids), self.heads, self.dim).transpose(0, 1)
            halves = torch.cat((-query[..., self.dim // 2 :], query[..., : self.dim // 2]), -1)
            turned.append((query * cos[0] + halves * sin[0])[:, prefix:].float())
        return turned

    def sketched(self, layer: int, query: Tensor, key: Tensor, channels: int | None, sizes: Sequence[int]) -> Tensor:
        """Attention ``[T]`` of a question's queries to keys, by their sketch."""
        shared = self.heads // self.key_heads
        query = query.reshape(self.key_heads, shared, -1, self.dim)
        if channels is not None:
            pairs = self.weights[layer].topk(channels // 2, dim=-1).indices
            chosen = torch.cat((pairs, pairs + self.dim // 2), -1)
            key = in_four_bits(key.gather(-1, chosen[:, None].expand(-1, key.shape[1], -1)), sizes)
            query = query.gather(-1, chosen[:, None, None].expand(-1, shared, query.shape[2], -1))
        weights = (query @ key[:, None].transpose(-1, -2) * self.dim**-0.5).softmax(-1).mean((0, 1))
        return (weights.mean(0) + weights[-1]) / 2

    def layerwise(
        self, whole: ragkv.FusedPrompt, every: Tensor, channels: int | None, sizes: Sequence[int], share: float
    ) -> Tensor:
        """Next-token logits where each layer sees only the groups of tokens that its sketch chooses."""
        groups, start, suffix = of_groups(sizes), int(every[0]), int(every[-1]) + 1

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *given: Any, **options: Any
        ) -> tuple[Tensor, None]:
            query, key, value = query[0].float(), key[0].float(), value[0].float()
            tokens = self.sketched(module.layer_idx, query, key[:, start:suffix], channels, sizes)
            kept = best([float(part.mean()) for part in tokens.split(groups)], groups, share)
            seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
            seen[:, start:suffix] = torch.cat(
                [torch.full((size,), number in kept) for number, size in enumerate(groups)]
            )
            key, value = (each.repeat_interleave(self.heads // self.key_heads, 0) for each in (key, value))
            weights = (query @ key.transpose(-1, -2) * self.dim**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            return (weights @ value).transpose(0, 1)[None].to(self.model.dtype), None

        AttentionInterface.register("sketched", attention)
        AttentionMaskInterface.register("sketched", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        before, self.model.config._attn_implementation = self.model.config._attn_implementation, "sketched"
        try:
            return self.without(whole, every, every)
        finally:
            self.model.config._attn_implementation = before

    def without(self, whole: ragkv.FusedPrompt, every: Tensor, slots: Tensor) -> Tensor:
        """Next-token logits of a prompt of whose chunks, every slot of which is given, only some tokens are there."""
        ids, suffix = whole.input_ids[0], int(every[-1]) + 1
        held = torch.cat((torch.arange(int(every[0])), slots))
        cache = DynamicCache()
        for number, layer in enumerate(whole.past_key_values.layers):
            cache.update(layer.keys[:, :, held].contiguous(), layer.values[:, :, held].contiguous(), number)
        with torch.inference_mode():
            answer = self.model(
                input_ids=ids[None, suffix:],
                position_ids=torch.arange(suffix, len(ids))[None],
                cache_position=torch.arange(len(held), len(held) + len(ids) - suffix),
                **as_cache(cache),
                logits_to_keep=1,
            )
        return answer.logits[0, -1]

    def calibrate(self, queries: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        """Adds a case to what says which pairs of channels weigh most."""
        half = self.dim // 2
        for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
            asked = query.reshape(self.key_heads, -1, self.dim).square().mean(1)
            held = key.square().mean(1)
            self.weights[layer] += (asked[:, :half] + asked[:, half:]) * (held[:, :half] + held[:, half:])


def in_four_bits(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """Keys ``[H, T, C]`` as they come back from 16 steps for each chunk and channel."""
    parts = []
    for part in keys.split(list(sizes), 1):
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = (high - low).clamp_min(1e-6) / 15
        parts.append(((part - low) / step).round() * step + low)
    return torch.cat(parts, 1)


def of_groups(sizes: Sequence[int]) -> list[int]:
    """Tokens of each group; none holds tokens of two chunks."""
    return [min(GROUP, size - at) for size in sizes for at in range(0, size, GROUP)]


def best(scores: Sequence[float], sizes: Sequence[int], share: float) -> list[int]:
    """Numbers of the highest that fit into a share of all, ascending."""
    room, kept = share * sum(sizes), list[int]()
    for number in sorted(range(len(scores)), key=lambda number: -scores[number]):
        if sizes[number] <= room:
            kept.append(number)
            room -= sizes[number]
    return sorted(kept)


def asked(
    study: Study, case: Case, embedder: Any, number: int, layerwise: bool
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Rows of one case: who chose, how many, and what came of it; none of a case that calibrates."""
    texts = [case.text(place) for place in case.retrieved]
    chunks = [study.engine.add_document([text])[0] for text in texts]
    question, attention = f"{INSTRUCTION}\n{case.question}", list[Tensor]()
    whole = study.engine.fuse(chunks, question, method=Looks(seen=attention))
    ids, sizes = whole.input_ids[0], [len(chunk) for chunk in chunks]
    reused = attention[0]
    start, suffix = len(ids) - whole.report.suffix_tokens - sum(sizes), len(ids) - whole.report.suffix_tokens
    keys = [layer.keys[0, :, start:suffix].float() for layer in whole.past_key_values.layers]
    positions = torch.cat((torch.arange(start), torch.arange(suffix, len(ids))))
    queries = study.queries(torch.cat((ids[:start], ids[suffix:])), start, positions)
    if number < CALIBRATION:
        study.calibrate(queries, keys)
        return

    seen: dict[str, Tensor] = {} if layerwise else {"the model's attention": reused}
    for name, (shares, channels) in ({} if layerwise else SKETCHES).items():
        layers = [min(study.layers - 1, round(share * study.layers)) for share in shares]
        by_layer = [study.sketched(layer, queries[layer], keys[layer], channels, sizes) for layer in layers]
        seen[name] = torch.stack(by_layer).mean(0)
    query = embedder.encode_query(case.question)
    near = [float(each @ query) for each in embedder.encode_documents(texts)]
    drawn = [random.Random(f"{case.id}/{index}").random() for index in range(len(texts))]
    full = None if layerwise else study.engine.fuse(chunks, question, method="full-prefill").logits[0]
    gold = {index for index, place in enumerate(case.retrieved) if place in case.gold}

    def row(logits: Tensor, slots: Tensor | None = None) -> dict[str, float]:
        found = {"kl_reuse": divergence(whole.logits[0], logits), "top1": same_top(whole.logits[0], logits)}
        if full is not None:
            found["kl_full"] = divergence(full, logits)
        if slots is not None:
            found["mass"] = float(reused[slots - start].sum() / reused.sum())
            found["tokens"] = len(slots) / sum(sizes)
        return found

    every = torch.arange(start, suffix)
    yield "all", 1.0, row(study.without(whole, every, every), every)
    parts = of_groups(sizes)
    for share in SHARES:
        for name, count in LAYERWISE.items() if layerwise else ():
            yield f"groups of each layer: {name}", share, row(study.layerwise(whole, every, count, sizes, share))
        ranked: dict[str, list[float] | Tensor] = {
            "retriever": near,
            **({} if layerwise else {"chance": drawn}),
            **seen,
        }
        for name, tokens in ranked.items():
            each = tokens if isinstance(tokens, list) else [float(part.mean()) for part in tokens.split(sizes)]
            kept = best(each, sizes, share)
            slots = torch.cat([every[:0], *[every.split(sizes)[index] for index in kept]])
            logits = study.engine.fuse([chunks[index] for index in kept], question, method="reuse").logits[0]
            found = row(logits, slots)
            yield f"passages: {name}", share, found | {"gold": len(gold & set(kept)) / max(1, len(gold))}
            if isinstance(tokens, list):
                continue
            kept = best([float(part.mean()) for part in tokens.split(parts)], parts, share)
            slots = torch.cat([every.split(parts)[index] for index in kept])
            yield f"groups: {name}", share, row(study.without(whole, every, slots), slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="questions with the passages retrieved for them, as HotpotQA's"
    )
    parser.add_argument("--layerwise", action="store_true", help="choose in each layer, in place of once")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(0)
    study, embedder, begin = Study(args.model, args.dtype), offline_embedder(), perf_counter()
    rows: dict[tuple[str, float], list[dict[str, float]]] = defaultdict(list)
    cases = read_cases(args.data)[1][: args.cases + CALIBRATION]
    done = 0
    for number, case in enumerate(cases):
        if perf_counter() - begin > args.time_limit:
            break
        for name, count, row in asked(study, case, embedder, number, args.layerwise):
            rows[name, count].append(row)
        done = number + 1 - CALIBRATION
        print(f"{done} {perf_counter() - begin:.0f} s", flush=True)
    result = summed({f"{name}, {share}": held for (name, share), held in rows.items()})
    for name, figures in result.items():
        print(f"{name:46s} " + "  ".join(f"{metric} {value[0]:.3f}" for metric, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps({"cases": done, "rows": result}, indent=1) + "\n")


def summed(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Means with their intervals (95 %), also of how much more KL there is than by the retriever's order at equal bytes."""
    cases = [str(number) for number in range(max(map(len, rows.values())))]
    resampling = Resampling(cases, seed=0)

    def values(name: str, metric: str) -> dict[str, list[float]]:
        return {case: [row[metric]] for case, row in zip(cases, rows[name], strict=True)}

    result: dict[str, dict[str, list[float]]] = {}
    for name, held in rows.items():
        found = {metric: resampling.estimate(values(name, metric)) for metric in held[0]}
        other = f"passages: retriever, {name.rpartition(', ')[2]}"
        if other in rows and other != name:
            less = difference(values(name, "kl_reuse"), values(other, "kl_reuse"))
            found["kl_reuse less retriever"] = resampling.estimate(less)
        result[name] = {what: [round(float(each), 4) for each in e[:3]] for what, e in found.items() if e is not None}
    return result


if __name__ == "__main__":
    main()
