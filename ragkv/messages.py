"""Chat messages as token ids: roles are the template's, what people said is plain text.

The tokenizer's chat template is rendered around marks and cut there; its own text may hold special tokens, messages may not. A
template that was not made from a chat template writes every turn as it writes the question: ``before_question``, the user's text,
``after_question``, the assistant's text, ``after_answer``; a system message stands behind its prefix, with an empty line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from ragkv.errors import ArgumentError, ArgumentTypeError, PromptError, listable
from ragkv.prompt import BEFORE_QUESTION, CHUNKS, QUESTION, Encoder, Slots, Text, asking, render

#: What is asked: text or ids, or chat messages of which the last one is the user's.
Question = Text | Sequence[Mapping[str, Any]]

_ROLES = ("system", "user", "assistant")
_MUST = "messages must be a list of {'role': ..., 'content': ...}"


class Message(NamedTuple):
    """What somebody said; ids in the place of a text only where the question was given so."""

    role: str
    content: Text


class Asked(NamedTuple):
    """A question as ids.

    Attributes:
        prefix: what stands in front of its passages: the system message, earlier turns, the beginning of its own.
        suffix: what stands behind them.
        opening: what the prefix would be without earlier turns; passages are read behind it where the template has no anchor.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    opening: tuple[int, ...]


def is_chat(question: Any) -> bool:
    """Whether what is asked is a list of chat messages."""
    return isinstance(question, list | tuple) and any(isinstance(part, Mapping) for part in question)


def conversation(messages: Any, system: str | None = None) -> tuple[str | None, list[Message]]:
    """The system message, if any, and what was said behind it; the last one is the user's question.

    What one side said in several messages is one message, with empty lines between.

    Args:
        messages: ``{"role": ..., "content": ...}`` each; contents are texts, or lists of ``{"type": "text", "text": ...}``.
        system: a system message that was given apart.

    Raises:
        PromptError: there are no messages, or some that are not understood: the message says which and why.
        ArgumentError: there are two system messages.
    """
    if not listable(messages):
        raise PromptError(f"{_MUST}, got {messages!r:.80}")
    said = [_message(number, message) for number, message in enumerate(messages)]
    if any(message.role == "system" for message in said[1:]):
        raise PromptError("there may be one system message, the first of all messages: join them")
    if said and said[0].role == "system":
        if system is not None:
            raise ArgumentError("give system= or a system message, not both")
        system, said = str(said[0].content), said[1:]
    if not said:
        raise PromptError("messages are empty: the last one must be the user's question")
    if said[-1].role != "user":
        raise PromptError(f"the last message must be the user's question, got one of the {said[-1].role}")
    joined: list[Message] = []
    for message in said:
        if joined and joined[-1].role == message.role:
            message = Message(message.role, f"{joined.pop().content}\n\n{message.content}")
        joined.append(message)
    return system, joined


def asked(encoder: Encoder, question: Question, system: str | None = None, slots: Slots | None = None) -> Asked:
    """What stands around a question's passages.

    Args:
        encoder: of the template and the tokenizer.
        question: text, ids or messages.
        system: a system message in the place of the template's; ``""`` for none.
        slots: of :meth:`ragkv.prompt.Encoder.slots`. Earlier turns that are written as the question is have the same.

    Raises:
        As :func:`conversation`; PromptError also where the chat template cannot write such messages.
    """
    system, said = checked_system(system), [Message("user", cast(Text, question))]
    if is_chat(question):
        system, said = conversation(question, system)
    begin = opening(encoder, system)
    if begin is encoder.prefix:  # which has the system message
        if len(said) == 1:
            return Asked(begin, encoder.suffix(said[0].content, slots), begin)
        return Asked(*_written(encoder, said, slots, _own(encoder)), begin)
    return Asked(*_written(encoder, [*_system(system), *said], slots), begin)


def opening(encoder: Encoder, system: str | None) -> tuple[int, ...]:
    """What stands in front of the passages where nothing was said before, with a system message in the place of the template's."""
    if system is None or (encoder.template.chat is not None and system == _own(encoder)):
        return encoder.prefix
    return _written(encoder, [*_system(system), Message("user", (0,))])[0]


def going_on(encoder: Encoder, question: Text, slots: Slots | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands between an answer that was just given and the next question's passages, and what stands behind these."""
    if encoder.template.chat is None:
        return encoder.after_answer, encoder.suffix(question, slots)
    said = [Message("user", "?"), Message("assistant", "!"), Message("user", question)]
    segments = _segments(encoder, said)
    return _spliced(encoder, segments[[number for _, number in segments].index(1) + 1 :], said, slots)


def last_turns(said: Sequence[Message]) -> str:
    """What to look for: the question, and what was said in the two turns before it."""
    return "\n".join(str(message.content) for message in said[-5:] if str(message.content).strip())


def checked_system(system: Any) -> str | None:
    """A system message that is given by itself.

    Raises:
        ArgumentTypeError: it is no text.
    """
    if system is not None and not isinstance(system, str):
        raise ArgumentTypeError(f"system must be a text, got {system!r:.80}")
    return system


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise PromptError(f"{_MUST}, got {message!r:.80} at {number}")
    role = message["role"]
    if role not in _ROLES:
        raise PromptError(f"a role must be one of {', '.join(_ROLES)}, got {role!r:.80} at {number}")
    more = [name for name, value in message.items() if name not in ("role", "content") and value]
    if more:
        raise PromptError(
            f"a message has a role and a content, got {', '.join(map(str, more))} at {number}: tools and names are not written"
        )
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    wrong = [part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str)]
    if wrong:
        raise PromptError(
            f"a content must be a text or a list of {{'type': 'text', 'text': ...}}, got {wrong[0]!r:.80} at {number}"
        )
    text = "".join(map(str, texts))
    if role == "user" and not text.strip():
        raise PromptError(f"the user's message at {number} is empty: give at least one token")
    return Message(role, text)


def _own(encoder: Encoder) -> str:
    """The system message of the template's own."""
    return (encoder.template.chat or {}).get("system") or ""


def _system(system: str | None) -> list[Message]:
    return [Message("system", system)] if system else []


def _written(
    encoder: Encoder, said: Sequence[Message], slots: Slots | None = None, own: str = ""
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands in front of the last message's passages and behind them; ``own`` is the chat template's own system message."""
    if encoder.template.chat is not None:
        prefix, suffix = _spliced(encoder, _segments(encoder, said, own), said, slots)
        return encoder.opened(prefix), suffix
    ids = list(encoder.prefix)
    for role, content in said[:-1]:
        if role == "user":
            ids += encoder.suffix(content, slots)
        else:
            ids += encoder.ids(content)
            ids += encoder.after_answer if role == "assistant" else encoder.ids("\n\n")
    return tuple(ids), encoder.suffix(said[-1].content, slots)


def _segments(encoder: Encoder, said: Sequence[Message], own: str = "") -> list[tuple[str, int | None]]:
    """What the chat template writes, cut at the messages: pieces of its own text, and the numbers of messages in their places.

    The passages have the number -1. ``own`` is a system message of the template itself, which is not cut out.
    """
    options = dict(encoder.template.chat or {})
    asked_so = asking(options.pop("instruction"), options.pop("before_question", BEFORE_QUESTION))
    options = {name: value for name, value in options.items() if name not in ("system", "after_chunk")}
    last = len(said) - 1
    marks = [*(f"\u2983ragkv {number}\u2984" for number in range(last)), QUESTION, CHUNKS]
    messages = [{"role": "system", "content": own}] if own else []
    messages += [{"role": message.role, "content": mark} for message, mark in zip(said[:-1], marks, strict=False)]
    messages.append({"role": "user", "content": asked_so})
    if encoder.tokenizer is None or not getattr(encoder.tokenizer, "chat_template", None):
        raise PromptError(
            "the prompt template was made from a chat template and the tokenizer has none: give the one that it was made with"
        )
    rendered = render(encoder.tokenizer, messages, options)
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", rendered) if isinstance(rendered, str) else []
    found = [piece for piece in pieces if piece in marks]
    if sorted(found) != sorted(marks) or found.index(CHUNKS) > found.index(QUESTION):
        raise PromptError(
            "the tokenizer's chat template changes, leaves out or repeats messages (has it no place for a system message?): "
            "give PromptTemplate(...) yourself"
        )
    numbers = {**{mark: number for number, mark in enumerate(marks)}, CHUNKS: -1}
    return [(piece, numbers.get(piece)) for piece in pieces]


def _spliced(
    encoder: Encoder, segments: Sequence[tuple[str, int | None]], said: Sequence[Message], slots: Slots | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids in front of the passages and behind them, every segment on its own."""
    slots = encoder.slots() if slots is None else slots
    prefix, suffix = list[int](), list[int]()
    side = prefix
    for text, number in segments:
        if number is None:
            side += encoder.own(text, slots)
        elif number == len(said) - 1:
            side += encoder.question(said[number].content)
        elif number >= 0:
            side += encoder.ids(said[number].content)
        else:
            side = suffix
    return tuple(prefix), tuple(suffix)
