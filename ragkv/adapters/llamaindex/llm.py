"""The engine's model as LlamaIndex's language model: for its other parts (titles, sub-questions), not for documents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    astream_completion_response_to_chat_response,
    completion_response_to_chat_response,
    stream_completion_response_to_chat_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.custom import CustomLLM

from ragkv.adapters.parts import model_name, streamed, threads_of, usage
from ragkv.adapters.passages import engine_of
from ragkv.engine import Engine
from ragkv.messages import Question
from ragkv.model.generation import DEFAULT_NEW_TOKENS
from ragkv.rag import RAG
from ragkv.report import AnswerReport
from ragkv.streaming import Threads, stoppable

# What LlamaIndex is told of a model without a limit of positions.
_NO_LIMIT = 1 << 20


class RagKVLLM(CustomLLM):
    """The model of an engine as a LlamaIndex ``LLM``. It is shared with the engine: nothing is loaded twice.

    Whatever is said to it is read: nothing of the documents in a prompt is taken from stored KV. Questions over nodes are the
    :class:`RagKVSynthesizer`'s. Chat messages are written by the tokenizer's chat template. Asynchronous calls leave the event
    loop alone; a task that is cancelled stops the model.

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
            is_chat_model=encoder.template.chat is not None,
            model_name=model_name(self._engine),
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponse:
        """The answer to one text."""
        return self._whole(self._asked(prompt, formatted), **generation)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponseGen:
        """The answer to one text, piece by piece."""
        return self._pieces(self._asked(prompt, formatted), **generation)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **generation: Any) -> CompletionResponse:
        """:meth:`complete` in an event loop, which goes on meanwhile."""
        return await self._awhole(self._asked(prompt, formatted), **generation)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **generation: Any
    ) -> CompletionResponseAsyncGen:
        """:meth:`stream_complete` in an event loop, which goes on meanwhile."""
        return self._apieces(self._asked(prompt, formatted), **generation)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponse:
        """The answer to the last message."""
        return completion_response_to_chat_response(self._whole(_said(messages), **generation))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponseGen:
        """The answer to the last message, piece by piece."""
        return stream_completion_response_to_chat_response(self._pieces(_said(messages), **generation))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponse:
        """:meth:`chat` in an event loop, which goes on meanwhile."""
        return completion_response_to_chat_response(await self._awhole(_said(messages), **generation))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **generation: Any) -> ChatResponseAsyncGen:
        """:meth:`stream_chat` in an event loop, which goes on meanwhile."""
        return astream_completion_response_to_chat_response(self._apieces(_said(messages), **generation))

    def _asked(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _whole(self, question: Question, **generation: Any) -> CompletionResponse:
        answer = self._engine.generate([], question, **{**self.generation, **generation})
        return _response(answer.text, answer.report)

    async def _awhole(self, question: Question, **generation: Any) -> CompletionResponse:
        ask = partial(self._engine.generate, [], question)
        answer = await stoppable(self._threads.pool(), ask, **{**self.generation, **generation})
        return _response(answer.text, answer.report)

    def _pieces(self, question: Question, **generation: Any) -> CompletionResponseGen:
        stream = self._engine.stream([], question, **{**self.generation, **generation})

        def pieces() -> CompletionResponseGen:
            text = ""
            for piece in stream:
                text += piece
                yield CompletionResponse(text=text, delta=piece, raw={"usage": usage(stream.report)})
            yield _response(text, stream.report, delta="")

        return pieces()

    async def _apieces(self, question: Question, **generation: Any) -> CompletionResponseAsyncGen:
        options = {**self.generation, **generation}
        text, stream = "", streamed(self._engine, [], question, self._threads.pool(), options)
        async with aclosing(stream):
            async for piece in stream:
                text += piece
                yield CompletionResponse(text=text, delta=piece, raw={"usage": usage(stream.report)})
        yield _response(text, stream.report, delta="")


def _response(text: str, report: AnswerReport | None, delta: str | None = None) -> CompletionResponse:
    """A whole answer, or the end of a streamed one, which there is also where the model said nothing."""
    raw = {"usage": usage(report), "report": report and report.as_dict()}
    return CompletionResponse(text=text, delta=delta, raw=raw)


def _said(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as the engine takes them, or refuses them by name."""
    return [
        {
            "role": message.role.value,
            "content": [{"type": block.block_type, "text": getattr(block, "text", None)} for block in message.blocks],
            "tool_calls": message.additional_kwargs.get("tool_calls"),
        }
        for message in messages
    ]
