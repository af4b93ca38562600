"""Time to first token with a reranker, the prompt begun meanwhile or not: the same questions in turn, in one run.

    python -P benchmarks/pipelining.py [--model NAME_OR_PATH] [--rerank-ms N] [--top-k N] [--rounds N] [--json FILE]

The reranker sleeps. It leaves the order of the passages as it is (``stays``), and what was begun is used; or it turns it round
(``turns``), and what was begun is dropped. Without, passages are found first and given to the engine then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ragkv import RAG
from ragkv.bundled import documents, questions
from ragkv.evaluation.conditions import processor, versions
from ragkv.model.loading import BUNDLED


def reranker(seconds: float, sign: int) -> Callable[[str, Sequence[str]], list[float]]:
    """One that takes so long, and keeps the order or turns it."""

    def rerank(question: str, texts: Sequence[str]) -> list[float]:
        time.sleep(seconds)
        return [-sign * float(number) for number in range(len(texts))]

    return rerank


def with_it(rag: RAG, question: str, search: dict[str, Any]) -> tuple[float, str, str]:
    """Milliseconds to the first token, the answer, and what became of what was begun."""
    begin = time.perf_counter()
    _, pieces = rag.stream(question, **search, max_new_tokens=8)
    first = next(pieces)
    spent = (time.perf_counter() - begin) * 1e3
    text = first + "".join(pieces)
    assert pieces.report is not None
    return spent, text, pieces.report.fusion.speculated


def without(rag: RAG, question: str, search: dict[str, Any]) -> tuple[float, str, str]:
    """Likewise, one after the other."""
    begin = time.perf_counter()
    pieces = rag.engine.stream(rag.chunks(rag.retrieve(question, **search)), question, max_new_tokens=8)
    first = next(pieces)
    return (time.perf_counter() - begin) * 1e3, first + "".join(pieces), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--rerank-ms", type=float, default=100)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with RAG.from_pretrained(args.model) as rag:
        rag.add_texts(list(documents().values()), list(documents()))
        asked = [each.question for each in questions()]
        rows = dict[str, list[dict[str, Any]]](stays=[], turns=[])
        for number in range(-2, args.rounds):  # twice for the first time of everything
            for name, sign in (("stays", 1), ("turns", -1)):
                search = {"top_k": args.top_k, "rerank": reranker(args.rerank_ms / 1e3, sign)}
                question, row = asked[number % len(asked)], dict[str, Any]()
                arms = [("with", with_it), ("without", without)]
                for arm, ask in arms if number % 2 else arms[::-1]:
                    row[f"{arm}_ms"], row[arm], outcome = ask(rag, question, search)
                    row["speculated"] = outcome or row.get("speculated", "")
                if row.pop("with") != row.pop("without"):
                    raise SystemExit(f"the two answers differ: {question}")
                if number >= 0:
                    rows[name].append(row)
        tokens = rag.ask(asked[0], top_k=args.top_k, max_new_tokens=1).report.fusion.chunk_tokens
    found = dict[str, Any]()
    for name, pairs in rows.items():
        with_ms, without_ms = (statistics.median(row[f"{arm}_ms"] for row in pairs) for arm in ("with", "without"))
        won = statistics.median(row["without_ms"] - row["with_ms"] for row in pairs)
        found[name] = {"with_ms": with_ms, "without_ms": without_ms, "won_ms": won, "pairs": pairs}
        print(f"{name}: {with_ms:.0f} ms to the first token, {without_ms:.0f} ms without; {won:.0f} ms won (medians)")
    if args.json:
        where = {"model": Path(args.model).name, "threads": torch.get_num_threads(), "chunk_tokens": tokens}
        options = {"rerank_ms": args.rerank_ms, "top_k": args.top_k, "rounds": args.rounds}
        args.json.write_text(
            json.dumps({**options, **where, **versions(), "device": processor(), **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
