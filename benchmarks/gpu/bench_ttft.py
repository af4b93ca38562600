"""(d) Time to first token of a random model of a known one's shape, by method and tier, beside its limit; (e) decode speed.

Targets of the 8B shape at 16K tokens, faster than full prefill: from the GPU tier Reuse 45 times, LegoLink(16) 20,
SensitiveTokens(0.1) 10, CacheBlend(0.15) 5; from int8 in CPU memory Reuse and LegoLink(16) 14. The limit is what the device takes
for as many tokens as the method computes: their forward alone, their attention over the prompt, the placed bytes over the copy
bandwidth; or, from CPU memory, for the bytes over the bus, where that is longer.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import Bench
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import ragkv
from ragkv.kernels import key_spans, selective_attention
from ragkv.testing import as_cache

_NAMES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
#: By the name that ``--shape`` takes: what makes the model, the sizes of these names, and its vocabulary.
SHAPES: dict[str, tuple[type[Any], type[Any], tuple[int, ...], int]] = {
    "8b": (LlamaConfig, LlamaForCausalLM, (32, 4096, 32, 8, 14336), 128256),
    "qwen-0.5b": (Qwen2Config, Qwen2ForCausalLM, (24, 896, 14, 2, 4864), 151936),
    "qwen-1.5b": (Qwen2Config, Qwen2ForCausalLM, (28, 1536, 12, 2, 8960), 151936),
}
TINY = ((2, 64, 4, 2, 96), 512)
METHODS = {
    "Reuse": ragkv.Reuse(),
    "LegoLink(16)": ragkv.LegoLink(k=16),
    "SensitiveTokens(0.1)": ragkv.SensitiveTokens(ratio=0.1),
    "RelevantTokens(0.1)": ragkv.RelevantTokens(ratio=0.1),
    "CacheBlend(0.15)": ragkv.CacheBlend(ratio=0.15),
}
#: What the CPU tier holds, where chunks come from there.
TIERS = {"gpu": "raw", "cpu": "raw", "cpu int8": "int8"}
QUESTION = 32


def run(bench: Bench) -> None:
    """At several lengths, from every tier."""
    model = model_of(bench)
    for tokens in bench.lengths(128, 4096, 16384, 32768):
        full = _full(bench, model, tokens)
        for tier in TIERS if bench.device.type != "cpu" else ("cpu", "cpu int8"):
            _methods(bench, model, tokens, tier, full)
            gc.collect()  # its pool goes before the next one comes


def model_of(bench: Bench) -> PreTrainedModel:
    torch.manual_seed(0)
    make_config, make_model, sizes, words = SHAPES[bench.shape]
    sizes, words = TINY if bench.tiny else (sizes, words)
    config = make_config(**dict(zip(_NAMES, sizes, strict=True)), vocab_size=words, max_position_embeddings=65536)
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            model = make_model(config).eval()
    finally:
        torch.set_default_dtype(before)
    return model


def token_bytes(bench: Bench, model: PreTrainedModel) -> int:
    """What the keys and values of one token take."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * bench.dtype.itemsize


def ids_of(count: int, seed: int) -> list[int]:
    return torch.randint(10, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def _full(bench: Bench, model: PreTrainedModel, tokens: int) -> float:
    """Median seconds of the model's own prefill."""
    ids = torch.tensor([ids_of(tokens + QUESTION, 0)], device=bench.device)
    seconds = bench.wall(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))
    bench.write(benchmark="ttft", method="full prefill", tokens=tokens, seconds=seconds)
    return statistics.median(seconds)


def _methods(bench: Bench, model: PreTrainedModel, tokens: int, tier: str, full: float) -> None:
    size = 32 if bench.tiny else 512
    room = 3 * tokens * token_bytes(bench, model) // 2
    store = ragkv.TieredStore(
        gpu_bytes=room if tier == "gpu" else 0, cpu_bytes=room, cpu_codec=TIERS[tier], device=bench.device
    )
    template = ragkv.PromptTemplate(prefix=[1, 2, 3, 4])
    engine = ragkv.Engine(model, store=store, template=template, foreign=ids_of(size, 20_000))
    chunks = engine.add([ids_of(size, seed) for seed in range(tokens // size)])
    question = ids_of(QUESTION, 10_000)
    for name, method in METHODS.items():
        call = lambda m=method: engine.fuse(chunks, question, method=m)  # noqa: E731
        call()  # the first use moves chunks to their tier
        seconds, busy = bench.wall(call), bench.seconds(call, min(3, bench.rounds))
        prompt, stages = _stages(bench, call)
        limit = _limit(bench, model, prompt, tier)
        report = prompt.report
        bench.write(
            benchmark="ttft",
            method=name,
            tokens=tokens,
            tier=tier,
            hits=report.hits,
            attention=report.attention,
            kernels=report.kernels,
            piece_tokens=engine.piece_tokens,
            seconds=seconds,
            device_seconds=busy,
            limit_seconds=limit,
            faster_than_full=full / statistics.median(seconds),
            over_limit=statistics.median(seconds) / limit,
            stages_ms=stages,
            fresh_by_layer=report.fresh_by_layer,
        )
    _decode(bench, model, prompt, tokens, tier)
    engine.close()


def _stages(bench: Bench, call: Callable[[], ragkv.FusedPrompt]) -> tuple[ragkv.FusedPrompt, dict[str, float]]:
    """A prompt, and where its time goes, by the report's events in the device's stream."""
    prompt = call()
    bench.sync()
    spent = prompt.report.milliseconds
    return prompt, {
        "place": spent["place"],
        "select": spent["select"],
        "recompute and first token": spent["total"] - spent["place"] - spent["select"],
        "total": spent["total"],
    }


@torch.no_grad()
def _limit(bench: Bench, model: PreTrainedModel, prompt: ragkv.FusedPrompt, tier: str) -> float:
    """Seconds that the device takes at least for the method's own work, where all else goes beside it."""
    fresh = prompt.report.fresh_by_layer
    count = max(1, round(sum(fresh) / len(fresh)) + prompt.report.suffix_tokens)
    ids = prompt.input_ids[:, :count]
    forward = statistics.median(bench.seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), 3))
    forward += _attention(bench, model, count, prompt.input_ids.shape[1])
    layers: Any = prompt.past_key_values.layers
    stored = 0.5 if TIERS[tier] == "int8" else 1.0  # of the bytes that are placed
    size = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))
    placing = (1 + stored) * size / bench.copy_bandwidth
    return max(forward + placing, stored * size / bench.bus_bandwidth if tier != "gpu" else 0.0)


def _attention(bench: Bench, model: PreTrainedModel, queries: int, keys: int) -> float:
    """Seconds of all layers' attention of so many tokens, spread over a prompt."""
    config, rows = model.config, torch.linspace(0, keys - 1, queries, device=bench.device).long()
    size = config.hidden_size // config.num_attention_heads
    query, key = (
        bench.random(*shape, size)
        for shape in ((config.num_attention_heads, queries), (config.num_key_value_heads, keys))
    )
    call = partial(selective_attention, query, key, key, key_spans(rows), impl=bench.impl)
    return config.num_hidden_layers * statistics.median(bench.seconds(call, 3))


@torch.no_grad()
def _decode(bench: Bench, model: PreTrainedModel, prompt: ragkv.FusedPrompt, tokens: int, tier: str) -> None:
    """(e) tokens per second over the fused cache, and over transformers' own."""
    cache: Any = prompt.past_key_values
    plain = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])
    token = torch.tensor([[5]], device=bench.device)
    for name, kept in (("ragkv", cache), ("transformers", plain)):
        seconds = bench.wall(lambda kept=kept: model(input_ids=token, **as_cache(kept)))  # type: ignore[misc]
        rate = 1 / statistics.median(seconds)
        bench.write(benchmark="decode", cache=name, tokens=tokens, tier=tier, seconds=seconds, tokens_per_s=rate)
