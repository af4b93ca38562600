"""Streams of requests out of real passages, to compare policies on."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkv.errors import DocumentError
from ragkv.store.simulation import Request


def read_passages(file: Path) -> list[str]:
    """The passages of a dataset: JSON with ``ctxs`` of ``title`` and ``text``, or LongBench's JSONL with a ``context``.

    Raises:
        DocumentError: the file is neither.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return [_titled(passage) for row in json.loads(text) for passage in row["ctxs"]]
        contexts = [json.loads(line)["context"] for line in text.splitlines() if line.strip()]
        # LongBench numbers the passages of several documents; one document is cut into paragraphs.
        return [part.strip() for context in contexts for part in _parts(context) if part.strip()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"{file} must be a JSON list of objects with 'ctxs', or JSONL of objects with 'context': {error!r}"
        ) from error


def zipf_stream(
    catalogue: Sequence[Request], length: int, exponent: float = 0.9, *, seed: int = 0, phases: int = 1
) -> list[Request]:
    """Requests whose popularity follows a Zipf law.

    Args:
        catalogue: what can be asked for.
        length: how many requests.
        exponent: of the law; the passage of rank r is asked for ``r ** -exponent`` times as often as the first.
        seed: of ranks and requests.
        phases: parts of equal length; with each, a tenth of the ranks on, so that what was popular no longer is. 1 for a
            stream whose popularity never changes.
    """
    chance = random.Random(seed)
    ranked = chance.sample(list(catalogue), len(catalogue))
    weights = [rank**-exponent for rank in range(1, len(ranked) + 1)]
    stream: list[Request] = []
    for phase in range(phases):
        shift = phase * len(ranked) // 10 % len(ranked)
        count = (phase + 1) * length // phases - len(stream)
        stream += chance.choices(ranked[shift:] + ranked[:shift], weights, k=count)
    return stream


def _titled(passage: dict[str, Any]) -> str:
    return f"{passage['title']} {passage['text']}"


def _parts(context: str) -> list[str]:
    parts = context.split("\nPassage ")
    return parts if len(parts) > 1 else context.split("\n\n")
