"""``ragkv ask``: one question, its answer as it grows, where it comes from and where the time went."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ragkv.cli import pages, show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, require_documents
from ragkv.cli.reading import reading
from ragkv.cli.searching import search_of
from ragkv.errors import IncompleteAnswerError

if TYPE_CHECKING:
    from ragkv.finding import SourcedAnswer
    from ragkv.report import AnswerStream
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
    pages.check(args)
    with open_rag(path, **options_of(args)) as rag:
        options = {**search_of(args, rag), "schema": args.schema, "logprobs": args.logprobs}
        answer, stages = answered(rag.stream, args.question, args, options)
    if args.json:
        show.as_json(as_dict(args.question, answer, stages))
    else:
        show_sources(answer)
        _show_costs(answer, stages)
    if args.page is not None:
        _write_page(args, answer, stages)
    if args.schema is not None:
        _ = answer.value  # an answer that was cut is shown, and a failure
    return 0


def answered(
    stream: Callable[..., tuple[list[Hit], AnswerStream]],
    question: str,
    args: argparse.Namespace,
    options: dict[str, Any],
) -> tuple[SourcedAnswer, dict[str, float]]:
    """An answer, which is shown as it grows, and the milliseconds of its stages.

    Args:
        stream: of a :class:`RAG`, or of a session of it.
        question: what is asked.
        args: of the command.
        options: more of those of :meth:`RAG.stream`.
    """
    from ragkv.finding import SourcedAnswer

    begin = perf_counter()
    text = ""
    with ExitStack() as shown:
        bar = shown.enter_context(reading(args))
        of_answer = {"stop": args.stop, "max_new_tokens": args.max_new_tokens, "prompt_lookup_num_tokens": args.lookup}
        hits, pieces = stream(question, progress=bar, **of_answer, **options)
        for piece in pieces:
            shown.close()  # what had to be read is read
            if not args.json:
                print(piece if text else piece.lstrip(), end="", flush=True)
            text += piece
    total_ms = (perf_counter() - begin) * 1e3
    if not args.json:
        print()
    assert pieces.report is not None
    kept: dict[str, Any] = {"logprobs": pieces.logprobs, "schema": pieces.schema}
    answer = SourcedAnswer(text, pieces.token_ids, pieces.report, hits, pieces.left_out, **kept)
    return answer, _milliseconds(answer, total_ms)


def _milliseconds(answer: SourcedAnswer, total_ms: float) -> dict[str, float]:
    """By stage; ``first_token`` and ``total`` count from the question on, so that retrieval is in them."""
    report = answer.report
    retrieve = max(0.0, total_ms - report.first_token_ms - report.decode_ms)
    stages = {stage: report.fusion.milliseconds[stage] for stage in ("read", "place", "select", "compute")}
    first_token = retrieve + report.first_token_ms
    return {"retrieve": retrieve, **stages, "first_token": first_token, "decode": report.decode_ms, "total": total_ms}


def as_dict(question: str, answer: SourcedAnswer, milliseconds: dict[str, float]) -> dict[str, Any]:
    """For programs. Times are in ``milliseconds`` only: the report's count from the passages on, and not from the question."""
    report = answer.report.as_dict()
    del report["first_token_ms"], report["decode_ms"], report["fusion"]["milliseconds"]
    sources = zip(answer.sources, answer.report.fusion.sources, strict=True)
    return {
        "question": question,
        "answer": answer.text.strip(),
        **_for_programs(answer),
        "sources": [{**_passage(hit), "kv": kv} for hit, kv in sources],
        "left_out": [_passage(hit) for hit in answer.left_out],
        "milliseconds": {stage: round(value, 3) for stage, value in milliseconds.items()},
        "report": report,
    }


def _passage(hit: Hit) -> dict[str, Any]:
    where = {"source": hit.source, "page": hit.page, "heading": hit.heading, "position": hit.position}
    return {**where, "score": hit.score, "text": hit.text}


def _for_programs(answer: SourcedAnswer) -> dict[str, Any]:
    """What was asked for besides the text; an answer that was cut has no value."""
    found: dict[str, Any] = {}
    if answer.schema is not None:
        try:
            found["value"] = answer.value
        except IncompleteAnswerError:
            found["value"] = None
    if answer.logprobs is not None:
        found["logprobs"] = [one.as_dict() for one in answer.logprobs]
    return found


def show_sources(answer: SourcedAnswer) -> None:
    """A table of the passages that an answer was given."""
    print(f"\n{show.paint('sources', 'bold')}")
    rows = [("", "passage", "score", "KV from")]
    for hit, kv in zip(answer.sources, answer.report.fusion.sources, strict=True):
        rows.append((_place(hit), str(hit.position + 1), f"{hit.score:.2f}", kv))
    show.table(rows)


def _show_costs(answer: SourcedAnswer, milliseconds: dict[str, float]) -> None:
    fusion = answer.report.fusion
    print(f"\n{show.paint('recomputed', 'bold')}")
    print(f"{fusion.budget:.1%} of {show.number(fusion.chunk_tokens, 'passage token')}, by {fusion.method}")
    if fusion.why:
        print(fusion.why)
    print(f"\n{show.paint('time', 'bold')}")
    stages = [
        f"{name} {show.milliseconds(milliseconds[stage])}"
        for stage, name in _STAGES.items()
        if stage != "read" or milliseconds[stage]
    ]
    print(f"{' · '.join(stages)} ({show.number(answer.report.new_tokens, 'token')})")


def _write_page(args: argparse.Namespace, answer: SourcedAnswer, milliseconds: dict[str, float]) -> None:
    pages.write(
        args,
        "answer.html.j2",
        "The prompt by where its KV came from, tokens recomputed, and time by stage until the first token",
        answer.report.plot(),
        question=args.question,
        answer=answer.text.strip(),
        sources=[
            (_place(hit), hit, chunk) for hit, chunk in zip(answer.sources, answer.report.fusion.chunks, strict=True)
        ],
        left_out=[(_place(hit), hit) for hit in answer.left_out],
        stages=[(name, show.milliseconds(milliseconds[stage])) for stage, name in _STAGES.items()],
        method=answer.report.fusion.method,
    )


def _place(hit: Hit) -> str:
    """``report.pdf, page 3, Harbours > Clearport``."""
    page = "" if hit.page is None else f"page {hit.page}"
    return ", ".join(filter(None, (show.short(hit.source), page, hit.heading)))
