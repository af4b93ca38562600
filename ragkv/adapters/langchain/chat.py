"""The chat model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, SecretStr

from ragkv.adapters.found import FoundPassages
from ragkv.adapters.parts import model_name, prompt_tokens, threads_of
from ragkv.adapters.passages import documents_of, engine_of, known_chunks
from ragkv.answering import AnswerStream
from ragkv.chunk import Chunk
from ragkv.engine import Engine
from ragkv.errors import ArgumentTypeError
from ragkv.rag import RAG
from ragkv.report import Answer, AnswerReport
from ragkv.streaming import AsyncAnswerStream, stoppable

_ROLES = {HumanMessage: "user", AIMessage: "assistant", SystemMessage: "system"}


class ChatRagKV(BaseChatModel):
    """ragkv's engine as a chat model.

    Passages that :class:`RagKVRetriever` or :class:`RagKVVectorStore` found, and that stand in front of the question in the last
    user message, each as lines of its own and with nothing between them, are not read again: their KV are taken from the store. All
    else is text, and is computed. A program of its own does better with :func:`create_ragkv_chain`, which gets documents as
    documents.

    ``usage_metadata["input_token_details"]`` says what that saved: ``cache_read`` are tokens of passages placed from the store,
    ``cache_creation`` those of passages read for this prompt, and kept.

    Attributes:
        rag: what answers; whoever made it closes it.
        model: what the model is called in metadata; by default the name or path that it was loaded from.
        temperature: 0: the likeliest token each time; more: sampled. By default what the model's generation config says.
        max_tokens: of the answer.
        stop: a text or several at which the answer ends.
        timeout: seconds after which the answer ends where it is.
        streaming: stream under the hood of ``invoke`` too, so that callbacks hear every piece.
        max_retries, api_key: taken because LangChain's programs give them, and not used: a model in this process is asked once.
        generation: whatever else :meth:`ragkv.Engine.generate` takes. A call's own arguments override all of them.
    """

    model_config = ConfigDict(extra="forbid")

    rag: RAG | Engine
    model: str = ""
    temperature: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    timeout: float | None = None
    streaming: bool = False
    max_retries: int | None = None
    api_key: SecretStr | None = None
    generation: dict[str, Any] = Field(default_factory=dict)

    def model_post_init(self, context: Any, /) -> None:
        """The model's name."""
        super().model_post_init(context)
        self.model = self.model or model_name(self._engine)

    @property
    def _engine(self) -> Engine:
        return engine_of(self.rag)

    @property
    def _llm_type(self) -> str:
        return "ragkv"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        engine = self._engine
        own = {"model": self.model, "setting": engine.documents.setting, "method": str(engine.method)}
        return {**own, **self._options(None, {})}

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text, by the model's own tokenizer."""
        return list(self._engine.encoder.ids(text))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **generation: Any,
    ) -> ChatResult:
        return self._result(*self._whole(messages, **self._options(stop, generation)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **generation: Any,
    ) -> ChatResult:
        whole = partial(self._whole, messages)
        return self._result(*await stoppable(threads_of(self.rag).pool(), whole, **self._options(stop, generation)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **generation: Any,
    ) -> Iterator[ChatGenerationChunk]:
        chunks, pieces = self._pieces(messages, **self._options(stop, generation))
        with closing(pieces):
            for piece in pieces:
                part = _part(piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=part)
                yield part
        yield self._last(chunks, pieces.report)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **generation: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        start = partial(self._pieces, messages)
        async with aclosing(
            AsyncAnswerStream(start, threads_of(self.rag).pool(), **self._options(stop, generation))
        ) as pieces:
            async for piece in pieces:
                part = _part(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=part)
                yield part
        yield self._last(pieces.sources, pieces.report)

    def _whole(self, messages: list[BaseMessage], **options: Any) -> tuple[list[Chunk], Answer]:
        chunks, question = self._asked(messages, options)
        return chunks, self._engine.generate(chunks, question, **options)

    def _pieces(self, messages: list[BaseMessage], **options: Any) -> tuple[list[Chunk], AnswerStream]:
        chunks, question = self._asked(messages, options)
        return chunks, self._engine.stream(chunks, question, **options)

    def _asked(self, messages: list[BaseMessage], options: dict[str, Any]) -> tuple[list[Chunk], Any]:
        """The chunks found in the last message, and the question or the conversation without them."""
        turns = _turns(messages)
        chunks: list[Chunk] = []
        if turns and turns[-1]["role"] == "user":
            passages, rest = FoundPassages.of(self._engine).split(turns[-1]["content"])
            system = turns[0]["content"] if turns[0]["role"] == "system" else options.get("system")
            documents = documents_of(self._engine, {**options, "system": system})
            known = known_chunks(self._engine, passages, documents)
            if len(known) == len(passages):  # else a document has changed since: all is text
                chunks, turns[-1]["content"] = [known[number] for number in range(len(passages))], rest
        return chunks, turns[0]["content"] if [turn["role"] for turn in turns] == ["user"] else turns

    def _options(self, stop: Sequence[str] | None, generation: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the engine; those of the call go before."""
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens, "timeout": self.timeout}
        options = {**_ours(self.generation), **_ours(given), **_ours(generation)}
        ends = self.stop if stop is None else stop
        if ends:
            options["stop"] = ends
        if options.get("temperature") is None:
            options.pop("temperature", None)
        return options

    def _result(self, chunks: list[Chunk], answer: Answer) -> ChatResult:
        message = AIMessage(
            answer.text, usage_metadata=_usage(chunks, answer.report), response_metadata=self._metadata()
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, chunks: list[Chunk], report: AnswerReport | None) -> ChatGenerationChunk:
        usage = None if report is None else _usage(chunks, report)
        metadata = self._metadata()
        last = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata, chunk_position="last")
        return ChatGenerationChunk(message=last)

    def _metadata(self) -> dict[str, Any]:
        return {"model_name": self.model, "model_provider": "ragkv"}


def _ours(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the engine's names; what LangChain's say is left out where it is ``None``."""
    options = dict(given)
    for name, ours in (("max_tokens", "max_new_tokens"), ("timeout", "max_time")):
        if (value := options.pop(name, None)) is not None:
            options[ours] = value
    if (temperature := options.pop("temperature", None)) is not None:
        options |= {"do_sample": bool(temperature), "temperature": temperature or None}
    return options


def _part(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))


def _usage(chunks: Sequence[Chunk], report: AnswerReport) -> UsageMetadata:
    fusion = report.fusion
    tokens = {"placed": 0, "computed": 0, "unused": 0, "late": 0}
    for chunk, source in zip(chunks, fusion.sources, strict=True):
        tokens[source if source in tokens else "placed"] += len(chunk)
    given = prompt_tokens(report)
    return UsageMetadata(
        input_tokens=given,
        output_tokens=report.new_tokens,
        total_tokens=given + report.new_tokens,
        input_token_details=InputTokenDetails(cache_read=tokens["placed"], cache_creation=tokens["computed"]),
    )


def _turns(messages: Sequence[BaseMessage]) -> list[dict[str, str]]:
    """Messages as the engine takes them; neighbours of one role are one.

    Raises:
        ArgumentTypeError: a message of a tool, or content that is no text.
    """
    turns: list[dict[str, str]] = []
    for message in messages:
        role, content = _role(message), _content(message)
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise ArgumentTypeError(
        f"a message must be of the system, the user or the assistant, got a {type(message).__name__}"
    )


def _content(message: BaseMessage) -> str:
    parts = [message.content] if isinstance(message.content, str) else message.content
    texts = [part if isinstance(part, str) else part.get("text") for part in parts]
    kinds = [part["type"] for part in parts if isinstance(part, dict) and part.get("type", "text") != "text"]
    if kinds or not all(isinstance(text, str) for text in texts):
        raise ArgumentTypeError(f"a message must be text, got {(kinds or parts)!r:.80}")
    if getattr(message, "tool_calls", None):
        raise ArgumentTypeError("this model knows no tools: a message must have no tool calls")
    return "".join(map(str, texts))
