"""The engine: documents go in once, prompts over their stored keys and values come out."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

from transformers import PreTrainedModel

from ragkv.answering import Answering
from ragkv.chunk import Chunk
from ragkv.detokenizer import stop_texts
from ragkv.errors import (
    ArgumentError,
    ArgumentTypeError,
    ModelChangedError,
    PromptError,
    PromptTooLongError,
    RecordError,
    instance,
    whole_number,
)
from ragkv.fuse import fuse
from ragkv.fusion.layout import Layout, lay_out
from ragkv.kernels import Impl
from ragkv.library.documents import Documents, several, several_chunks
from ragkv.methods import Method, SensitiveTokens
from ragkv.methods.words import parse_method
from ragkv.model.decoder import Decoder
from ragkv.model.generation import DEFAULT_NEW_TOKENS, Settings
from ragkv.model.runner import Runner
from ragkv.prompt import Encoder, PromptTemplate, Text
from ragkv.report import Answer, AnswerStream, FusedPrompt
from ragkv.store import TieredStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# How often a prompt begins anew because the model was changed meanwhile.
_TRIES = 3


class Engine:
    """Answers over documents that the model has already read.

    An engine may be used from several threads; the model runs for one of them at a time, a piece of reading or a question each.
    It never changes the model.

    Args:
        model: any transformers decoder with rotary positions, in eval mode.
        tokenizer: ``None`` where everything is given as token ids.
        store: where KV are kept; CPU memory by default.
        method: how prompts are put together, unless a call says otherwise: a method, or its name as on the command line
            (``"auto"``, ``"reuse"``, ``"lego-link:k=16"``); :class:`~ragkv.SensitiveTokens` by default.
        template: the prompt's parts; by default from the tokenizer's chat template, or a plain question-answer form.
        context: ``"document"``: chunks of a document are read behind its earlier text; ``"chunk"``: each one alone.
        document_tokens: a longer document is read in windows of at most this many tokens, each behind the last quarter of the
            one before. It bounds the memory of reading. Default: 8192, or the model's positions if fewer.
        piece_tokens: tokens that one forward pass computes; it bounds the memory that the model takes.
        namespace: chunks stored under another namespace are never found.
        sensitivity: measure how sensitive each token is to the text in front of its document, for methods that need it; every
            document is read twice for that. By default if ``method`` does. Where a single call's method does, what was not
            measured is read again.
        foreign: text or ids of what documents are read behind the second time; by default five short English paragraphs
            (:mod:`ragkv.library.sensitivity`). With another text they are measured anew.
        kernels: which implementation of ``ragkv.kernels`` runs: ``"triton"``, ``"reference"``, or ``"auto"``: Triton on a GPU.
        lifetime_s: seconds after which stored KV are a miss, and read again.

    Attributes:
        documents: what the model has read, see :class:`~ragkv.library.documents.Documents`.
        encoder: turns text into ids.

    Raises:
        UnsupportedModelError: the model cannot be driven exactly; the message says why.
        ArgumentTypeError: something is not what it must be: a model's name in place of the model, say.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        store: TieredStore | None = None,
        method: Method | str | None = None,
        template: PromptTemplate | None = None,
        context: str = "document",
        document_tokens: int | None = None,
        piece_tokens: int = 512,
        namespace: str = "",
        sensitivity: bool | None = None,
        foreign: Text | None = None,
        kernels: Impl = "auto",
        lifetime_s: float = math.inf,
    ):
        self.method = _method(SensitiveTokens() if method is None else method)
        _check_parts(model, tokenizer, store, template)
        self.model, self.tokenizer = model, tokenizer
        self.template = template or PromptTemplate.default(tokenizer)
        self.store = TieredStore() if store is None else store
        self.runner = Runner.of(model)
        vocab_size = self.runner.decoder(kernels, self.store).vocab_size
        self.encoder = Encoder(self.template, tokenizer, vocab_size)
        self.documents = Documents(
            self.runner,
            self.encoder,
            self.store,
            context=context,
            document_tokens=document_tokens,
            piece_tokens=piece_tokens,
            namespace=namespace,
            sensitivity=self.method.needs_sensitivity if sensitivity is None else sensitivity,
            foreign=foreign,
            kernels=kernels,
            lifetime_s=lifetime_s,
        )
        self.documents.reader.opening(self.encoder.prefix, "prefix")

    @property
    def decoder(self) -> Decoder:
        """The model as fusion sees it."""
        return self.runner.decoder(self.documents.kernels)

    def add(self, passages: Sequence[Text]) -> list[Chunk]:
        """Read unrelated passages, each behind the anchor alone; what is stored already is not read again.

        Args:
            passages: text or token ids each.

        Returns:
            One chunk a passage, in order.

        Raises:
            PromptError: a passage is empty, or ids are out of the vocabulary.
            PromptTooLongError: a passage is longer than the model reads at once.
            StoreFullError: a chunk does not fit into the store; those before it are stored.
        """
        chunks = [self.documents.passage(passage) for passage in several(passages, "passages")]
        self.documents.add(chunks)
        return chunks

    def add_document(self, parts: Sequence[Text], *, document_id: str = "") -> list[Chunk]:
        """Read one document, given as its consecutive parts; each part becomes a chunk that knows the text before it.

        The document is prefilled as a whole, once, in pieces. Parts in front that are stored already are not read again.

        Args:
            parts: text or token ids each, in document order.
            document_id: what it is known by, so that it may change and stay the same document; by default a digest of its ids.

        Returns:
            One chunk a part, in order.

        Raises:
            PromptError, PromptTooLongError, StoreFullError: as for :meth:`add`.
        """
        document = self.documents.cut(parts, document_id)
        self.documents.record(document)
        chunks = list(document)
        self.documents.add(chunks)
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
        repair = self.documents.plan_repair(old, document, behind_tokens)
        if repair is not None and self.documents.repair(repair) is not None:
            document = repair.document
        self.documents.record(document)
        self.documents.add(list(document))
        return list(document)

    def forget(self, chunks: Sequence[Chunk]) -> int:
        """Remove chunks' KV from the store, and the records of their documents; returns how many KV were there.

        A prompt that needs a chunk of such a document computes it, and does not store it, until the document is added again.
        Passages that stand alone are of no document: the next prompt that needs one stores it again. Documents of a folder are
        removed by :meth:`RAG.remove`.
        """
        return self.documents.forget(chunks)

    def refresh(self) -> None:
        """Look at every weight of the model again.

        Weights that were replaced or written in place, and adapters that were switched, merged or loaded are noticed without it.
        Writes that PyTorch does not count are not: call this after ``parameter.data.copy_(...)`` and the like.
        """
        self.runner.refresh()

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fuse(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        *,
        method: Method | str | None = None,
        room_tokens: int | None = None,
        starts: Sequence[int] | None = None,
    ) -> FusedPrompt:
        """Put prefix, chunks and question together as one prompt, computing only what the method asks for.

        Chunks that the store has lost are read again, in the context that they had.

        Args:
            chunks: from :meth:`add` or :meth:`add_document`, in the order of the prompt; text or ids are added on the way. May be
                empty, and may hold a chunk twice.
            question: text or token ids; not empty.
            method: instead of the engine's.
            room_tokens: room that the cache keeps for an answer; by default 64, or as much as the model's positions leave.
            starts: position of each chunk's first token, where chunks shall stand apart or share positions (as in APE,
                arXiv:2502.05431); by default each stands right behind the one before. A decoding loop of your own goes on at
                ``prompt.next_position``; layers with windows count slots there, as transformers does.

        Raises:
            PromptError: an empty question or chunk, or ids out of the vocabulary.
            PromptTooLongError: the prompt, and the room that was asked for, exceed the model's positions.
        """
        begin = perf_counter()
        if room_tokens is not None:
            whole_number("room_tokens", room_tokens)
        chosen = self.method if method is None else _method(method)
        return self._prompt(chunks, question, chosen, lambda _: room_tokens, begin, starts)

    def _prompt(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        method: Method,
        asked: Callable[[int], int | None],
        begin: float,
        starts: Sequence[int] | None = None,
    ) -> FusedPrompt:
        """One prompt, with the room that ``asked`` says for a prompt of so many tokens."""
        suffix = self.encoder.suffix(question)
        known = self._chunks(chunks)
        places = None if starts is None else several(starts, "starts")
        layout = lay_out(self.encoder.prefix, self.encoder.anchor, known, suffix, self.decoder.device, places)
        return self._fuse(layout, method, self._room(layout.end, asked(layout.end)), begin)

    def generate(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        *,
        method: Method | str | None = None,
        stop: str | Sequence[str] = (),
        **generation: Any,
    ) -> Answer:
        """Answer a question over chunks.

        Args:
            chunks: as for :meth:`fuse`.
            question: as for :meth:`fuse`.
            method: instead of the engine's.
            stop: a text or several at which the answer ends, besides the template's; they are no part of it, while
                ``stop_strings``, as in transformers, are.
            **generation: what ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``stop_strings``, ``num_beams``, ...
                Each does what it does there, or is refused; the model's own generation config holds for the rest.

        Raises:
            As :meth:`fuse`; UnknownArgumentError (a ``TypeError``) and ArgumentError (a ``ValueError``) for generation arguments;
            NonFiniteError where the logits are NaN or infinite; ModelChangedError where the model changes in the middle of the
            answer.
        """
        begin = perf_counter()
        return self._answering(chunks, question, method, stop, generation).whole(begin)

    def stream(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        *,
        method: Method | str | None = None,
        stop: str | Sequence[str] = (),
        **generation: Any,
    ) -> AnswerStream:
        """Answer a question over chunks, piece by piece as text.

        The prompt is fused when the first piece is asked for.

        Args:
            chunks: as for :meth:`fuse`.
            question: as for :meth:`fuse`.
            method: instead of the engine's.
            stop: as for :meth:`generate`; not even half a stop text is shown.
            **generation: as for :meth:`generate`; no beams.

        Returns:
            The pieces; joined they are the answer's text. Its ``report`` and ``token_ids`` grow with them.

        Raises:
            As :meth:`generate`, arguments at once and all else when the first piece is asked for; PromptError where the engine has
            no tokenizer.
        """
        if self.tokenizer is None:
            raise PromptError("streaming yields text and the engine has no tokenizer: use generate()")
        return self._answering(chunks, question, method, stop, generation, pieces=True).pieces()

    def _answering(
        self,
        chunks: Sequence[Chunk | Text],
        question: Text,
        method: Method | str | None,
        stop: str | Sequence[str],
        generation: dict[str, Any],
        pieces: bool = False,
    ) -> Answering:
        """What answers, with all arguments checked before anything is computed."""
        texts = (*stop_texts(self.template.stop), *stop_texts(stop))
        if texts and self.tokenizer is None:
            raise ArgumentError(
                f"stop={texts} is text and the engine has no tokenizer: give it one, or stopping_criteria=[...]"
            )
        settings = Settings(self.decoder, self.tokenizer, generation, texts)
        if pieces and settings.beams > 1:
            raise ArgumentError(
                "num_beams: beam search knows its text only at the end: use generate(), or leave it out"
            )
        chosen = self.method if method is None else _method(method)
        return Answering(
            self.runner,
            self.encoder,
            settings,
            lambda asked, begin: self._prompt(chunks, question, chosen, asked, begin),
        )

    def _chunks(self, chunks: Sequence[Chunk | Text]) -> list[Chunk]:
        """Chunks as they are; text and ids as passages that stand alone."""
        known = [
            chunk if isinstance(chunk, Chunk) else self.documents.passage(chunk) for chunk in several(chunks, "chunks")
        ]
        for chunk in known:
            if max(chunk.ids) >= self.encoder.vocab_size:
                self.encoder.ids(chunk.ids)  # says which
        return known

    def _room(self, tokens: int, asked: int | None) -> int:
        """Room for an answer; its last token takes no position, for the model never runs it."""
        limit = self.decoder.max_positions
        if limit is not None and tokens > limit:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens, {tokens - limit} more than the model's {limit} positions: give fewer or shorter "
                "chunks"
            )
        left = None if limit is None else limit + 1 - tokens
        if left is None or (asked is not None and asked <= left):
            return DEFAULT_NEW_TOKENS if asked is None else asked
        if asked is not None:
            raise PromptTooLongError(
                f"the prompt's {tokens} tokens leave room for {left} more in the model's {limit} positions, and {asked} were asked "
                "for: give fewer or shorter chunks, or ask for a shorter answer"
            )
        return min(DEFAULT_NEW_TOKENS, left)

    def _fuse(self, layout: Layout, method: Method, room_tokens: int, begin: float) -> FusedPrompt:
        """One prompt; begun anew when a record proves damaged, which the store has dropped then, or the model has changed."""
        damaged: set[str] = set()
        for _ in range(len(layout.chunks) + _TRIES):
            try:
                return fuse(self.documents, layout, method, room_tokens, begin)
            except ModelChangedError as error:
                logger.warning("fusing again: %s", error)
            except RecordError as error:
                if str(error) in damaged:
                    raise  # it was not dropped
                damaged.add(str(error))
                logger.warning("reading chunks again: %s", error)
        return fuse(self.documents, layout, method, room_tokens, begin)


def _check_parts(model: Any, tokenizer: Any, store: Any, template: Any) -> None:
    if isinstance(model, str | os.PathLike):
        raise ArgumentTypeError(
            f"model must be a transformers model, got the name {os.fspath(model)!r}: load it first with "
            "AutoModelForCausalLM.from_pretrained(...), or use ragkv.RAG.from_pretrained(...)"
        )
    if tokenizer is not None and not callable(tokenizer):
        raise ArgumentTypeError(
            f"tokenizer must be a transformers tokenizer, got {tokenizer!r:.80}: load it first with "
            "AutoTokenizer.from_pretrained(...)"
        )
    instance("store", store, TieredStore | None, "a ragkv.TieredStore, as ragkv.TieredStore('kv/')")
    instance(
        "template", template, PromptTemplate | None, "a ragkv.PromptTemplate, as ragkv.PromptTemplate(prefix='...')"
    )


def _method(method: Method | str) -> Method:
    if isinstance(method, str):
        return parse_method(method)
    if not isinstance(method, Method):
        raise ArgumentTypeError(
            f"method must be a ragkv.Method, as ragkv.LegoLink(k=16), or its name, as 'lego-link:k=16'; got {method!r}"
        )
    return method
