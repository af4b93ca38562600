"""``ragkv calibrate``: what may stand in the place of a full prefill, proved on the folder's own model and questions."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ragkv.calibration import Calibration
from ragkv.calibration.cases import read_questions
from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.opening import open_rag, options_of, require_documents
from ragkv.cli.searching import search_of
from ragkv.errors import CalibrationError
from ragkv.evaluation import EvaluationError, read_cases
from ragkv.evaluation.arms import FULL
from ragkv.methods.words import words_of

_PASSED_ON = ("kl", "top1", "f1", "confidence", "cap", "limit", "seed", "max_new_tokens")


def run(args: argparse.Namespace) -> int:
    """Calibrate."""
    path = folder(args)
    form, cases = _data(args)
    if form == "questions":
        require_documents(path)
    options = {name: getattr(args, name) for name in _PASSED_ON}
    if args.ladder is not None:
        options["ladder"] = args.ladder
    with open_rag(path, **options_of(args)) as rag, ExitStack() as shown:
        bar = show.progress(shown=args.progress, total=min(len(cases), args.limit or len(cases)), unit=" cases")
        shown.callback(bar.close)

        def tell(so_far: Calibration) -> None:
            bar.total = so_far.given
            bar.n = so_far.cases + sum(so_far.left_out.values())
            bar.set_postfix_str(so_far.chosen, refresh=True)

        result = rag.calibrate(cases, progress=tell, **options, **search_of(args, rag))
        method = words_of(rag.engine.method)
    if args.json:
        show.as_json({"data": f"{Path(args.data).name} ({form})", **result.as_dict()})
    else:
        _show(result, path, method)
    return 0


def _data(args: argparse.Namespace) -> tuple[str, list[Any]]:
    questions = read_questions(args.data)
    if questions is not None:
        return "questions", questions
    try:
        form, cases = read_cases(args.data, args.chunk_words)
    except EvaluationError as error:
        raise CalibrationError(
            f'{error}; or of lines {{"question": ...}}, asked over the folder\'s documents'
        ) from error
    return form, list(cases)


def _show(result: Calibration, path: Path, method: str | None) -> None:
    print(result.goal)
    rows = [("method", "recomputed", "cases", "mean", "at most", "verdict")]
    for rung in result.rungs:
        figures = (f"{rung.budget:.1%}", f"{rung.cases}", f"{rung.mean:.3f}", f"{rung.upper:.3f}")
        rows.append((rung.method, *(figures if rung.cases else ("", "0", "", "")), rung.verdict))
    print()
    show.table(rows)
    for rung in result.rungs:
        if rung.refused:
            print(f"\n{rung.method} is not for this model: {rung.refused}")
    for why, count in result.left_out.items():
        print(f"\nleft out: {show.number(count, 'case')}, {why}")
    print(
        f"\nchosen: {show.paint(result.chosen, 'bold')}, behind {show.number(result.cases, 'case')} of {result.given}"
    )
    if result.chosen == FULL:
        print("nothing cheaper was proved to be good enough: give more cases, a wider bound, or another --ladder")
    stays = method != "calibrated"
    print(f"{path} answers by {f'{method}, as before' if stays else 'it from now on'}; --method says otherwise")
