"""Text to token ids, whatever others do meanwhile with the tokenizer.

A fast tokenizer of transformers keeps the options of a call (``split_special_tokens``, padding, truncation) as state of its
backend, so a call in another thread changes this one. What reads documents and questions therefore has a backend of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from operator import index
from typing import Any, SupportsIndex

from ragkv.errors import PromptError

# What a model falls back to for characters that it does not know; some tokenizers mark them as special.
BYTE = re.compile("<0x[0-9A-F]{2}>")


class PrivateTokenizer:
    """Encodes with the vocabulary and the rules of a tokenizer, never with its state, and never changes it.

    Tokens that are added to the tokenizer later are noticed; a normalizer or a pre-tokenizer that is replaced in its backend
    is not.

    Args:
        tokenizer: a transformers tokenizer, fast or slow, or anything that is called as one is.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._copies: dict[bool, tuple[Any, _Copied | _Called]] = {}

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts from outside, each on its own: what looks like a special token is text like any other.

        That is ``tokenizer(texts, add_special_tokens=False, split_special_tokens=True)``, save that two kinds of token are
        spelled out too: those that the chat template writes though they are not marked as special, and special ones that
        the model of the tokenizer knows as a word (Unigram).

        Raises:
            PromptError: a special token in a text has no spelling in other tokens.
        """
        if not texts:
            return []
        own = self._copy(split=True)
        return [ids if own.special.isdisjoint(ids) else _spelled(own, ids) for ids in own.encode(texts)]

    def trusted(self, text: str) -> list[int]:
        """Token ids of a template's text, which may hold special tokens."""
        return self._copy(split=False).encode([text])[0]

    def bos(self) -> tuple[int, ...]:
        """The BOS that the tokenizer puts before a text; empty where it puts none."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        return () if bos is None or self._copy(split=False).opening("a") != [bos] else (bos,)

    def _copy(self, *, split: bool) -> _Copied | _Called:
        own, names = self._tokenizer, ("backend_tokenizer", "all_special_tokens", "chat_template")
        state = (len(own) if hasattr(own, "__len__") else 0, *(getattr(own, name, None) for name in names))
        held = self._copies.get(split)
        if held is None or held[0] != state:
            held = self._copies[split] = state, (_Copied if _is_only_backend(own) else _Called)(own, split)
        return held[1]


class _Copied:
    """A fast tokenizer's backend: the same model, normalizer and pre-tokenizer, shared, with tokens and state of its own."""

    def __init__(self, tokenizer: Any, split: bool):
        from tokenizers import Tokenizer

        given = tokenizer.backend_tokenizer
        own = Tokenizer(given.model)
        own.normalizer, own.pre_tokenizer = given.normalizer, given.pre_tokenizer
        own.post_processor = given.post_processor
        added, marked = given.get_added_tokens_decoder(), set(tokenizer.all_special_tokens)
        for token in added.values():
            token.special = token.special or token.content in marked or _is_written(token.content, tokenizer)
        own.add_tokens([added[i] for i in sorted(added)])
        special = {token.content: i for i, token in added.items() if token.special}
        if any(own.token_to_id(token.content) != i for i, token in added.items()):
            raise PromptError(
                "the tokenizer's added tokens have ids that cannot be given again: save it and load it anew"
            )
        own.encode_special_tokens = split
        self._backend = own
        unknown = getattr(given.model, "unk_token", tokenizer.unk_token)
        self.special = _forbidden(special, unknown, tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and the like."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def opening(self, text: str) -> list[int]:
        """The first id of a text as the tokenizer would begin a prompt with it."""
        return self._backend.encode(text).ids[:1]

    def characters(self, token: int) -> list[int]:
        """The ids of a token's letters, one by one."""
        return [
            part.id for char in str(self._backend.id_to_token(token)) for part in self._backend.model.tokenize(char)
        ]


class _Called:
    """Any other tokenizer, by its call. A backend below it is copied, so that the options, always the same, are its own."""

    def __init__(self, tokenizer: Any, split: bool):
        self._tokenizer = deepcopy(tokenizer) if hasattr(tokenizer, "backend_tokenizer") else tokenizer
        self._options = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
        try:
            self.encode(["a"])  # sets the options in the copy, once
        except ValueError:  # mistral-common never reads text as special tokens and refuses to be told so
            del self._options["split_special_tokens"]
        special = {
            token: tokenizer.convert_tokens_to_ids(token) for token in getattr(tokenizer, "all_special_tokens", ())
        }
        self.special = _forbidden(special, getattr(tokenizer, "unk_token", None), tokenizer)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self._tokenizer(list(texts), **self._options)["input_ids"])

    def opening(self, text: str) -> list[int]:
        return list(self._tokenizer([text], **self._options | {"add_special_tokens": True})["input_ids"][0][:1])

    def characters(self, token: int) -> list[int]:
        return [part for ids in self.encode(list(self._tokenizer.convert_ids_to_tokens(token))) for part in ids]


def never_shown(tokenizer: Any) -> frozenset[int] | None:
    """The ids that a decoded text leaves out, where ``skip_special_tokens`` would leave out bytes too; ``None`` elsewhere."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i: token.content for i, token in added.items() if token.special}
    bytes_ = {i for i, content in special.items() if BYTE.fullmatch(content)}
    return frozenset(special.keys() - bytes_) if bytes_ else None


def _is_only_backend(tokenizer: Any) -> bool:
    """Whether a call of the tokenizer is a call of its backend, with no Python of its class around it."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    homes = [
        next(kind for kind in type(tokenizer).__mro__ if name in vars(kind)) for name in ("__call__", "_encode_plus")
    ]
    return all(home.__module__.startswith("transformers.tokenization_utils") for home in homes)


def _is_written(token: str, tokenizer: Any) -> bool:
    """Whether the chat template writes the token, as DeepSeek's writes its unmarked ``<|User|>``. Plain words are no such token."""
    looks = any(map(str.isalnum, token)) and not token.replace(" ", "").isalnum()
    return looks and token in str(getattr(tokenizer, "chat_template", None) or "")


def _forbidden(special: dict[str, int], unknown: str | None, tokenizer: Any) -> frozenset[int]:
    """The ids that no text may have.

    Bytes may be had, and a single character that serves as padding, say; what is unknown too, unless it begins or ends a text.
    """
    if unknown in (getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None)):
        unknown = None
    harmless = (token for token in special if token == unknown or len(token) == 1 or BYTE.fullmatch(token))
    return frozenset(special.values()) - {special[token] for token in harmless}


def _spelled(own: _Copied | _Called, ids: Sequence[int]) -> list[int]:
    """The ids with every special one replaced by its characters."""
    spelled = [part for i in ids for part in (own.characters(i) if i in own.special else [i])]
    if not own.special.isdisjoint(spelled):
        raise PromptError(
            f"a text holds the special token {next(i for i in spelled if i in own.special)}, which cannot be spelled in "
            "other tokens: take it out of the text, or give the text as token ids"
        )
    return spelled


def plain_ids(given: Sequence[int]) -> tuple[int, ...]:
    """Ids as plain ints; of numpy and torch too, but nothing that only looks like a number.

    Raises:
        PromptError: they are none.
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, (bytes, bytearray)) or not isinstance(values, Iterable):
        raise PromptError(f"give text as str or a sequence of token ids, got {type(given).__name__}")
    return tuple(_whole(value) for value in values)


def _whole(value: Any) -> int:
    if type(value) is int:
        return value
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # a number of numpy or torch
    if isinstance(plain, bool | type) or not isinstance(plain, SupportsIndex):
        raise PromptError(f"token ids must be whole numbers, got {plain!r}")
    return index(plain)


def text_of(tokenizer: Any, ids: Sequence[int], **options: Any) -> str:
    """The text of ids; those that a tokenizer has no token for are left out, as models have that know more ids than it.

    Args:
        tokenizer: a transformers tokenizer, or anything that decodes as one does.
        ids: any number.
        **options: for its ``decode``.
    """
    try:
        return str(tokenizer.decode(list(ids), **options))
    except Exception:  # those written in Python end with whatever they come upon
        known = [i for i in ids if i < len(tokenizer)]
        if len(known) == len(ids):
            raise
        return str(tokenizer.decode(known, **options))
