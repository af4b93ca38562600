"""An engine's documents: read, brought up to date and forgotten."""

from __future__ import annotations

from collections.abc import Sequence

from ragkv.chunk import Chunk
from ragkv.errors import whole_number
from ragkv.library.documents import Documents
from ragkv.library.given import several, several_chunks
from ragkv.library.repair import plan_repair, repair
from ragkv.prompt import Text


class Adding:
    """What an :class:`~ragkv.Engine` does with documents.

    Attributes:
        documents: what the model has read, see :class:`~ragkv.library.documents.Documents`.
    """

    documents: Documents

    def add(self, passages: Sequence[Text], *, namespace: str | None = None) -> list[Chunk]:
        """Read unrelated passages, each behind the anchor alone; what is stored already is not read again.

        Args:
            passages: text or token ids each.
            namespace: instead of the engine's; :meth:`generate` finds them with the same one.

        Returns:
            One chunk a passage, in order.

        Raises:
            PromptError: a passage is empty, or ids are out of the vocabulary.
            PromptTooLongError: a passage is longer than the model reads at once.
            StoreFullError: a chunk does not fit into the store; those before it are stored.
        """
        documents = self.documents.within(namespace)
        chunks = [documents.passage(passage) for passage in several(passages, "passages")]
        documents.add(chunks)
        return chunks

    def add_document(
        self,
        parts: Sequence[Text],
        *,
        document_id: str = "",
        behind: Sequence[Chunk | Text] = (),
        namespace: str | None = None,
    ) -> list[Chunk]:
        """Read one document, given as its consecutive parts; each part becomes a chunk that knows the text before it.

        The document is prefilled as a whole, once, in pieces. Parts in front that are stored already are not read again.

        Args:
            parts: text or token ids each, in document order.
            document_id: what it is known by, so that it may change and stay the same document; by default a digest of its ids,
                and of what it is read behind.
            behind: passages of other documents that it is read behind, in order: its neighbours, as in FusionRAG
                (arXiv:2601.12904). They count in ``document_tokens``, and stand in the document's record.
            namespace: instead of the engine's.

        Returns:
            One chunk a part, in order.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        documents = self.documents.within(namespace)
        document = documents.cut(parts, document_id, behind=behind)
        documents.record(document)
        chunks = list(document)
        documents.add(chunks)
        return chunks

    def repair_document(self, old: Sequence[Chunk], parts: Sequence[Text], behind_tokens: int = 32) -> list[Chunk]:
        """Read a changed document by computing only the changed parts and some tokens behind each (arXiv:2609.17983).

        An approximation: what stands further behind a change keeps what it knew of the text before. The chunks carry a mark, so
        that they are never taken for exact ones. A document of several windows, or one whose old KV are lost, is read as by
        :meth:`add_document`.

        Args:
            old: the chunks of the version before.
            parts: the version now, text or token ids each, in document order.
            behind_tokens: tokens to compute behind every change.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        whole_number("behind_tokens", behind_tokens)
        old = several_chunks(old, "old")
        document = self.documents.cut(parts, old[0].document if old else "")
        plan = plan_repair(self.documents, old, document, behind_tokens)
        if plan is not None and repair(self.documents, plan) is not None:
            document = plan.document
        self.documents.record(document)
        self.documents.add(list(document))
        return list(document)

    def forget(self, chunks: Sequence[Chunk], *, namespace: str | None = None) -> int:
        """Remove chunks' KV from the store, and the records of their documents; returns how many KV were there.

        A prompt that needs a chunk of such a document computes it, and does not store it, until the document is added again.
        Passages that stand alone are of no document: the next prompt that needs one stores it again. Documents of a folder are
        removed by :meth:`RAG.remove`.

        Args:
            chunks: from :meth:`add` or :meth:`add_document`.
            namespace: instead of the engine's.
        """
        return self.documents.within(namespace).forget(chunks)
