"""What one worker does: it reads documents, and says that they are read when the pool has their KV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ragkv.chunk import digest
from ragkv.distributed.batches import batches
from ragkv.distributed.desk import DEATHS, Desk
from ragkv.distributed.outbox import Outbox
from ragkv.distributed.results import Result
from ragkv.errors import DocumentError, RagKVError, UploadError
from ragkv.library.preparing import cut_text
from ragkv.opening import open_engine
from ragkv.retrieval.converter import Converter
from ragkv.retrieval.loaders import text_of
from ragkv.retrieval.records import checked_document, source_id
from ragkv.store.remote import RemoteTier
from ragkv.store.remote.pool import PoolError


class Worker:
    """Reads documents as :meth:`ragkv.RAG.add_files` and :meth:`~ragkv.RAG.add_texts` do, into a pool alone.

    Args:
        options: of :func:`ragkv.opening.settled`.
        remote, cpu_bytes, batch_bytes, upload_s, encoding: of :func:`ragkv.distributed.precompute`.
        desk: has the files, and knows what others died of.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        remote: str | Callable[[], RemoteTier],
        *,
        cpu_bytes: int,
        batch_bytes: int,
        upload_s: float,
        encoding: str | None,
        desk: Desk,
    ) -> None:
        self._desk, self._batch_bytes, self._encoding = desk, batch_bytes, encoding
        self._store: Outbox
        with ExitStack() as opened:
            self._converter = opened.enter_context(Converter())

            def outbox() -> Outbox:
                pool = RemoteTier(remote) if isinstance(remote, str) else remote()
                self._store = Outbox(pool, cpu_bytes, options.get("codec", "raw"), upload_s)
                return self._store

            engine, self._chunker = open_engine(options, outbox, opened)
            self._documents = engine.documents
            self._opened = opened.pop_all()

    def read(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Result]]:
        """Read documents, in batches of about the same length; what is yielded is in the pool.

        Args:
            rows: with ``text``, and ``source`` for its name; or with ``bytes`` of a file of the name ``path``; or with a ``source``
                alone, which the desk has.

        Raises:
            UploadError: the pool does not take what was computed.
        """
        for numbers in batches([_length(row) for row in rows], self._batch_bytes):
            done = [self._read(rows[number]) for number in numbers]
            self._store.sent()
            yield self._checked(done)

    def close(self) -> None:
        """Close what is open. Closing twice is fine."""
        self._opened.close()

    def _read(self, row: Mapping[str, Any]) -> tuple[Result, list[bytes]]:
        """One document, and the keys of its KV, which are there or on their way."""
        source = _source(row)
        document = digest(*(str(row.get(name, "")).encode(errors="replace") for name in ("source", "path", "text")))
        try:
            if self._desk.begin(document) > DEATHS:
                raise DocumentError(f"given up: {DEATHS} workers died while they read it; is their memory too small?")
            result = self._computed(source, self._text(row))
        except (UploadError, torch.AcceleratorError):
            # It is not the document's fault, and another one would fare no better.
            self._desk.end(document)
            raise
        except Exception as error:
            result = Result(source, reason=_reason(error)), []
        self._desk.end(document)
        return result

    def _computed(self, source: str, text: str) -> tuple[Result, list[bytes]]:
        checked_document(source, [text], None)
        documents = self._documents
        passages = cut_text(source, text, self._chunker.spans(text))
        document = documents.cut(passages, source_id(source, documents.namespace))
        read = documents.add_once(document)
        tokens = sum(map(len, document.ids))
        return Result(source, len(passages), tokens, read, setting=documents.setting), documents.keys_of(document)

    def _checked(self, done: Sequence[tuple[Result, list[bytes]]]) -> list[Result]:
        """Results, with the reason where not all of a document is in the pool, also where nothing was computed."""
        all_keys = [key for _, keys in done for key in keys]
        try:
            lost = self._store.lost(all_keys)
            why = "is it full, are they too large for it, or is cpu_bytes too small for them to wait in?"
        except PoolError as error:
            lost, why = set(all_keys), f"it does not say that they are: {error}"
        checked = list[Result]()
        for result, keys in done:
            count = len(lost.intersection(keys))
            missed = f"{count} of its {result.passages} passages are not in the pool: {why}"
            checked.append(result._replace(reason=missed) if count else result)
        return checked

    def _text(self, row: Mapping[str, Any]) -> str:
        if "text" in row:
            if not isinstance(row["text"], str):
                raise DocumentError(f"its text is no str: {row['text']!r:.80}")
            return row["text"]
        path = _source(row)
        data = row["bytes"] if "bytes" in row else self._desk.read(path)
        if not isinstance(data, bytes):
            raise DocumentError(f"its bytes are none: {data!r:.80}")
        return text_of(Path(path), data, self._converter, self._encoding)[0]


def _source(row: Mapping[str, Any]) -> str:
    """What a document is called; one that has no name by its text, as :meth:`ragkv.RAG.add_texts` does."""
    named = row.get("source") or row.get("path")
    return str(named) if named else f"text:{digest(str(row.get('text')).encode(errors='replace')).hex()[:16]}"


def _length(row: Mapping[str, Any]) -> int:
    return next((len(row[name]) for name in ("text", "bytes") if isinstance(row.get(name), str | bytes)), 0)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, RagKVError) else f"{type(error).__name__}: {error}"
