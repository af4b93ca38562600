"""What calibrations found, kept beside the KV, and what it holds for: one model, one template."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from ragkv.chunk import digest
from ragkv.errors import CalibrationError
from ragkv.folder import seal
from ragkv.library.differing import described, differences
from ragkv.library.documents import Documents
from ragkv.methods import FullPrefill, Method
from ragkv.methods.calibrated import Calibrated, Chosen
from ragkv.methods.words import parse_method
from ragkv.model.traits import Facts, recalled

logger: logging.Logger = logging.getLogger(__name__)

_RESULTS, _ROWS = "calibrations", "calibration rows"
#: The results of so many models and templates are kept in one folder.
_MOST = 16
#: A calibration is of questions, wherever their documents are, and however long documents are read at once.
_WHEREVER = ("namespace", "document_tokens")

#: By case: by candidate: what was measured.
Rows = dict[str, dict[str, dict[str, Any]]]


def resolved(method: Method, documents: Documents, opening: Sequence[int] | None = None) -> Method:
    """A method itself; in the place of :class:`~ragkv.Calibrated` what was chosen for this model and template.

    Args:
        method: that was asked for.
        documents: of the prompt.
        opening: ids that the prompt begins with, earlier turns left out; the template's by default.

    Raises:
        CalibrationError: there was no calibration at all.
    """
    if not isinstance(method, Calibrated):
        return method
    found, here = results(documents.store), setting(documents, opening)
    for result in found:
        if result["setting"] == here:
            return Chosen(parse_method(result["chosen"]))
    if not found:
        raise CalibrationError(
            "method 'calibrated' needs a calibration, and there is none here yet: run 'ragkv calibrate --data ...', "
            "engine.calibrate(...) or rag.calibrate(...), or give another method"
        )
    void = ", ".join(differences(found[-1]["made_with"], made_with(documents, opening))) or "setting"
    _warn(
        f"the calibration is void, and prompts are prefilled in full: another {void} than it was made with; run it again"
    )
    return Chosen(FullPrefill(), void)


def setting(documents: Documents, opening: Sequence[int] | None = None) -> str:
    """Hex digest of all that a calibration holds for."""
    return digest(documents.space, *_template(documents, opening), documents.context, documents.reader.foreign).hex()


def made_with(documents: Documents, opening: Sequence[int] | None = None) -> dict[str, str]:
    """The same by names that people know."""
    prefix, chunk, suffix, behind = _template(documents, opening)
    known = {name: value for name, value in described(documents).items() if name not in _WHEREVER}
    around = digest(chunk, suffix, behind).hex()
    return {
        **known,
        "template prefix": digest(prefix).hex(),
        "template around passages, question and answer": around,
        "foreign text": documents.reader.foreign,
    }


def results(facts: Facts) -> list[dict[str, Any]]:
    """All that are kept, the last one last."""
    data = recalled(facts, _RESULTS, b"")
    return [] if data is None else list(json.loads(data))


def keep_result(facts: Facts, result: dict[str, Any]) -> None:
    """Keep a result, in the place of that of the same setting.

    Raises:
        StoreError: it cannot be kept.
    """
    others = [kept for kept in results(facts) if kept["setting"] != result["setting"]]
    facts.meta_put(_RESULTS, seal(b"", json.dumps([*others, result][-_MOST:]).encode()))


def rows(facts: Facts, of: str) -> Rows:
    """What a calibration that was stopped has measured, with the same setting; those of another one are gone."""
    data = recalled(facts, _ROWS, of.encode())
    return {} if data is None else dict(json.loads(data))


def keep_rows(facts: Facts, of: str, measured: Rows) -> None:
    """Keep what was measured, in the place of what was there.

    Raises:
        StoreError: it cannot be kept.
    """
    facts.meta_put(_ROWS, seal(of.encode(), json.dumps(measured).encode()))


def _template(documents: Documents, opening: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
    """A prompt's fixed ids: its beginning, and what stands around a chunk, a question and an answer."""
    encoder, mark = documents.encoder, (0,)
    prefix = documents.anchor if encoder.template.anchor is None else tuple(opening or encoder.prefix)
    return prefix, encoder.chunk(mark), encoder.suffix(mark), encoder.after_answer


@cache
def _warn(said: str) -> None:
    """Once a process."""
    logger.warning("%s", said)
