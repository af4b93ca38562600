"""Fixed shapes and CUDA graphs, on and off: time to first token by method, and a token of an answer; a random model.

Chunks come from the GPU tier. What the first prompts of a length take, which run as they are and are captured, is written beside.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from bench_ttft import METHODS, QUESTION, ids_of, model_of, token_bytes
from measure import Bench
from transformers import PreTrainedModel

import ragkv

ANSWER = 64
WARM = 3  # prompts of a method until all of its steps are graphs: as they are, captured, replayed


def run(bench: Bench) -> None:
    """At several lengths."""
    model = model_of(bench)
    for tokens in bench.lengths(128, 4096, 16384):
        logits: dict[str, torch.Tensor] = {}
        said: list[int] = []
        for graphs in (False, True):
            _prompts(bench, model, tokens, graphs, logits, said)
            gc.collect()  # its pool and its rooms go before the next ones come
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()


def _prompts(
    bench: Bench, model: PreTrainedModel, tokens: int, graphs: bool, logits: dict[str, torch.Tensor], said: list[int]
) -> None:
    size, room = 32 if bench.tiny else 512, 3 * tokens * token_bytes(bench, model) // 2
    tier = 0 if bench.device.type == "cpu" else room
    store = ragkv.TieredStore(gpu_bytes=tier, cpu_bytes=room, device=bench.device)
    template = ragkv.PromptTemplate(prefix=[1, 2, 3, 4])
    engine = ragkv.Engine(
        model,
        store=store,
        template=template,
        method=ragkv.Reuse(),
        sensitivity=True,
        foreign=ids_of(size, 20_000),
        kernels=bench.impl,
        graphs=graphs,
    )
    chunks = engine.add([ids_of(size, seed) for seed in range(tokens // size)])
    question = ids_of(QUESTION, 10_000)
    engine.fuse(chunks, question)  # the first use moves chunks to their tier
    for name, method in METHODS.items():
        call = lambda m=method: engine.fuse(chunks, question, method=m)  # noqa: E731
        bench.peak()  # of those before it
        first = [_wall(bench, call) for _ in range(WARM)]
        seconds, prompt = bench.wall(call), call()
        peak = bench.peak()  # before what measures takes some
        row = {"method": name, "tokens": tokens, "graphs": graphs, "ran": prompt.report.ran, "seconds": seconds}
        if name in logits:
            row["logits_apart"] = float((prompt.logits.float().cpu() - logits[name]).abs().max())
        logits.setdefault(name, prompt.logits.float().cpu())
        bench.write(
            benchmark="graphs",
            **row,
            host_seconds=bench.host(call),
            device_seconds=bench.seconds(call, min(2, bench.rounds)),
            first_seconds=first,
            attention=prompt.report.attention,
            peak_bytes=peak,
        )
        del prompt
    _answers(bench, engine, chunks, question, tokens, graphs, said)
    engine.close()


def _answers(
    bench: Bench,
    engine: ragkv.Engine,
    chunks: list[ragkv.Chunk],
    question: list[int],
    tokens: int,
    graphs: bool,
    said: list[int],
) -> None:
    """Seconds a token behind the first, of whole answers."""
    count = 8 if bench.tiny else ANSWER
    ask = lambda: engine.generate(chunks, question, max_new_tokens=count, eos_token_id=None)  # noqa: E731
    answers = [ask() for _ in range(1 + min(3, bench.rounds))][1:]
    seconds = [answer.report.decode_ms / 1e3 / (count - 1) for answer in answers]
    ids, ran = list(answers[-1].token_ids), answers[-1].report.ran
    agreed = sum(a == b for a, b in zip(ids, said, strict=False)) / count if said else 1.0
    said[:] = said or ids
    bench.write(
        benchmark="decode graphs",
        tokens=tokens,
        graphs=graphs,
        ran=ran,
        seconds=seconds,
        tokens_per_s=1 / statistics.median(seconds),
        same_tokens=agreed,
    )


def _wall(bench: Bench, call: Callable[[], object]) -> float:
    bench.sync()
    begin = time.perf_counter()
    call()
    bench.sync()
    return time.perf_counter() - begin
