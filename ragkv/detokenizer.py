"""Generated ids as text, piece by piece, up to a text at which the answer ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ragkv.errors import ArgumentError
from ragkv.tokenizer import BYTE

if TYPE_CHECKING:
    from ragkv.prompt import Encoder


class Detokenizer:
    """Text as it grows. The pieces joined are what all ids decode to, up to the first stop text.

    Only the ids since the piece before are decoded again: an id's text may depend on its left neighbour (the space before a
    word), and not on those further left.

    Args:
        encoder: decodes.
        stop: texts at which the answer ends.

    Attributes:
        stopped: a stop text was met; what follows is no part of the answer.
    """

    def __init__(self, encoder: Encoder, stop: Sequence[str] = ()):
        self.stopped: bool = False
        self._encoder, self._stop = encoder, stop
        self._tokenizer: Any = encoder.tokenizer
        self._cleans = _cleans(encoder.tokenizer)
        self._ids: list[int] = []  # of the last piece, and those that have given none yet
        self._last = 0  # how many of them are the last piece's
        self._shown = self._text = ""  # what these decode to, and what all of them do
        self._held = ""  # may be the beginning of a stop text

    def add(self, token: int) -> str:
        """What the text grows by, as far as tokens to come cannot change it; often nothing."""
        self._ids.append(token)
        before, self._text = self._text, self._encoder.decode(self._ids)
        if self._text == before or self._unfinished(token):
            return ""
        piece = self._text[len(self._shown) :]
        if not self._cleans:
            self._ids = self._ids[self._last :]
        self._last = len(self._ids)
        self._shown = self._text = self._encoder.decode(self._ids)
        return self._certain(piece)

    def rest(self) -> str:
        """What is left when no token will come."""
        if self.stopped:
            return ""
        return self._certain(self._text[len(self._shown) :]) + self._held

    def _unfinished(self, token: int) -> bool:
        """Whether tokens to come may change how the text ends."""
        if self._text.endswith("\ufffd") or (self._cleans and " " in self._text[-3:]):
            return True
        spelled = self._tokenizer.convert_ids_to_tokens(token)
        return bool(BYTE.fullmatch(str(spelled)))  # a wrong byte undoes its whole run

    def _certain(self, piece: str) -> str:
        text = self._held + piece
        self._held, before = "", cut(text, self._stop)
        if len(before) < len(text):
            self.stopped = True
            return before
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the stop text that is complete first."""
    found = [(at + len(item), at) for item in stop if (at := text.find(item)) >= 0]
    return text[: min(found)[1]] if found else text


def stop_texts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Stop texts as a tuple.

    Raises:
        ArgumentError: one is empty, or no text.
    """
    texts = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ArgumentError(f"stop must be a text or several, none of them empty; got {given!r}")
    return texts


def _cleans(tokenizer: Any) -> bool:
    """Whether transformers takes spaces out of the decoded text. What becomes of one then hangs on both its sides."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ == "BPE":  # refuses, unless it is forced to
        return getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return getattr(tokenizer, "clean_up_tokenization_spaces", False)


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end with which the stop text begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
