"""What keeping what prompts compute is worth, on a stream of questions over a corpus twice the cache.

    python -P benchmarks/paths.py [--model NAME_OR_PATH] [--dtype DTYPE] [--data FILE] [--cases N] [--questions N] [--top-k N]
        [--share X] [--seeds N] [--json FILE]

The documents of the first cases of ``--data`` (as for ``ragkv eval``; by default those that ragkv ships) are one corpus. Their
questions are asked by Zipf's law, each in one of four wordings, and passages found by the embedder. Every arm has the same bytes
for stored KV, ``--share`` of what the corpus takes: for chunks alone, or also for what prompts compute (``Engine(paths=True)``).
``computed`` are tokens that ran through the model for a question; ``kl`` is taken to a full prefill of the
same ids, in nats of the first token.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ragkv import RAG, CacheCraft, FullPrefill, Method, RelevantTokens, SensitiveTokens, TieredStore
from ragkv.bundled import CASES_PATH, foreign
from ragkv.closeness import divergence
from ragkv.evaluation import read_cases
from ragkv.evaluation.conditions import processor, versions
from ragkv.model.loading import BUNDLED
from ragkv.retrieval import Retrieval

WORDINGS = ("{}", "Please tell me: {}", "{} I should like to know.", "A question: {}")
PLAIN, KEPT, ORDERED, EXACT = "chunks alone", "paths", "paths, order='cache'", "full prefill, paths, order='cache'"
ARMS: dict[str, tuple[Method, bool, str]] = {
    PLAIN: (SensitiveTokens(0.1), False, "document"),
    KEPT: (SensitiveTokens(0.1), True, "document"),
    ORDERED: (SensitiveTokens(0.1), True, "cache"),
    EXACT: (FullPrefill(), True, "cache"),
    "RelevantTokens(0.1), chunks alone": (RelevantTokens(0.1), False, "document"),
    "RelevantTokens(0.1), paths": (RelevantTokens(0.1), True, "document"),
    "RelevantTokens(0.1), paths, order='cache'": (RelevantTokens(0.1), True, "cache"),
    **{f"CacheCraft({alpha}), paths": (CacheCraft(alpha), True, "document") for alpha in (0.2, 0.5, 1.0)},
    "CacheCraft(0.5), paths, order='cache'": (CacheCraft(0.5), True, "cache"),
    "CacheCraft(0.5), chunks alone": (CacheCraft(0.5), False, "document"),
}


def stream(questions: Sequence[str], count: int, seed: int) -> list[str]:
    """Questions by Zipf's law (exponent 1), each in some wording."""
    draw = random.Random(seed)
    ranked = draw.sample(list(questions), len(questions))
    weights = [1 / rank for rank in range(1, len(ranked) + 1)]
    return [draw.choice(WORDINGS).format(question) for question in draw.choices(ranked, weights, k=count)]


def opened(args: argparse.Namespace, documents: Sequence[str], kept_bytes: int, arm: str) -> RAG:
    """All documents, in so many bytes, read for the method of an arm."""
    method, paths, _ = ARMS[arm]
    more: dict[str, Any] = {"foreign": foreign()} if args.model == BUNDLED else {}
    more |= {"dtype": args.dtype} if args.dtype else {}
    rag = RAG.from_pretrained(
        args.model,
        store=TieredStore(cpu_bytes=kept_bytes),
        method=method,
        sensitivity=method.needs_sensitivity,
        paths=paths,
        **more,
    )
    rag.add_texts(list(documents))
    return rag


@torch.no_grad()
def asked(
    rag: RAG, arm: str, questions: Sequence[str], top_k: int, references: dict[Any, torch.Tensor]
) -> dict[str, float]:
    """One arm over the stream, one question after the other."""
    method, _, order = ARMS[arm]
    engine, rows = rag.engine, list[dict[str, float]]()
    for question in questions:
        found = rag.finder.found(question, Retrieval(top_k=top_k, order=order), method=method)
        prompt = engine.fuse(found.chunks, question, method=method)
        if engine.paths is not None:
            engine.paths.wait()
        ids = tuple(prompt.input_ids[0].tolist())
        if ids not in references:
            references[ids] = engine.model(input_ids=prompt.input_ids).logits[:, -1].clone()
        report = prompt.report
        rows.append(
            {
                "computed": report.computed_tokens,
                "read": report.read_tokens,
                "saved": report.saved_tokens,
                "kl": divergence(references[ids], prompt.logits),
                "ms": report.milliseconds["total"],
            }
        )
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--dtype")
    parser.add_argument("--data", type=Path, default=CASES_PATH)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="", help="those whose names begin so, and chunks alone")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cases = read_cases(args.data)[1][: args.cases]
    documents = list(dict.fromkeys("\n".join(document) for case in cases for document in case.documents))
    with opened(args, documents, 1 << 40, PLAIN) as rag:
        everything = rag.engine.store.stats().bytes["cpu"]
        found = len(rag.engine.store)
    budget = int(args.share * everything)
    print(
        f"{len(documents)} documents, {found} passages, {everything >> 20} MiB of KV; {budget >> 20} MiB for every arm"
    )
    references, rounds = dict[Any, torch.Tensor](), list[dict[str, dict[str, float]]]()
    for seed in range(args.seeds):
        questions = stream(list(dict.fromkeys(case.question for case in cases)), args.questions, seed)
        results: dict[str, dict[str, float]] = {}
        for arm in ARMS:
            if not arm.startswith((args.arms, PLAIN)):
                continue
            with opened(args, documents, budget, arm) as rag:
                row = results[arm] = asked(rag, arm, questions, args.top_k, references)
            share = row["computed"] / results[PLAIN]["computed"]
            print(
                f"seed {seed}, {arm:36} {row['computed']:6.1f} tokens computed ({share:.2f} of chunks alone; read "
                f"{row['read']:.1f}, spared {row['saved']:.1f}), KL {row['kl']:.4f}, {row['ms']:.0f} ms",
                flush=True,
            )
        rounds.append(results)
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
        conditions = {"processor": processor(), "versions": versions()}
        args.json.write_text(json.dumps({"settings": settings, "seeds": rounds, **conditions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
