"""Time to first token and decode speed on a Qwen2-shaped random model, beside full prefill and beside the limit.

    python benchmarks/ttft.py --json benchmarks/results/ttft-cpu.json

Methods are run in turn, a round after the other, so that a machine whose speed drifts slows all of them alike; ratios are taken
round by round and their medians reported. KV are read from LMDB (no CPU tier) with a warm page cache. The limit of a method is
the model's own forward on as many tokens as the method recomputes in each layer, over a ready cache, with nothing else: no load, no
rotation, no selection.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from datetime import date
from typing import Any

import torch
import transformers
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import ragkv
from ragkv.machine import processor
from ragkv.testing import as_cache

SHAPE = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 32000,
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--piece-tokens", type=int, default=512, help="tokens that one forward computes at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--json", help="write all raw figures to this file")
    return parser.parse_args(argv)


def timed(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Limit:
    """The model's own forward on a method's tokens, layer by layer as many as the method computes.

    The rows of every layer are those that the method really chose, so that attention over the longer context is counted. Keys and
    values of all other tokens lie ready in a plain tensor.
    """

    def __init__(self, engine: ragkv.Engine, prompt: ragkv.FusedPrompt):
        self.model, self.ids, self.last = engine.model, prompt.input_ids[0], prompt.recomputed
        self.kv = [(layer.keys, layer.values) for layer in prompt.past_key_values.layers]
        fresh = prompt.report.fresh_by_layer
        narrowed = fresh[0] > fresh[-1]  # as CacheBlend does, from all tokens
        self.rows = torch.arange(len(self.ids)) if narrowed else self.last
        # A check layer is run on all tokens for its keys and values only; the rest of it on those that were kept.
        self.checks = {fresh.index(fresh[-1]) - 1} if narrowed else set()

    @torch.no_grad()
    def __call__(self) -> None:
        model = self.model.model
        ids, rows = self.ids, self.rows
        hidden = model.embed_tokens(ids[rows][None])
        rope = model.rotary_emb(hidden, position_ids=rows[None])
        mask = self._mask(rows)
        for number, layer in enumerate(model.layers):
            if number in self.checks:
                self._keys_and_values(layer, hidden)
                keep = torch.isin(rows, self.last)
                hidden, rows = hidden[:, keep], rows[keep]
                rope, mask = (rope[0][:, keep], rope[1][:, keep]), self._mask(rows)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rope,
                **as_cache(_Ready(self.kv[number], rows, len(ids))),
            )
        self.model.lm_head(model.norm(hidden[:, -1:]))

    def _mask(self, rows):
        total = len(self.ids)
        return None if len(rows) == total else (torch.arange(total)[None, :] <= rows[:, None])[None, None]

    @staticmethod
    def _keys_and_values(layer, hidden) -> None:
        normed = layer.input_layernorm(hidden)
        layer.self_attn.q_proj(normed)
        layer.self_attn.k_proj(normed)
        layer.self_attn.v_proj(normed)


class _Ready:
    """A cache for one layer: what is computed is written, all is shown."""

    def __init__(self, kv, rows, total):
        self.kv, self.rows, self.total = kv, rows, total

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if len(self.rows) == self.total:
            return keys, values
        self.kv[0].index_copy_(2, self.rows, keys)
        self.kv[1].index_copy_(2, self.rows, values)
        return self.kv


def measure(args: argparse.Namespace) -> dict:
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen2Config(**{**SHAPE, "num_hidden_layers": args.layers}, max_position_embeddings=8192)
    model = Qwen2ForCausalLM(config).eval()
    random = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(10, SHAPE["vocab_size"], (count,), generator=random).tolist()

    question = ids(args.question_tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = ragkv.TieredStore(folder, cpu_bytes=0)
        template = ragkv.PromptTemplate(prefix=[1, 2, 3, 4])
        engine = ragkv.Engine(model, store=store, template=template, piece_tokens=args.piece_tokens)
        chunks = engine.add([ids(args.chunk_tokens) for _ in range(args.chunks)])
        methods = {
            "reuse": ragkv.Reuse(),
            "relevant_tokens_0.1": ragkv.RelevantTokens(ratio=0.1),
            "sensitive_tokens_0.1": ragkv.SensitiveTokens(ratio=0.1),
            "lego_link_16": ragkv.LegoLink(k=16),
            "cache_blend_0.15": ragkv.CacheBlend(ratio=0.15),
        }
        times = _rounds(args, engine, chunks, question, methods)
        peak = _peak(engine, chunks, question, methods)
        decode = _decode(engine, chunks, question, args.rounds)
        engine.close()
    return {"conditions": _conditions(args), "seconds": times, "peak": peak, "decode": decode}


def _rounds(args, engine, chunks, question, methods) -> dict[str, list[float]]:
    runs: dict[str, Any] = {}
    for name, method in methods.items():
        prompt = engine.fuse(chunks, question, method=method)
        runs.setdefault("full_prefill", lambda ids=prompt.input_ids: _full(engine.model, ids))
        runs[name] = lambda method=method: engine.fuse(chunks, question, method=method)
        runs[f"{name} limit"] = Limit(engine, prompt)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            seconds = timed(run)
            if number:  # the first round warms up
                times[name].append(seconds)
            print(f"round {number} {name:24s} {seconds * 1e3:9.1f} ms", file=sys.stderr)
    return times


@torch.no_grad()
def _full(model, ids) -> None:
    model(input_ids=ids, use_cache=True, **as_cache(DynamicCache()), logits_to_keep=1)


class _Peak:
    """The most resident memory of this process while a block runs, above what it was before, in bytes."""

    def __enter__(self) -> _Peak:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc: freed memory would hide what is taken next
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before, self.most, self.done = _resident(), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.most = max(self.most, _resident())

    def __exit__(self, *exc) -> None:
        self.most = max(self.most, _resident())
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.most - self.before


def _resident() -> int:
    """Anonymous memory only: pages of the store's file that are mapped belong to the page cache."""
    with open("/proc/self/status", errors="replace") as status:
        return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024


def _peak(engine, chunks, question, methods) -> dict[str, float]:
    """Peak memory while fusing, as a multiple of the prompt's KV."""
    ratios = {}
    for name, method in {**methods, "full_prefill": ragkv.FullPrefill()}.items():
        with _Peak() as peak:
            prompt = engine.fuse(chunks, question, method=method)
        kv = sum(
            t.numel() * t.element_size() for layer in prompt.past_key_values.layers for t in (layer.keys, layer.values)
        )
        ratios[name] = peak.bytes / kv
        del prompt
    return ratios


@torch.no_grad()
def _decode(engine, chunks, question, rounds: int, steps: int = 8) -> dict[str, list[float]]:
    """Seconds of one decode step over the fused cache, and over transformers' DynamicCache, in turn."""
    model = engine.model
    prompt = engine.fuse(chunks, question, method=ragkv.Reuse(), room_tokens=1024)
    plain = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in prompt.past_key_values.layers])
    token = torch.tensor([[5]])
    times: dict[str, list[float]] = {"ragkv": [], "transformers": []}
    for number in range(rounds * steps):
        for name, cache in (("ragkv", prompt.past_key_values), ("transformers", plain)):
            seconds = timed(lambda cache=cache: model(input_ids=token, **as_cache(cache)))
            if number >= 2:
                times[name].append(seconds)
    return times


def _conditions(args: argparse.Namespace) -> dict:
    return {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ragkv": ragkv.__version__,
        "model": {**SHAPE, "num_hidden_layers": args.layers, "dtype": "float32", "weights": "random"},
        "chunks": args.chunks,
        "chunk_tokens": args.chunk_tokens,
        "question_tokens": args.question_tokens,
        "piece_tokens": args.piece_tokens,
        "rounds": args.rounds,
        "peak_process_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def table(result: dict) -> str:
    """The figures that docs/methods.md shows."""
    times = result["seconds"]
    rows = [
        "| method | TTFT | faster than full prefill | over the limit | peak memory / prompt KV |",
        "|---|---|---|---|---|",
    ]
    full = times["full_prefill"]
    rows.append(f"| full prefill | {_ms(full)} | 1 | | {result['peak']['full_prefill']:.2f} |")
    for name in (n for n in times if f"{n} limit" in times):
        own, limit = times[name], times[f"{name} limit"]
        faster = statistics.median(f / o for f, o in zip(full, own, strict=True))
        over = statistics.median(o / b for o, b in zip(own, limit, strict=True))
        rows.append(f"| {name} | {_ms(own)} | {faster:.1f} | {over:.2f} | {result['peak'][name]:.2f} |")
    ours, theirs = result["decode"]["ragkv"], result["decode"]["transformers"]
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    rows.append(
        f"\none decode step: {_ms(ours)}, with DynamicCache {_ms(theirs)}; ratio {ratio:.2f} (median of {len(ours)})"
    )
    return "\n".join(rows)


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f} ms"


def main() -> None:
    args = parse()
    result = measure(args)
    print(table(result))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
