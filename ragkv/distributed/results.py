"""What became of documents that were read for a pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from ragkv.errors import RagKVError


class Result(NamedTuple):
    """What became of one document.

    Attributes:
        source: what it is called.
        passages: that it was cut into.
        tokens: of all of them.
        tokens_read: of those that the pool lacked.
        reason: why it is not in the pool; empty where it is.
        setting: what the keys of its KV hang on besides its text: the same where the same model reads in the same way.
    """

    source: str
    passages: int = 0
    tokens: int = 0
    tokens_read: int = 0
    reason: str = ""
    setting: str = ""


@dataclass
class Precomputed:
    """What reading documents for a pool did.

    Attributes:
        documents: whose KV are in the pool now, all of them.
        skipped: of these, those whose KV were there before.
        passages, tokens: of these documents.
        tokens_read: that were computed; 0 where everything was there.
        failed: documents whose KV are not in the pool, or not all: the reasons, by source.
        seconds: that it took.
        setting: what the keys of the KV hang on besides the texts: equal to ``rag.engine.documents.setting`` where a ``rag`` finds
            them. Empty where no document was read.
    """

    documents: int = 0
    skipped: int = 0
    passages: int = 0
    tokens: int = 0
    tokens_read: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    setting: str = ""


def gathered(
    results: Iterable[Result], failed: Mapping[str, str], tell: Callable[[str, int], object] = lambda source, done: None
) -> Precomputed:
    """All results together.

    Args:
        results: as they come.
        failed: what could not even be given to a worker, with reasons.
        tell: told of each, with how many there are so far.

    Raises:
        RagKVError: workers do not read alike: none would find what another has read.
    """
    begin, done = perf_counter(), Precomputed(failed=dict(failed))
    for count, result in enumerate(results, 1):
        done.tokens_read += result.tokens_read
        if result.reason:
            done.failed[result.source] = result.reason
        else:
            done.setting = done.setting or result.setting
            if result.setting != done.setting:
                raise RagKVError(
                    f"workers do not read alike, as {result.source} shows: their models, dtypes, devices or versions differ, and "
                    "none finds what another has computed. Make them alike and run it again: what is in the pool stays"
                )
            done.documents += 1
            done.skipped += not result.tokens_read
            done.passages += result.passages
            done.tokens += result.tokens
        tell(result.source, count)
    done.seconds = perf_counter() - begin
    return done
