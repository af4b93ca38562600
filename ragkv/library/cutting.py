"""From texts to the chunks that a model reads; nothing is read."""

from __future__ import annotations

from collections.abc import Sequence

from ragkv.chunk import Chunk, digest
from ragkv.errors import ArgumentError, PromptError, PromptTooLongError, half_a_pair, whole_number
from ragkv.library.document import ChunkedDocument, windows
from ragkv.library.given import several
from ragkv.prompt import Encoder, Text

_LONGEST_ID = 200


class Cutting:
    """Cuts documents so that each chunk stands behind as much of its document as a model reads at once.

    Args:
        encoder: turns passages into ids.
        context, document_tokens: see :class:`~ragkv.Engine`.
        positions: of the model; ``None`` for any number.
    """

    def __init__(self, encoder: Encoder, context: str, document_tokens: int | None, positions: int | None):
        if context not in ("document", "chunk"):
            raise ArgumentError(f"context must be 'document' or 'chunk', got {context!r}")
        wanted = 8192 if document_tokens is None else whole_number("document_tokens", document_tokens, 1)
        anchor, positions = len(encoder.anchor), positions or 1 << 30
        if positions <= anchor:
            raise PromptTooLongError(
                f"the anchor has {anchor} tokens and leaves no room in the model's {positions} positions: give a "
                "shorter prefix or anchor"
            )
        self.encoder: Encoder = encoder
        self.context: str = context
        self.document_tokens: int = min(wanted, positions - anchor)

    def cut(
        self,
        parts: Sequence[Text],
        document_id: str = "",
        *,
        behind: Sequence[Chunk | Text] = (),
        any_length: bool = False,
    ) -> ChunkedDocument:
        """A document's chunks, without reading anything.

        Args:
            parts: text or token ids each, in document order.
            document_id: what it is known by; by default a digest of its ids.
            behind: passages of other documents that it is read behind, in order.
            any_length: take parts that are too long too: nothing is read behind them, and they must not be read (:meth:`fits`).

        Raises:
            PromptError, PromptTooLongError: as for :meth:`ragkv.Engine.add`.
        """
        if not isinstance(document_id, str) or len(document_id) > _LONGEST_ID or half_a_pair(document_id):
            said = f"a str of at most {_LONGEST_ID} characters, none of them half a surrogate pair"
            raise PromptError(f"document_id must be {said}; got {document_id!a:.80}")
        encode = self.encoder.chunk if any_length else self._ids
        ids = [encode(part) for part in several(parts, "parts")]
        if not ids:
            raise PromptError("a document has at least one part, got none")
        passages, lengths = several(behind, "behind"), list(map(len, ids))
        front = [each.ids if isinstance(each, Chunk) else self.encoder.chunk(each) for each in passages]
        room = self.document_tokens - sum(map(len, front))
        if front and max(lengths) > room:
            raise PromptTooLongError(
                f"a passage of {max(lengths)} tokens with {self.document_tokens - room} in front of it is {max(lengths) - room} "
                f"more than the {self.document_tokens} that are read at once: give less as behind, or split it into smaller parts"
            )
        firsts = windows(lengths, room) if self.context == "document" else range(len(ids))
        return ChunkedDocument(
            id=document_id or digest(*(["behind", *front] if front else ()), *ids).hex(),
            ids=ids,
            firsts=firsts,
            texts=[part if isinstance(part, str) else None for part in parts],
            fronts=dict.fromkeys(firsts, front) if front else {},
        )

    def fits(self, chunk: Chunk) -> bool:
        """Whether a chunk is no longer than the model reads at once."""
        return len(chunk) <= self.document_tokens

    def passage(self, passage: Text) -> Chunk:
        """The chunk of a passage that stands alone, without reading it."""
        return Chunk(self._ids(passage), passage if isinstance(passage, str) else None)

    def _ids(self, passage: Text) -> tuple[int, ...]:
        ids = self.encoder.chunk(passage)
        if len(ids) > self.document_tokens:
            raise PromptTooLongError(
                f"a passage of {len(ids)} tokens is {len(ids) - self.document_tokens} more than the "
                f"{self.document_tokens} that are read at once: split it into smaller parts"
            )
        return ids
