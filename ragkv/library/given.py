"""What is given: one text or one chunk in the place of a list is refused, and what an engine is not made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ragkv.chunk import Chunk
from ragkv.errors import ArgumentTypeError, PromptError, instance, listable
from ragkv.prompt import PromptTemplate
from ragkv.store import TieredStore


def several(items: Sequence[Any], what: str) -> list[Any]:
    """A list, where one string would be taken for a list of characters, and one chunk for a list of them."""
    if isinstance(items, Chunk) or not listable(items):
        raise PromptError(f"{what} must be a list, got {items!r:.60}: write [...] around it")
    return list(items)


def pairs(requests: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Chunks and question of each request."""
    given = several(requests, "requests")
    for one in given:
        if not isinstance(one, tuple | list) or len(one) != 2:
            raise PromptError(f"each of requests must be (chunks, question), got {one!r:.60}")
    return given


def several_chunks(items: Sequence[Chunk], what: str) -> list[Chunk]:
    """A list of chunks."""
    chunks = several(items, what)
    for chunk in chunks:
        instance(f"each of {what}", chunk, Chunk, "a ragkv.Chunk, as add() and add_document() return them")
    return chunks


def check_parts(model: Any, tokenizer: Any, store: Any, template: Any) -> None:
    """Check what an engine is made of.

    Raises:
        ArgumentTypeError: something is not what it must be.
    """
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
    check_store(store)
    instance(
        "template", template, PromptTemplate | None, "a ragkv.PromptTemplate, as ragkv.PromptTemplate(prefix='...')"
    )


def check_store(store: Any) -> None:
    """Check where KV are to be kept.

    Raises:
        ArgumentTypeError: it is no store.
    """
    instance("store", store, TieredStore | None, "a ragkv.TieredStore, as ragkv.TieredStore('kv/')")
