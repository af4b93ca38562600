"""``ragkv ask --batch``: a file of questions, several at a time; each answer is a line of another file as soon as it is there."""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ragkv.cli import show
from ragkv.cli.answers import as_dict, generation_of, milliseconds
from ragkv.cli.opening import open_rag
from ragkv.cli.questions import Answers, Question, read_questions
from ragkv.cli.searching import search_of
from ragkv.errors import in_one_line

if TYPE_CHECKING:
    from ragkv.rag import RAG

#: So many questions that failed are named.
_NAMED = 5
_AT_ONCE = 8


def run(args: argparse.Namespace, path: Path, options: Mapping[str, Any]) -> int:
    """Answer what was not answered before. A question that cannot be answered is a line that says why, and the others go on."""
    from ragkv.streaming import side_by_side

    begin = perf_counter()
    questions = read_questions(Path(args.batch).expanduser())
    answers = Answers(Path(args.out).expanduser(), questions)
    with open_rag(path, **options) as rag:
        answers.begin(_settings(args, path, rag))
        rag.engine.stream([], "?", **generation_of(args))  # arguments are checked, and nothing is computed
        for namespace in dict.fromkeys(question.namespace for question in answers.open):
            search_of(args, rag, namespace)
        bar = show.progress(shown=args.progress, total=len(questions), initial=answers.before, unit=" questions")
        with bar:
            batch = _Batch(rag, args, answers, bar)
            side_by_side(batch.ask, answers.open, args.at_once or _AT_ONCE)
    counts = {"answered": len(answers.open) - batch.failed, "before": answers.before, "failed": batch.failed}
    seconds = perf_counter() - begin
    if args.json:
        show.as_json({"out": str(answers.path), **counts, "seconds": round(seconds, 3)})
    else:
        said = [f"{counts['answered']} answered in {show.duration(seconds)}"]
        said += [
            f"{counts[name]} {word}" for name, word in (("before", "before"), ("failed", "failed")) if counts[name]
        ]
        print(f"questions: {', '.join(said)}; answers are in {show.short(str(answers.path))}")
    return 1 if batch.failed else 0


def _settings(args: argparse.Namespace, path: Path, rag: RAG) -> dict[str, Any]:
    """What all answers of a file have in common; how fast they come is no part of it."""
    from ragkv.calibration.kept import setting
    from ragkv.chunk import digest
    from ragkv.methods.words import words_of

    engine = rag.engine
    search = {name: value for name, value in search_of(args, rag).items() if name != "where"}
    return {
        "path": str(path.resolve()),
        "namespace": engine.documents.namespace,
        "model and template": setting(engine.documents)[:16],
        "method": words_of(engine.method) or repr(engine.method),
        **search,
        "where": args.where,
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
        "schema": None if args.schema is None else digest(json.dumps(args.schema, sort_keys=True)).hex()[:16],
        "logprobs": args.logprobs,
    }


class _Batch:
    """Asks, from several threads.

    Attributes:
        failed: questions that were not answered.
    """

    def __init__(self, rag: RAG, args: argparse.Namespace, answers: Answers, bar: Any):
        self._rag, self._args, self._answers, self._bar = rag, args, answers, bar
        self._lock = Lock()
        self.failed = 0

    def ask(self, question: Question, **stopped: Any) -> None:
        """One question; what was stopped in the middle leaves no line."""
        from ragkv.model.generation import stopping

        line, error = self._line(question, stopped)
        stop = stopping(stopped)
        with self._lock:
            if stop is not None and stop.is_set():
                return
            self._answers.add(question, line)
            if error is not None:
                self._failure(question, error)
            self._bar.update()

    def _line(self, question: Question, stopped: dict[str, Any]) -> tuple[dict[str, Any], Exception | None]:
        begin, line = perf_counter(), dict[str, Any]()
        try:
            search = search_of(self._args, self._rag, question.namespace, question.condition)
            options = {**generation_of(self._args), **search, **stopped}
            answer = self._rag.ask(question.text, namespace=question.namespace, **options)
            line = as_dict(question.text, answer, milliseconds(answer, (perf_counter() - begin) * 1e3))
            if answer.schema is not None:
                _ = answer.value  # an answer that was cut is there, and a failure
        except Exception as error:
            return {**line, "error": {"type": type(error).__name__, "message": in_one_line(error)}}, error
        return line, None

    def _failure(self, question: Question, error: Exception) -> None:
        self.failed += 1
        if self.failed > _NAMED + 1:
            return
        self._bar.clear()
        if self.failed > _NAMED:
            show.hint("... and others")
            return
        show.hint(show.plain(f"ragkv: question {question.id}: {' '.join(str(error).split())}"))
        if self._args.debug:
            traceback.print_exception(error)
