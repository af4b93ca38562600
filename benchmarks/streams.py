"""Streams of questions, for policies.py: made from passages, from questions that a retriever answers, or read from a log.

A question is the chunks that it is given, in order. Sizes are in tokens: chunks of one model take as many bytes a token.

A log is a file of one JSON object a line, a question each: ``{"chunks": [[key, tokens], ...]}`` with any text for a key; or what
``ragkv ask --batch QUESTIONS --out FILE`` and ``ragkv ask --json`` write, or ``json.dumps(answer.report.as_dict())`` in Python.
There a chunk is its document and its number: what was edited in between counts as the same.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ragkv.bundled import MODEL_PATH
from ragkv.chunk import digest
from ragkv.errors import DocumentError
from ragkv.evaluation.formats import read_cases
from ragkv.evaluation.retrieving import retrieve
from ragkv.library.costs import measure
from ragkv.library.reading import Reader
from ragkv.model.decoder import Decoder
from ragkv.model.loading import load_model
from ragkv.retrieval import Embedder
from ragkv.store.profile import CostProfile
from ragkv.tokenizer import PrivateTokenizer

LIMIT_S = 10.0  # of measuring prefill times
TOPIC, TURNS = 8, 20  # questions of a topic; how many a session asks on average

Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """One chunk that is asked for: its key, its tokens, and the seconds that computing it takes."""

    key: bytes
    tokens: int
    cost_s: float


Question = Sequence[Request]


def zipf_stream(
    catalogue: Sequence[Item], length: int, exponent: float = 0.9, *, seed: int = 0, phases: int = 1
) -> list[Item]:
    """Draws from a catalogue whose popularity follows a Zipf law.

    Args:
        catalogue: what can be asked for.
        length: how many draws.
        exponent: of the law; what has rank r is drawn ``r ** -exponent`` times as often as the first.
        seed: of ranks and draws.
        phases: parts of equal length; with each, a tenth of the ranks on, so that what was popular no longer is. 1 for a
            stream whose popularity never changes.
    """
    chance = random.Random(seed)
    ranked = chance.sample(list(catalogue), len(catalogue))
    weights = [rank**-exponent for rank in range(1, len(ranked) + 1)]
    stream: list[Item] = []
    for phase in range(phases):
        shift = phase * len(ranked) // 10 % len(ranked)
        count = (phase + 1) * length // phases - len(stream)
        stream += chance.choices(ranked[shift:] + ranked[:shift], weights, k=count)
    return stream


def sessions(catalogue: Sequence[Item], length: int, exponent: float = 0.9, *, seed: int = 0) -> list[Item]:
    """Draws in sessions: a topic (some of the catalogue) is chosen by a Zipf law, and some questions in a row are all of it."""
    chance = random.Random(seed)
    mixed = chance.sample(list(catalogue), len(catalogue))
    topics = [mixed[start : start + TOPIC] for start in range(0, len(mixed), TOPIC)]
    weights = [rank**-exponent for rank in range(1, len(topics) + 1)]
    stream: list[Item] = []
    while len(stream) < length:
        stream += chance.choices(chance.choices(topics, weights)[0], k=1 + int(chance.expovariate(1 / TURNS)))
    return stream[:length]


def made(
    catalogue: Sequence[Question], length: int, exponent: float, phases: int, seed: int
) -> dict[str, list[Question]]:
    """Streams of questions, by name; the drifting one has phases."""
    return {
        "stationary": zipf_stream(catalogue, length, exponent, seed=seed),
        "drifting": zipf_stream(catalogue, length, exponent, seed=seed, phases=phases),
        "sessions": sessions(catalogue, length, exponent, seed=seed),
    }


def read_trace(file: Path, price: Callable[[int], float]) -> list[Question]:
    """A log of questions, see the module. What was not answered has no chunks, and is passed over.

    Raises:
        DocumentError: a line is no question, or a chunk in it cannot be told from others.
    """
    stream: list[Question] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        try:
            chunks = [] if not line.strip() else list(_logged(json.loads(line)))
            stream.append([Request(digest(key), tokens, price(tokens)) for key, tokens in chunks])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DocumentError(
                f"{file}, line {number}: expected {{'chunks': [[key, tokens], ...]}}: {error!r}"
            ) from error
    found = [question for question in stream if question]
    if not found:
        raise DocumentError(f"{file}: no chunks in it")
    return found


def _logged(line: dict[str, Any]) -> Iterable[tuple[str, int]]:
    """Key and tokens of each chunk of a line."""
    report = line.get("report", line)
    for chunk in report.get("fusion", report).get("chunks", [] if "error" in line else None):
        if isinstance(chunk, dict):
            if not chunk["document"]:
                raise ValueError("a passage that stands alone has no name in a report: write its key and tokens")
            key, tokens = f"{chunk['document']} {chunk['number']}", chunk["tokens"]
        else:
            key, tokens = chunk
        if not isinstance(key, str) or type(tokens) is not int or tokens < 1:
            raise ValueError(f"a key is a text and tokens are at least 1, got {key!r} and {tokens!r}")
        yield key, tokens


def from_questions(
    file: Path, top_k: int, priced: Callable[[Sequence[str]], list[Request]], embedder: Embedder | None = None
) -> list[Question]:
    """The questions of a data set of ``ragkv eval``, each with what ragkv's retrieval finds among the passages of all."""
    cases = [case for case in retrieve(read_cases(file)[1], top_k, pooled=True, embedder=embedder) if case.question]
    texts = list(dict.fromkeys(case.text(place) for case in cases for place in case.retrieved))
    requests = dict(zip(texts, priced(texts), strict=True))
    return [[requests[text] for text in dict.fromkeys(map(case.text, case.retrieved))] for case in cases]


def read_passages(file: Path) -> list[str]:
    """The passages of a dataset: JSON with ``ctxs`` of ``title`` and ``text``, or LongBench's JSONL.

    Raises:
        DocumentError: the file is neither, or has none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            found = [f"{ctx['title']} {ctx['text']}" for row in json.loads(text) for ctx in row["ctxs"]]
        else:
            contexts = [json.loads(line)["context"] for line in text.split("\n") if line.strip()]
            found = [part.strip() for context in contexts for part in parts(context) if part.strip()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"{file} must be a JSON list of objects with 'ctxs', or JSONL of objects with 'context': {error!r}"
        ) from error
    if not found:
        raise DocumentError(f"{file}: no passages in it")
    return list(dict.fromkeys(found))


def parts(context: str) -> list[str]:
    """LongBench numbers the passages of several documents; one document is cut into paragraphs."""
    numbered = context.split("\nPassage ")
    return numbered if len(numbered) > 1 else context.split("\n\n")


def pricing(model_name: str | None, recorded: Path) -> tuple[Callable[[Sequence[str]], list[Request]], CostProfile]:
    """What makes requests of passages, and the prefill times.

    Args:
        model_name: whose tokens, and whose prefill times, measured now; None for the bundled model's as they were recorded.
        recorded: JSON with ``prefill_seconds`` by tokens, as policies.py writes it.
    """
    if model_name is None:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
        seconds = json.loads(recorded.read_text(encoding="utf-8"))["prefill_seconds"]
        profile = CostProfile((0,), tuple(map(int, seconds)), (tuple(seconds.values()),))
    else:
        logging.disable_progress_bar()  # of loading weights
        model, tokenizer, *_ = load_model(model_name, None, {})
        decoder = Decoder(model)
        profile = measure(Reader(decoder, (), 512), decoder.max_positions or 1 << 30, LIMIT_S)
    private = PrivateTokenizer(tokenizer)

    def priced(passages: Sequence[str]) -> list[Request]:
        counts = [max(len(ids), 1) for ids in private.plain(passages)]
        return [Request(digest(text), count, profile(0, count)) for text, count in zip(passages, counts, strict=True)]

    return priced, profile
