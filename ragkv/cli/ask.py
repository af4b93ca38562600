"""``ragkv ask``: one question, its answer as it grows, where it comes from and where the time went."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, require_documents
from ragkv.cli.reading import reading
from ragkv.rag import RAG, SourcedAnswer
from ragkv.retrieval import Hit

#: Stages of an answer's time line, in order, and what they are called.
_STAGES = {
    "retrieve": "retrieve",
    "read": "read what was missing",
    "place": "load + place",
    "select": "select",
    "compute": "recompute",
    "first_token": "first token after",
    "decode": "decode",
}


def run(args: argparse.Namespace) -> int:
    """Answer the question."""
    path = folder(args)
    require_documents(path)
    with open_rag(path, **options_of(args)) as rag:
        answer, stages = _answered(rag, args)
    if args.json:
        show.as_json(_as_dict(args.question, answer, stages))
    else:
        _show(answer, stages)
    return 0


def _answered(rag: RAG, args: argparse.Namespace) -> tuple[SourcedAnswer, dict[str, float]]:
    begin = perf_counter()
    text = ""
    with ExitStack() as shown:
        bar = shown.enter_context(reading(args))
        search = {"top_k": args.top_k, "neighbours": args.neighbours}
        options = {"stop": args.stop, "max_new_tokens": args.max_new_tokens}
        hits, pieces = rag.stream(args.question, **search, progress=bar, **options)
        for piece in pieces:
            shown.close()  # what had to be read is read
            if not args.json:
                print(piece if text else piece.lstrip(), end="", flush=True)
            text += piece
    total_ms = (perf_counter() - begin) * 1e3
    if not args.json:
        print()
    assert pieces.report is not None
    answer = SourcedAnswer(text, pieces.token_ids, pieces.report, hits)
    return answer, _milliseconds(answer, total_ms)


def _milliseconds(answer: SourcedAnswer, total_ms: float) -> dict[str, float]:
    """By stage; ``first_token`` and ``total`` count from the question on, so that retrieval is in them."""
    report = answer.report
    retrieve = max(0.0, total_ms - report.first_token_ms - report.decode_ms)
    stages = {stage: report.fusion.milliseconds[stage] for stage in ("read", "place", "select", "compute")}
    first_token = retrieve + report.first_token_ms
    return {"retrieve": retrieve, **stages, "first_token": first_token, "decode": report.decode_ms, "total": total_ms}


def _as_dict(question: str, answer: SourcedAnswer, milliseconds: dict[str, float]) -> dict[str, Any]:
    sources = [
        {
            "source": hit.source,
            "page": hit.page,
            "heading": hit.heading,
            "position": hit.position,
            "score": hit.score,
            "kv": kv,
            "text": hit.text,
        }
        for hit, kv in zip(answer.sources, answer.report.fusion.sources, strict=True)
    ]
    return {
        "question": question,
        "answer": answer.text.strip(),
        "sources": sources,
        "milliseconds": {stage: round(value, 3) for stage, value in milliseconds.items()},
        "report": answer.report.as_dict(),
    }


def _show(answer: SourcedAnswer, milliseconds: dict[str, float]) -> None:
    print(f"\n{show.paint('sources', 'bold')}")
    rows = [("", "passage", "score", "KV from")]
    for hit, kv in zip(answer.sources, answer.report.fusion.sources, strict=True):
        rows.append((_place(hit), str(hit.position + 1), f"{hit.score:.2f}", kv))
    show.table(rows)
    fusion = answer.report.fusion
    print(f"\n{show.paint('recomputed', 'bold')}")
    print(f"{fusion.budget:.1%} of {show.number(fusion.chunk_tokens, 'passage token')}, by {fusion.method}")
    print(f"\n{show.paint('time', 'bold')}")
    stages = [
        f"{name} {show.milliseconds(milliseconds[stage])}"
        for stage, name in _STAGES.items()
        if stage != "read" or milliseconds[stage]
    ]
    print(f"{' · '.join(stages)} ({show.number(answer.report.new_tokens, 'token')})")


def _place(hit: Hit) -> str:
    """``report.pdf, page 3, Harbours > Clearport``."""
    page = "" if hit.page is None else f"page {hit.page}"
    return ", ".join(filter(None, (show.short(hit.source), page, hit.heading)))
