"""How far the model's reading is, for whoever waits for it; and what was moved to memory for a question before it was asked.

What reads stands deep below what is called, and a question reads only where KV are missing: whoever wants to know is not handed
down but stands in a context variable, so that threads do not hear of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

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
            ``"missing"``: it is read because the store holds its KV no more, or held them for another model.
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
def watched(watch: Watch | None) -> Iterator[None]:
    """Tells ``watch`` of whatever is read inside, by this thread."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def prefetched(moved: Mapping[bytes, Moved]) -> Iterator[None]:
    """For the questions that are asked inside, these chunks came from where they were moved from."""
    token = _moved.set(moved)
    try:
        yield
    finally:
        _moved.reset(token)


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
