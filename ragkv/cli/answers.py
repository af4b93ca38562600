"""An answer as commands show it: while it grows, where it comes from, and as an object for programs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ragkv.cli import show
from ragkv.cli.reading import reading
from ragkv.errors import IncompleteAnswerError

if TYPE_CHECKING:
    from ragkv.answering import AnswerStream
    from ragkv.finding import SourcedAnswer
    from ragkv.retrieval import Hit


def generation_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the answer, for :meth:`RAG.ask`."""
    asked = {name: getattr(args, name, None) for name in ("schema", "logprobs")}
    return {
        "stop": args.stop,
        "max_new_tokens": args.max_new_tokens,
        "prompt_lookup_num_tokens": args.lookup,
        **{name: value for name, value in asked.items() if value is not None},
    }


def answered(
    stream: Callable[..., tuple[list[Hit], AnswerStream]],
    question: str,
    args: argparse.Namespace,
    search: dict[str, Any],
) -> tuple[SourcedAnswer, dict[str, float]]:
    """An answer, which is shown as it grows, and the milliseconds of its stages.

    Args:
        stream: of a :class:`RAG`, or of a session of it.
        question: what is asked.
        args: of the command.
        search: how passages are found.
    """
    from ragkv.finding import SourcedAnswer

    begin = perf_counter()
    text = ""
    with ExitStack() as shown:
        bar = shown.enter_context(reading(args))
        hits, pieces = stream(question, progress=bar, **generation_of(args), **search)
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
    return answer, milliseconds(answer, total_ms)


def milliseconds(answer: SourcedAnswer, total_ms: float) -> dict[str, float]:
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
        "sources": [{**_passage(hit), "copies": list(map(_where, hit.copies)), "kv": kv} for hit, kv in sources],
        "left_out": [_passage(hit) for hit in answer.left_out],
        "milliseconds": {stage: round(value, 3) for stage, value in milliseconds.items()},
        "report": report,
    }


def _passage(hit: Hit) -> dict[str, Any]:
    return {**_where(hit), "score": hit.score, "text": hit.text}


def _where(hit: Hit) -> dict[str, Any]:
    return {"source": hit.source, "page": hit.page, "heading": hit.heading, "position": hit.position}


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
        rows.append((place(hit), str(hit.position + 1), f"{hit.score:.2f}", kv))
    show.table(rows)


def place(hit: Hit) -> str:
    """``report.pdf, page 3, Harbours > Clearport (the same in notes.md)``."""
    page = "" if hit.page is None else f"page {hit.page}"
    where = ", ".join(filter(None, (show.short(hit.source), page, hit.heading)))
    if not hit.copies:
        return where
    first, more = place(hit.copies[0]), len(hit.copies) - 1
    return f"{where} (the same in {first}{f' and {more} more' if more else ''})"
