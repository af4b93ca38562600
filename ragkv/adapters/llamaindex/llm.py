"""The engine's model as LlamaIndex's language model: for its other parts (titles, sub-questions), not for documents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
    messages_to_prompt,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from ragkv.adapters.parts import model_name, threads_of, usage
from ragkv.adapters.passages import engine_of
from ragkv.engine import Engine
from ragkv.model.generation import DEFAULT_NEW_TOKENS
from ragkv.rag import RAG
from ragkv.report import Answer
from ragkv.streaming import AsyncAnswerStream, Threads, stoppable

# What LlamaIndex is told of a model without a limit of positions.
_NO_LIMIT = 1 << 20


class RagKVLLM(CustomLLM):
    """The model of an engine as a LlamaIndex ``LLM``. It is shared with the engine: nothing is loaded twice.

    A prompt is one text here, so nothing of the documents in it is taken from stored KV: questions over nodes are the
    :class:`RagKVSynthesizer`'s. Asynchronous calls leave the event loop alone; a task that is cancelled stops the model.

    Args:
        rag: or an engine, with a tokenizer.
        generation: what ``model.generate`` takes, for every call; a call's own arguments come first.
        **fields: of LlamaIndex's ``LLM`` (``system_prompt``, ``callback_manager``, ...).
    """

    generation: dict[str, Any] = Field(default_factory=dict, description="What model.generate takes.")
    _engine: Engine = PrivateAttr()
    _threads: Threads = PrivateAttr()

    def __init__(self, rag: RAG | Engine, generation: dict[str, Any] | None = None, **fields: Any):
        super().__init__(generation=generation or {}, **fields)
        self._engine = engine_of(rag)
        self._threads = threads_of(rag)

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of the class."""
        return "RagKVLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex cuts texts to: the model's positions less those of the template, and the answer's length."""
        encoder, positions = self._engine.encoder, self._engine.decoder.max_positions or _NO_LIMIT
        template = len(encoder.prefix) + len(encoder.suffix("?")) - len(encoder.ids("?"))
        return LLMMetadata(
            context_window=positions - template,
            num_output=self.generation.get("max_new_tokens", DEFAULT_NEW_TOKENS),
            model_name=model_name(self._engine),
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponse:
        """The answer to one text."""
        return _whole(self._engine.generate([], self._asked(prompt, formatted), **{**self.generation, **generation}))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponseGen:
        """The answer to one text, piece by piece."""
        stream = self._engine.stream([], self._asked(prompt, formatted), **{**self.generation, **generation})

        def pieces() -> CompletionResponseGen:
            text = ""
            for piece in stream:
                text += piece
                yield CompletionResponse(text=text, delta=piece, raw={"usage": usage(stream.report)})

        return pieces()

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponse:
        """:meth:`complete` in an event loop, which goes on meanwhile."""
        ask = partial(self._engine.generate, [], self._asked(prompt, formatted))
        return _whole(await stoppable(self._threads.pool(), ask, **{**self.generation, **generation}))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **generation: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` in an event loop, which goes on meanwhile."""
        asked = self._asked(prompt, formatted)

        def start(**options: Any) -> Any:
            return [], self._engine.stream([], asked, **options)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            stream = AsyncAnswerStream(start, self._threads.pool(), **{**self.generation, **generation})
            async with aclosing(stream):
                async for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece, raw={"usage": usage(stream.report)})

        return pieces()

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponse:
        """``chat`` in an event loop, which goes on meanwhile."""
        response = await self.acomplete(self._text(messages), formatted=True, **generation)
        return completion_response_to_chat_response(response)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponseAsyncGen:
        """``stream_chat`` in an event loop, which goes on meanwhile."""
        pieces = await self.astream_complete(self._text(messages), formatted=True, **generation)
        return astream_completion_response_to_chat_response(pieces)

    def _text(self, messages: Sequence[ChatMessage]) -> str:
        return messages_to_prompt(messages) if self.messages_to_prompt is None else self.messages_to_prompt(messages)

    def _asked(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)


def _whole(answer: Answer) -> CompletionResponse:
    raw = {"usage": usage(answer.report), "report": answer.report.as_dict()}
    return CompletionResponse(text=answer.text, raw=raw)
