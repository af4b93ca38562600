"""How far the model's reading is, for whoever waits for it; and what was moved to memory for a question before it was asked.

What reads stands deep below what is called, and a question reads only where KV are missing: whoever wants to know is not handed
down but stands in a context variable, so that threads do not hear of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ragkv.errors import ArgumentTypeError
from ragkv.retrieval import Hit
from ragkv.store import Moved

#: Called with a document's id, the tokens that the model has run so far, and all that it has to run.
Watch = Callable[[str, int, int], object]

_watch: ContextVar[Watch | None] = ContextVar("ragkv_watch", default=None)
_moved: ContextVar[Mapping[bytes, Moved] | None] = ContextVar("ragkv_moved", default=None)


@dataclass(frozen=True)
class Progress:
    """How far a call is whose documents the model has to read.

    Attributes:
        source: the document that is looked at or read now.
        reason: ``"found"``: it was looked at, and is read later if need be; ``"new"``, ``"changed"``: it is read as it was added;
            ``"missing"``: it is read because the store holds its KV no more, or held them for another model; ``"neighbours"``: it
            is read behind other passages than before.
        done_tokens: what the model has read so far.
        tokens: what it has to read, of all documents that were found so far.
        kv_bytes: what KV that are stored by it will take, estimated; 0 before reading begins, and for a question.
        done_documents: those that were looked at so far; 0 behind that.
        documents: those that there are to look at; 0 behind that.
    """

    source: str
    reason: str
    done_tokens: int
    tokens: int
    kv_bytes: int = 0
    done_documents: int = 0
    documents: int = 0


@contextmanager
def _standing(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def watched(watch: Watch | None) -> AbstractContextManager[None]:
    """Tells ``watch`` of whatever is read inside, by this thread."""
    return _standing(_watch, watch)


def prefetched(moved: Mapping[bytes, Moved]) -> AbstractContextManager[None]:
    """For the questions that are asked inside, these chunks came from where they were moved from."""
    return _standing(_moved, moved)


def moved_for_this() -> Mapping[bytes, Moved]:
    """What was moved to memory for the question that is asked now, by key."""
    return _moved.get() or {}


def counting(tokens: Callable[[], int]) -> Callable[[str, int], object]:
    """Takes a document's id and the tokens of each piece that was run for it, and tells whoever watches here how far that is.

    Args:
        tokens: says how many there will be; asked only where somebody watches.
    """
    watch = _watch.get()
    if watch is None:
        return lambda document, piece_tokens: None
    done, whole = 0, tokens()

    def ran(document: str, piece_tokens: int) -> None:
        nonlocal done
        done += piece_tokens
        watch(document, done, max(done, whole))

    return ran


#: Called with how far it is.
Tell = Callable[[Progress], object]


def check_told(tell: Any) -> None:
    """See that somebody can be told."""
    if tell is not None and not callable(tell):
        raise ArgumentTypeError(f"progress must be a function that takes a ragkv.Progress, got {tell!r:.80}")


def told_of_hits(tell: Tell | None, hits: Sequence[Hit]) -> AbstractContextManager[None]:
    """Watches what is read for a question, of documents that were found."""
    check_told(tell)
    if tell is None:
        return watched(None)
    sources = {hit.document_id: hit.source for hit in hits}
    return watched(lambda document, done, of: tell(Progress(sources.get(document, document), "missing", done, of)))


def told(tell: Tell | None, source: str, reason: str, done: int, total: int, size: int) -> AbstractContextManager[None]:
    """Watches the reading of one document among several."""
    if tell is None:
        return watched(None)
    return watched(lambda _, ran, __: tell(Progress(source, reason, min(done + ran, total), total, size)))
