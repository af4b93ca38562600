"""How to search: the options of retrieval, in one value."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ragkv.errors import ArgumentTypeError, RetrievalError, UnknownArgumentError
from ragkv.retrieval.ranking import ORDERS
from ragkv.retrieval.rerank import Reranker
from ragkv.retrieval.where import Condition, condition

_TOP_K = 5
# With a budget of tokens alone, one passage is looked for per so many of them.
_TOKENS_A_PASSAGE = 16
# More than any catalogue holds, and a number that SQLite takes.
_MOST = 1 << 40


@dataclass(frozen=True)
class Retrieval:
    """How passages are searched.

    Attributes:
        top_k: passages to find, in each hop; 5 by default, or as many as ``max_context_tokens`` takes where that is given.
        neighbours: passages to take along on either side of each, from its own document and behind the others. A passage that
            says "she" is found less well than the one before it that names her.
        max_context_tokens: the most tokens of all passages together. The best come first; one that does not fit is passed over.
        min_score: passages of a lower score are not taken.
        hybrid: search by words (BM25) too, and join both orders by reciprocal rank fusion.
        where: which passages may be found: a dict over metadata, ``source``, ``page`` and ``heading`` (see
            :func:`ragkv.retrieval.where.condition`), or a function that takes a
            :class:`~ragkv.retrieval.Document`.
        rerank: a cross-encoder's name or path, an object with ``predict`` or ``rank`` as sentence-transformers' ``CrossEncoder``
            has, or a function of the question and a list of texts that gives a score each. It orders the best
            candidates, and a hit's score is then its score.
        hops: with 2, names that stand in what was found of the best document are looked for in a second search, for questions
            like "What language does the mayor of Northhaven speak?"
        order: of the passages: ``"document"``, documents by their best passage, each in its own order; ``"retrieved"``, the best
            first, neighbours behind all that were found; ``"best-last"``, the other way round: the best next to the question;
            ``"cache"``, one of which as much as possible was computed before, where an engine keeps that (``paths=``).

    Raises:
        RetrievalError, ArgumentTypeError: an option is out of range, or of another type.
    """

    top_k: int | None = None
    neighbours: int = 0
    max_context_tokens: int | None = None
    min_score: float | None = None
    hybrid: bool = False
    where: Mapping[str, Any] | Condition | None = None
    rerank: str | os.PathLike[str] | Reranker | Callable[[str, list[str]], Any] | None = None
    hops: int = 1
    order: str = "document"

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("neighbours", 0), ("max_context_tokens", 1), ("hops", 1)):
            value = getattr(self, name)
            optional = name in ("top_k", "max_context_tokens")
            if value is None and optional:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RetrievalError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(self.hybrid, bool):
            raise ArgumentTypeError(f"hybrid must be True or False, got {self.hybrid!r:.80}")
        if not isinstance(self.order, str):
            raise ArgumentTypeError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r:.80}")
        if self.order not in ORDERS:
            raise RetrievalError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r:.80}")
        score = self.min_score
        wrong = isinstance(score, bool) or not isinstance(score, int | float | None)
        if wrong or (isinstance(score, float) and math.isnan(score)):
            raise ArgumentTypeError(f"min_score must be a number, got {score!r:.80}")
        if self.where is not None:
            condition(self.where)
        unnamed = isinstance(self.rerank, str) and not self.rerank.strip()
        if unnamed or not (
            self.rerank is None or isinstance(self.rerank, str | os.PathLike | Reranker) or callable(self.rerank)
        ):
            raise ArgumentTypeError(
                "rerank must be a cross-encoder's name or path, an object with predict() or rank(), or a function of the "
                f"question and a list of texts, got {self.rerank!r:.80}"
            )

    @property
    def limit(self) -> int:
        """How many passages a hop finds at most."""
        if self.top_k is not None:
            return min(self.top_k, _MOST)
        return min(max(_TOP_K, (self.max_context_tokens or 0) // _TOKENS_A_PASSAGE), _MOST)

    @classmethod
    def of(cls, **options: Any) -> Retrieval:
        """From options by name.

        Raises:
            UnknownArgumentError: there is no such option.
        """
        retrieval, others = cls.split(options)
        if others:
            raise UnknownArgumentError(
                f"retrieval has no option {', '.join(others)}: it takes {', '.join(_names(cls))}"
            )
        return retrieval

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Retrieval, dict[str, Any]]:
        """The options of retrieval among others, and the others."""
        own = {name: options[name] for name in _names(cls) if name in options}
        return cls(**own), {name: value for name, value in options.items() if name not in own}


def _names(cls: type[Retrieval]) -> list[str]:
    return [field.name for field in fields(cls)]
