"""``ragkv ask``: one question, its answer as it grows, where it comes from and where the time went; or a file of questions."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ragkv.cli import asking, batch, pages, show
from ragkv.cli.answers import answered, as_dict, place, show_sources
from ragkv.cli.arguments import folder
from ragkv.cli.opening import asking_options, open_rag
from ragkv.cli.searching import search_of

if TYPE_CHECKING:
    from ragkv.finding import SourcedAnswer

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
    """Answer the question, or those of a file."""
    asking.check(args)
    path = folder(args)
    options = asking_options(args, path)
    if args.batch is not None:
        return batch.run(args, path, options)
    pages.check(args)
    with open_rag(path, **options) as rag:
        answer, stages = answered(rag.stream, args.question, args, search_of(args, rag))
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
            (place(hit), hit, chunk) for hit, chunk in zip(answer.sources, answer.report.fusion.chunks, strict=True)
        ],
        left_out=[(place(hit), hit) for hit in answer.left_out],
        stages=[(name, show.milliseconds(milliseconds[stage])) for stage, name in _STAGES.items()],
        method=answer.report.fusion.method,
    )
