"""``ragkv demo``: the bundled model, or another one, reads the bundled documents and answers the bundled questions. No network."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports: huggingface_hub looks once

from ragkv import bundled
from ragkv.bundled import DemoQuestion
from ragkv.chunk import Chunk
from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag
from ragkv.cli.searching import search_of
from ragkv.errors import RagKVError
from ragkv.evaluation.metrics import contains, exact_match
from ragkv.machine import machine
from ragkv.methods import FullPrefill, Method, RelevantTokens
from ragkv.model.loading import BUNDLED
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.retrieval import Hit

_NEW_TOKENS = 24


def run(args: argparse.Namespace) -> int:
    """Read, answer, compare."""
    path = folder(args, default="demo" if args.model == BUNDLED else f"demo-{Path(args.model).resolve().name}")
    with open_rag(path, model=args.model, dtype=args.dtype, method=args.method or _own_method(args.model)) as rag:
        decoder = rag.engine.decoder
        how = f"{str(decoder.dtype).removeprefix('torch.')} on {machine(decoder.device)}"
        if decoder.device.type == "cpu" and decoder.dtype.itemsize == 2 and args.dtype is None:
            show.hint(f"{how}: --dtype float32 is several times as fast where the CPU does not compute in 16 bits")
        read = _read_documents(rag, path)
        if not args.json:
            _show_read(read)
        turns = []
        _warm_up(rag)
        for number, question in enumerate(bundled.questions()[: args.questions]):
            turns.append(_answer(rag, question, args, full_first=bool(number % 2)))
            if not args.json:
                _show_turn(number, turns[-1])
        summary = _summary(turns)
        method = repr(rag.engine.method)
    if args.json:
        show.as_json(
            {
                "read": read,
                "method": method,
                "machine": how,
                "questions": [asdict(turn) for turn in turns],
                "summary": summary,
            }
        )
    else:
        _show_summary(summary, read, method, how)
    return 0


def _own_method(model: str) -> str | Method:
    """The default, whatever the folder was made with."""
    return bundled.METHOD if model == BUNDLED else RelevantTokens()


@dataclass(frozen=True)
class Turn:
    """A question and what came of it.

    Attributes:
        question: as it was asked.
        answer: what the model said over the stored KV.
        expected: the right answer.
        right: whether they are the same; of another model than the bundled one, whether the answer holds it.
        full_prefill_right: whether the model is right when it reads the same passages afresh.
        retrieved: whether the answer stands in the passages; without that no reading of them can be right.
        sources: file and passage, from 0, in the order of the prompt.
        kv: where each passage's KV came from.
        first_token_ms: from the passages to the first token, with the method.
        full_prefill_ms: the same with a full prefill of the same ids.
        prompt_tokens: tokens of the prompt.
        computed_tokens: those computed afresh, the question's among them.
        budget: the recompute charged, a share of the passages' tokens.
    """

    question: str
    answer: str
    expected: str
    right: bool
    full_prefill_right: bool
    retrieved: bool
    sources: list[tuple[str, int]]
    kv: list[str]
    first_token_ms: float
    full_prefill_ms: float
    prompt_tokens: int
    computed_tokens: int
    budget: float


def _read_documents(rag: RAG, path: Path) -> dict[str, Any]:
    begin, tokens, documents = perf_counter(), 0, bundled.documents()
    for name, text in show.progress(documents.items(), desc="reading", unit=" documents"):
        tokens += rag.add_texts([text], [name]).tokens_read
    return {"path": str(path), "documents": len(documents), "tokens_read": tokens, "seconds": perf_counter() - begin}


def _warm_up(rag: RAG) -> None:
    """The first forward pass of a process is slow, and would be charged to whoever comes first."""
    rag.engine.fuse([], "Is it warm?", method=FullPrefill())


def _answer(rag: RAG, question: DemoQuestion, args: argparse.Namespace, full_first: bool) -> Turn:
    hits = rag.retrieve(question.question, **search_of(args, rag))
    chunks = rag.chunks(hits)
    method, full = rag.engine.method, FullPrefill()
    arms = {arm: _said(rag, chunks, question, arm) for arm in ([full, method] if full_first else [method, full])}
    (said, prompt, cost), (full_said, full_prompt, full_cost) = arms[method], arms[full]
    if prompt != full_prompt:
        raise RagKVError("the two prompts that are compared differ: this is a bug, please report it")
    tokens = cost.fusion.tokens
    right = exact_match if args.model == BUNDLED else contains  # a chat model answers in sentences
    return Turn(
        question=question.question,
        answer=said,
        expected=question.answer,
        right=bool(right(said, [question.answer])),
        full_prefill_right=bool(right(full_said, [question.answer])),
        retrieved=_stands_in(hits, question),
        sources=[(hit.source, hit.position) for hit in hits],
        kv=cost.fusion.sources,
        first_token_ms=cost.first_token_ms,
        full_prefill_ms=full_cost.first_token_ms,
        prompt_tokens=len(prompt),
        computed_tokens=tokens["recomputed"] + tokens["fresh"],
        budget=cost.fusion.budget,
    )


def _said(
    rag: RAG, chunks: list[Chunk], question: DemoQuestion, method: Method
) -> tuple[str, tuple[int, ...], AnswerReport]:
    """An answer, the prompt's ids, and what it cost."""
    answer = rag.engine.generate(chunks, question.question, method=method, max_new_tokens=_NEW_TOKENS, keep_past=True)
    assert answer.past is not None
    return answer.text.strip(), answer.past.ids[: sum(answer.report.fusion.tokens.values())], answer.report


def _stands_in(hits: list[Hit], question: DemoQuestion) -> bool:
    """Whether every part of the answer (``Belmar Works: glass`` has two) is in passages of the documents that it rests on."""
    found = " ".join(hit.text for hit in hits if hit.source in question.documents)
    return not question.documents or all(contains(found, [part]) for part in question.answer.split(": "))


def _summary(turns: list[Turn]) -> dict[str, Any]:
    return {
        "questions": len(turns),
        "right": sum(turn.right for turn in turns),
        "full_prefill_right": sum(turn.full_prefill_right for turn in turns),
        "wrong_not_retrieved": sum(not (turn.right or turn.retrieved) for turn in turns),
        "median_first_token_ms": median(turn.first_token_ms for turn in turns),
        "median_full_prefill_ms": median(turn.full_prefill_ms for turn in turns),
        "median_speedup": median(turn.full_prefill_ms / turn.first_token_ms for turn in turns),
    }


def _show_read(read: dict[str, Any]) -> None:
    documents, tokens = show.number(read["documents"], "document"), show.number(read["tokens_read"], "token")
    if read["tokens_read"]:
        print(f"Read {documents}, {tokens}, in {read['seconds']:.1f} s. Run it again: they are on disk now.\n")
    else:
        print(f"Warm start: {documents} found on disk, {tokens} read.\n")


def _show_turn(number: int, turn: Turn) -> None:
    verdict = show.paint("right", "green") if turn.right else show.paint("wrong", "red")
    missed = "" if turn.retrieved else ", not among the passages"
    full = "right" if turn.full_prefill_right else "wrong too"
    instead = "" if turn.right else f"  (right: {turn.expected}{missed}; full prefill: {full})"
    kv = ", ".join(f"{turn.kv.count(tier)} {tier}" for tier in sorted(set(turn.kv)))
    sources = ", ".join(f"{source} {position + 1}" for source, position in turn.sources)
    print(f"{number + 1:2}  {show.paint(turn.question, 'bold')}")
    print(f"    {verdict}: {turn.answer or '(nothing)'}{instead}")
    print(
        f"    first token {show.milliseconds(turn.first_token_ms)}, full prefill {show.milliseconds(turn.full_prefill_ms)}"
        f" · computed {turn.computed_tokens} of {turn.prompt_tokens} tokens · KV: {kv}"
    )
    print(show.paint(f"    passages: {sources}", "dim"))


def _show_summary(summary: dict[str, Any], read: dict[str, Any], method: str, how: str) -> None:
    wrong, missed = summary["questions"] - summary["right"], summary["wrong_not_retrieved"]
    why = f" Wrong because the answer was not retrieved: {missed} of {wrong}." if missed else ""
    print(
        f"\n{method}: {summary['right']} of {summary['questions']} right (full prefill of the same passages: "
        f"{summary['full_prefill_right']}).{why} First token after {show.milliseconds(summary['median_first_token_ms'])}, full "
        f"prefill {show.milliseconds(summary['median_full_prefill_ms'])}, {summary['median_speedup']:.1f} times as fast "
        f"(medians, retrieval not counted; {how}). {show.number(read['tokens_read'], 'token')} read at start."
    )
    show.hint(f"documents, vectors and KV are in {read['path']}")
