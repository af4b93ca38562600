"""Calibrating a folder: questions are asked over its own documents, and its prompts are put together by what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ragkv.calibration.run import Calibration, calibrate
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import RetrievalError
from ragkv.finding import Finder
from ragkv.library.intake import Intake
from ragkv.methods import Calibrated, FullPrefill
from ragkv.methods.words import words_of
from ragkv.request import Request
from ragkv.retrieval import Catalogue, Retrieval


def calibrate_folder(
    engine: Engine, finder: Finder, catalogue: Catalogue, intake: Intake, cases: Sequence[Any], options: dict[str, Any]
) -> Calibration:
    """See :meth:`ragkv.RAG.calibrate`.

    Args:
        engine: of the folder; its method is replaced.
        finder: finds passages.
        catalogue: keeps the method for whoever opens the folder next.
        intake: would keep what the folder was opened with, with its next documents.
        cases: questions, or cases of another kind.
        options: of retrieval, and of :func:`~ragkv.calibration.calibrate`.

    Raises:
        RetrievalError: an option of retrieval is out of range.
    """
    retrieval, options = Retrieval.split(options)
    if any(isinstance(case, str | Mapping) for case in cases) and not catalogue.documents(engine.documents.namespace):
        raise RetrievalError("questions are asked over the folder's documents, and there are none: add some first")

    def find(question: str) -> Sequence[Chunk]:
        engine.prompting.check(Request((), question, FullPrefill()), question, lambda tokens: None)
        return finder.found(question, retrieval).chunks

    result = calibrate(engine, cases, find=find, **options)
    if result.method != FullPrefill():
        engine.method = Calibrated()
        method = {"method": words_of(engine.method)}
        if intake.defaults:
            intake.defaults = {**intake.defaults, **method}
        catalogue.keep_defaults({**(catalogue.defaults or intake.defaults), **method})
    return result
