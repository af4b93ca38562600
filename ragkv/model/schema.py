"""Answers that are JSON of a schema: at every step only tokens that keep it possible are left.

llguidance works the tokens out: it has no dependencies, compiles a schema in milliseconds, and refuses what of a schema it does
not keep. N tokens of prompt and answer, B beams, V vocabulary.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ragkv.errors import ArgumentError, IncompleteAnswerError, MissingPackageError
from ragkv.tokenizer import BYTE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# As json.dumps writes it; free whitespace would let a small model write nothing else.
_SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What llguidance knows of each tokenizer, by the tokenizer's length and its end tokens.
_VOCABULARIES: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


class Schema:
    """What an answer must be.

    Args:
        given: a JSON schema as a dict, a pydantic model's class, or ``"json"`` for any JSON object.

    Raises:
        MissingPackageError: llguidance is not installed.
        ArgumentError: it is none of these, or says something that cannot be kept.
    """

    def __init__(self, given: Any):
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingPackageError("schema= needs llguidance: pip install 'ragkv[json]'") from error
        self._model: Any = given if hasattr(given, "model_json_schema") and isinstance(given, type) else None
        plain = {"type": "object"} if given == "json" else given
        if self._model is None and not isinstance(plain, dict):
            raise ArgumentError(
                f"schema must be a JSON schema as a dict, a pydantic model's class, or 'json'; got {given!r:.80}"
            )
        try:
            text = json.dumps(plain if self._model is None else given.model_json_schema(), allow_nan=False)
            self.grammar: str = LLMatcher.grammar_from_json_schema(text, overrides=_SPACING)
        except (TypeError, ValueError, RuntimeError) as error:  # the last of pydantic, and of too many levels
            raise ArgumentError(f"schema holds what is no JSON: {error}") from error
        wrong = LLMatcher.validate_grammar(self.grammar)
        if wrong:
            raise ArgumentError(f"schema cannot be kept: {wrong}")

    def value(self, text: str) -> Any:
        """What an answer says: plain values, or an object of the pydantic model.

        Raises:
            IncompleteAnswerError: the text ends in the middle.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise IncompleteAnswerError(text) from error
        return plain if self._model is None else self._model.model_validate(plain)


class Constraint:
    """Keeps one answer to a schema: a logits processor and, as :meth:`ended`, a stopping criterion of transformers.

    Args:
        schema: the schema.
        tokenizer: whose tokens the model writes.
        ends: the ids at which an answer ends.

    Raises:
        ArgumentError: there is no tokenizer, or llguidance cannot read it.
    """

    def __init__(self, schema: Schema, tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int]):
        from llguidance import LLMatcher

        first = LLMatcher(_vocabulary(tokenizer, ends), schema.grammar, log_level=0)
        self._prompt: int | None = None
        self._matchers: dict[tuple[int, ...], Any] = {(): first}  # by what was written

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[B, V]`` behind ids ``[B, N]``, with -inf for what the schema does not allow."""
        if self._prompt is None:
            self._prompt = ids.shape[1]
        written = [tuple(row[self._prompt :]) for row in ids.tolist()]
        self._matchers = {row: self._matcher(row) for row in written}
        scores = scores.clone()
        for row, one in zip(written, scores, strict=True):
            matcher = self._matchers[row]
            if matcher is not None:  # a beam that was given up goes on as it likes
                allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[: len(one)]
                one[: len(allowed)].masked_fill_(allowed.to(one.device) == 0, -torch.inf)
                one[len(allowed) :] = -torch.inf
        return scores

    def ended(self, ids: Tensor, scores: Tensor | None = None, **_: Any) -> Tensor:
        """Whether nothing more can be written, ``[B]``."""
        assert self._prompt is not None
        matchers = [self._matcher(tuple(row[self._prompt :])) for row in ids.tolist()]
        return torch.tensor([matcher is not None and matcher.is_stopped() for matcher in matchers], device=ids.device)

    def _matcher(self, written: tuple[int, ...]) -> Any:
        """Where the schema stands behind these tokens; ``None`` where it does not allow them."""
        if written in self._matchers:
            return self._matchers[written]
        before = self._matchers.get(written[:-1])
        if before is None or before.validate_tokens([written[-1]]) == 0:
            return None
        matcher = before.deep_copy()
        matcher.consume_token(written[-1])
        return matcher


def _readable(tokenizer: Any) -> str:
    """A fast tokenizer as JSON. Bytes that it marks as special are text like any other."""
    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not BYTE.fullmatch(token["content"])]
    return json.dumps(plain)


def _vocabulary(tokenizer: Any, ends: frozenset[int]) -> Any:
    from llguidance import LLTokenizer

    if tokenizer is None:
        raise ArgumentError("schema= is about text and the engine has no tokenizer: give it one")
    key = (len(tokenizer), ends)
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if key not in known:
        try:
            known[key] = LLTokenizer(_readable(tokenizer), eos_token=sorted(ends) or None)
        except (AttributeError, ValueError) as error:
            raise ArgumentError(
                f"schema= needs a fast tokenizer that llguidance can read; {type(tokenizer).__name__} is none: {error}"
            ) from error
    return known[key]
