"""Prompt templates: every segment is tokenised once, on its own, and spliced as ids.

So a chunk's ids never depend on its neighbours, and a stored chunk is found again whatever stands beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ragkv.errors import PromptError, no_question
from ragkv.slots import check_slots, filled, pieces
from ragkv.tokenizer import PrivateTokenizer, never_shown, plain_ids, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger: logging.Logger = logging.getLogger(__name__)

#: Text, or token ids in its place.
Text = str | Sequence[int]
#: Token ids in a template's slots, by name.
Slots = Mapping[str, tuple[int, ...]]

#: Marks that a chat template is rendered around.
CHUNKS, QUESTION = "\u2983ragkv chunks\u2984", "\u2983ragkv question\u2984"
#: What stands between passages and question where a chat template is used.
BEFORE_QUESTION = "Question: "


@dataclass(frozen=True)
class PromptTemplate:
    """The parts of a prompt: prefix, then every chunk in its wrapper, then the question in its own. Each is text or ids.

    Attributes:
        prefix: what every prompt begins with; a tokenizer that puts a BOS in front puts it here, once, and nowhere else.
        anchor: what documents are prefilled behind; ``None``: the prefix itself, and then reuse in place is exact. A fixed neutral
            text lets the prefix change without reading the documents again. It begins with BOS like the prefix.
        before_chunk: stands before every chunk.
        after_chunk: stands behind every chunk.
        before_question: stands between the chunks and the question.
        after_question: stands behind the question (the assistant header).
        after_answer: stands behind an earlier answer, where a conversation is not written by a chat template.
        stop: a text or several at which an answer ends; they are no part of it.
        slots: names that stand in braces in ``before_question`` or ``after_question``, as ``{language}``, each with what stands
            there where a call says nothing else (``slots={"language": "German"}``). It is data, and holds no special tokens. Other
            braces are text. One called ``ranks`` is filled by ``RAG``: the passages' places in the prompt, the most relevant first.
        chat: the arguments of :meth:`from_chat_template`, where it made this one: chat messages are written with them. Elsewhere
            every turn is written as the question is (:mod:`ragkv.messages`).
    """

    prefix: Text = ""
    anchor: Text | None = None
    before_chunk: Text = ""
    after_chunk: Text = ""
    before_question: Text = ""
    after_question: Text = ""
    after_answer: Text = ""
    stop: str | Sequence[str] = ()
    chat: Mapping[str, Any] | None = None
    slots: Mapping[str, Text] = field(default_factory=dict)

    def __post_init__(self) -> None:
        others = ("prefix", "anchor", "before_chunk", "after_chunk", "after_answer")
        check_slots(
            self.slots,
            (self.before_question, self.after_question),
            {name: getattr(self, name) for name in others},
        )

    @classmethod
    def from_chat_template(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        instruction: str = "Answer the question with the help of these passages.",
        after_chunk: str = "\n\n",
        before_question: str = BEFORE_QUESTION,
        slots: Mapping[str, Text] | None = None,
        **chat_options: Any,
    ) -> PromptTemplate:
        """Render the tokenizer's chat template around marks and cut it there.

        Args:
            tokenizer: must have a chat template.
            system: the system message, if any.
            instruction: begins the user's message, before the passages.
            after_chunk: stands behind every passage.
            before_question: stands between the passages and the question; may have slots.
            slots: see the class.
            **chat_options: for ``apply_chat_template``, ``enable_thinking=False`` say.

        Raises:
            PromptError: no chat template, or one that fails or does not carry the user's message through whole; what should be
                a text is none.
        """
        for name, text in (
            ("system", system or ""),
            ("instruction", instruction),
            ("before_question", before_question),
        ):
            if not isinstance(text, str):
                raise PromptError(f"{name} stands in a chat template's message and must be a text, got {text!r:.80}")
        if not getattr(tokenizer, "chat_template", None):
            asked = " for a system message" if system else ""
            raise PromptError(
                f"the tokenizer has no chat template{asked}: give PromptTemplate(prefix=..., ...) instead"
            )
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": asking(instruction, before_question)})
        rendered = render(tokenizer, messages, chat_options)
        long_ago = _long_ago(tokenizer)
        if long_ago and rendered != render(tokenizer, messages, {"chat_template": long_ago, **chat_options}):
            logger.warning(
                "the chat template writes today's date into the prefix, so every document will be read again tomorrow: "
                "fix the date (date_string=... with Llama 3), or give the template an anchor="
            )
        if not isinstance(rendered, str) or rendered.count(CHUNKS) != 1 or rendered.count(QUESTION) != 1:
            raise PromptError(
                "the tokenizer's chat template changes the user's message: give PromptTemplate(...) yourself"
            )
        prefix, rest = rendered.split(CHUNKS)
        if system and system.strip() not in prefix:
            raise PromptError(
                "the tokenizer's chat template leaves the system message out: give PromptTemplate(prefix=...)"
            )
        chat = {
            "system": system,
            "instruction": instruction,
            "after_chunk": after_chunk,
            "before_question": before_question,
        }
        before_question, after_question = rest.split(QUESTION)
        return cls(
            prefix=prefix,
            after_chunk=after_chunk,
            before_question=before_question,
            after_question=after_question,
            chat={**chat, **chat_options},
            slots=slots or {},
        )

    @classmethod
    def default(cls, tokenizer: PreTrainedTokenizerBase | None) -> PromptTemplate:
        """The chat template's parts where there is one, a plain question-answer form otherwise; nothing without tokenizer.

        A base model goes on with a question of its own: the plain form's answers end there.
        """
        if tokenizer is None:
            return cls()
        if getattr(tokenizer, "chat_template", None):
            return cls.from_chat_template(tokenizer)
        stop = ("\n\nQuestion:", "\nQuestion:", "Question:")
        plain: dict[str, Any] = {"before_question": "Question: ", "after_question": "\nAnswer:", "after_answer": "\n\n"}
        return cls(after_chunk="\n\n", stop=stop, **plain)


def asking(instruction: str, before_question: str = BEFORE_QUESTION) -> str:
    """The user's message that passages and a question are put into, with marks in their places."""
    return f"{instruction}\n\n{CHUNKS}{before_question}{QUESTION}"


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], options: dict[str, Any]) -> Any:
    """Messages as the tokenizer's chat template writes them, the assistant's header behind them.

    Raises:
        PromptError: the template fails, or takes no such options.
    """
    written = {"tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **written, **options)
    except Exception as error:  # a template is a program
        own = sorted(written.keys() & options.keys())
        hint = f"leave out {own[0]}=" if own else "has it no place for a system message?"
        raise PromptError(f"the tokenizer's chat template fails: {error} ({hint})") from error


def _long_ago(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template as it would render in another year."""
    template = tokenizer.chat_template
    if not isinstance(template, str):  # several, by name
        return None
    return "{% macro long_ago(form) %}1 Jan 2000{% endmacro %}" + template.replace("strftime_now", "long_ago")


class Encoder:
    """A template and a tokenizer: turns text into the ids of each segment.

    Args:
        template: the parts.
        tokenizer: ``None`` where everything is given as ids.
        vocab_size: ids must be below it.

    Raises:
        PromptError: text without a tokenizer, or ids out of the vocabulary.
    """

    def __init__(self, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int):
        self.template: PromptTemplate = template
        self.tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self.vocab_size: int = vocab_size
        self._private = None if tokenizer is None else PrivateTokenizer(tokenizer)
        self._hidden = never_shown(tokenizer)
        parts = {part.name: getattr(template, part.name) for part in fields(template)}
        self.prefix: tuple[int, ...] = self._opening(parts["prefix"])
        self.anchor: tuple[int, ...] = self.prefix if template.anchor is None else self._opening(parts["anchor"])
        self._before_chunk = self.ids(parts["before_chunk"], trusted=True)
        self._after_chunk = self.ids(parts["after_chunk"], trusted=True)
        self._before_question = self._cut(parts["before_question"])
        self._after_question = self._cut(parts["after_question"])
        self._slots: Slots = {name: self.ids(text) for name, text in template.slots.items()}
        self.after_answer: tuple[int, ...] = self.ids(parts["after_answer"], trusted=True)

    def chunk(self, passage: Text) -> tuple[int, ...]:
        """A passage's ids with its wrapper.

        Raises:
            PromptError: the passage is empty.
        """
        inner = self.ids(passage)
        if not inner:
            raise PromptError("a chunk is empty: give at least one token of text (whitespace alone may be none)")
        return (*self._before_chunk, *inner, *self._after_chunk)

    def suffix(self, question: Text, slots: Slots | None = None) -> tuple[int, ...]:
        """The question's ids and what stands around it.

        Args:
            question: text or ids.
            slots: of :meth:`slots`; what stands there by default.

        Raises:
            PromptError: the question is empty, or is none.
        """
        slots = self.slots() if slots is None else slots
        around = _spliced(self._before_question, slots), _spliced(self._after_question, slots)
        return (*around[0], *self.question(question), *around[1])

    def slots(self, given: Mapping[str, Text] | None = None, ranks: str = "") -> Slots:
        """The ids in each of the template's slots in one call.

        Args:
            given: what the call says stands there.
            ranks: as of :func:`ragkv.slots.filled`.

        Raises:
            PromptError: the template has no such slot, or what is given is neither text nor ids.
        """
        return {name: self.ids(text) for name, text in filled(self._slots, given, ranks).items()}

    def own(self, text: Text, slots: Slots) -> tuple[int, ...]:
        """The ids of the template's own text, with its slots filled."""
        return _spliced(self._cut(text), slots)

    def question(self, question: Text) -> tuple[int, ...]:
        """The question's ids.

        Raises:
            PromptError: the question is empty, or is none.
        """
        parts = list(question) if isinstance(question, list | tuple) else []
        texts = len(parts) > 1 and all(isinstance(part, str) for part in parts)
        if texts or any(isinstance(part, Mapping) and "role" in part for part in (question, *parts)):
            raise PromptError(no_question(question))
        inner = self.ids(question)
        if not inner:
            raise PromptError("the question is empty: give at least one token")
        return inner

    def ids(self, text: Text, *, trusted: bool = False) -> tuple[int, ...]:
        """Token ids of a segment on its own; ids are checked and passed through.

        Args:
            text: text or ids.
            trusted: the text may hold special tokens. In documents and questions they are read as plain text, so that a document
                cannot end the user's turn.
        """
        ids = self._encoded(text, trusted) if isinstance(text, str) else plain_ids(text)
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise PromptError(
                f"token id {wrong[0]} is out of the model's vocabulary: ids must be in 0 .. {self.vocab_size - 1} "
                "(where the tokenizer was given more tokens, call model.resize_token_embeddings)"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, special tokens left out; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        hidden = self._hidden
        if hidden is None:
            return text_of(self.tokenizer, ids, skip_special_tokens=True)
        return text_of(self.tokenizer, [i for i in ids if i not in hidden])

    def _cut(self, text: Text) -> list[Any]:
        """The ids of the template's own text and the names of its slots by turns, each piece encoded on its own."""
        parts = pieces(text, list(self.template.slots))
        return [part if number % 2 else self.ids(part, trusted=True) for number, part in enumerate(parts)]

    def _encoded(self, text: str, trusted: bool) -> tuple[int, ...]:
        if not text:
            return ()
        if self._private is None:
            raise PromptError(
                f"got text ({text[:40]!r}) but the engine has no tokenizer: give token ids, or a tokenizer"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"text must be valid Unicode, got half a surrogate pair at {error.start}") from error
        return tuple(self._private.trusted(text) if trusted else self._private.plain([text])[0])

    def _opening(self, text: Text) -> tuple[int, ...]:
        ids = self.ids(text, trusted=True)
        return self.opened(ids) if isinstance(text, str) else ids

    def opened(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The ids that a prompt begins with, behind the BOS that the tokenizer puts in front, once."""
        bos = () if self._private is None else self._private.bos()
        return ids if ids[: len(bos)] == bos else (*bos, *ids)


def _spliced(pieces: Sequence[Any], slots: Slots) -> tuple[int, ...]:
    return tuple(i for part in pieces for i in (slots[part] if isinstance(part, str) else part))
