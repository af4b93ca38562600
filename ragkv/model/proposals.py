"""Tokens proposed to be computed along with an answer's next one: looked up in the text, or said by a smaller model.

They cost rows of a pass and change no answer: one is used where the answer goes just so. N tokens of prompt and answer so far.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from ragkv.errors import ArgumentError, PromptTooLongError, whole_number
from ragkv.model.turns import turns


class Proposals(Protocol):
    """Who proposes tokens behind one prompt."""

    def propose(self, ids: Tensor, most: int) -> list[int]:
        """At most ``most`` tokens that may come behind ``ids [1, N]``."""

    def judge(self, ids: Tensor, proposed: int, used: int) -> None:
        """Told behind ``ids [1, N]`` how many of the last tokens proposed were used."""


class Lookup:
    """Tokens that stood behind the last place where the text went as it ends now.

    Args:
        tokens: proposed at once, at most; 0 for none.
        longest: tokens by which the place is found, for as many as may be, at most; at least 2, or this where it is 1.

    Attributes:
        tokens: as given.
    """

    def __init__(self, tokens: int, longest: int):
        self.tokens: int = tokens
        self._longest = longest

    def propose(self, ids: Tensor, most: int) -> list[int]:
        """As of :class:`Proposals`."""
        row, most, longest = ids[0], min(most, self.tokens), self._longest
        for length in range(min(longest, len(row) - 1), min(longest, 2) - 1, -1) if most > 0 else ():
            places = (row.unfold(0, length, 1)[:-1] == row[-length:]).all(1).nonzero()
            if len(places):
                begin = int(places[-1]) + length
                return row[begin : begin + most].tolist()
        return []

    def judge(self, ids: Tensor, proposed: int, used: int) -> None:
        """Nothing is learnt."""


class Assistant:
    """What a smaller model would say, greedily, over a cache of its own: transformers' generator of candidates.

    How many at once, up to which confidence and by which schedule is what the smaller model's generation config says. The answer's
    logits processors are not asked: some keep a state, and what is proposed is not said yet.

    Args:
        model: the smaller model. It reads the text when it is first asked.
        longest: tokens of prompt and answer, at most.
        ends: the token ids at which an answer ends.
    """

    def __init__(self, model: PreTrainedModel, longest: int, ends: frozenset[int]):
        self._model = model
        plain = GenerationConfig._get_default_generation_params()  # greedy, where the model's own settings may sample
        own = {"max_length": longest, "eos_token_id": sorted(ends) or None, "pad_token_id": min(ends, default=0)}
        self._config = GenerationConfig(**{**plain, **own})
        self._candidates: AssistedCandidateGenerator | None = None

    def propose(self, ids: Tensor, most: int) -> list[int]:
        """As of :class:`Proposals`; an engine that runs the smaller model waits meanwhile."""
        if most <= 0:
            return []
        with turns(self._model.config.get_text_config(decoder=True)):
            if self._candidates is None:
                mask = {"attention_mask": torch.ones_like(ids)}
                self._candidates = AssistedCandidateGenerator(ids, self._model, self._config, mask)
            candidates, _ = self._candidates.get_candidates(ids)
        return candidates[0, ids.shape[1] :][:most].tolist()

    def judge(self, ids: Tensor, proposed: int, used: int) -> None:
        """By the schedule more or fewer are proposed next time; ``"heuristic"`` keeps that for other answers, as it does there."""
        if self._candidates is None or not proposed:
            return
        self._candidates.update_candidate_strategy(ids, torch.empty(1, proposed + 1, 0, device="cpu"), used)
        if self._model.generation_config.num_assistant_tokens_schedule == "heuristic":
            self._model.generation_config.num_assistant_tokens = self._candidates.num_assistant_tokens


class Proposer:
    """Who proposes tokens, as generation arguments say it.

    Args:
        config: all settings together.
        assistant: a smaller model, or ``None``: tokens of the prompt are proposed, where the settings say how many.
        vocabulary: tokens that the model knows.

    Raises:
        ArgumentError: a number is out of range, two propose, beams are searched, or the assistant cannot propose for this model.
    """

    def __init__(self, config: GenerationConfig, assistant: Any, vocabulary: int):
        tokens, longest = config.prompt_lookup_num_tokens or 0, config.max_matching_ngram_size
        longest = 3 if longest is None else longest
        whole_number("prompt_lookup_num_tokens", tokens)
        whole_number("max_matching_ngram_size", longest, 1)
        name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
        if (tokens or assistant is not None) and (config.num_beams or 1) > 1:
            raise ArgumentError(f"{name}: beams are searched token by token: leave it out, or num_beams")
        if tokens and assistant is not None:
            raise ArgumentError(
                "assistant_model and prompt_lookup_num_tokens: one of them proposes tokens: leave one out"
            )
        self._lookup = Lookup(tokens, longest)
        self._assistant = None if assistant is None else _assistant(assistant, vocabulary)

    @property
    def proposes(self) -> bool:
        """Whether anybody does."""
        return self._assistant is not None or self._lookup.tokens > 0

    def fits(self, prompt_tokens: int, new_tokens: int) -> None:
        """See that the assistant can read a prompt and its answer.

        Raises:
            PromptTooLongError: they take more positions than it has.
        """
        if self._assistant is None:
            return
        limit = getattr(self._assistant.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and prompt_tokens + new_tokens - 1 > limit:
            raise PromptTooLongError(
                f"the prompt's {prompt_tokens} tokens and {new_tokens} of an answer are more than assistant_model's {limit} "
                "positions: leave it out, give fewer or shorter chunks, or ask for a shorter answer"
            )

    def begin(self, longest: int, ends: frozenset[int]) -> Proposals:
        """For one prompt and its answer, ``longest`` tokens together at most, that ends at the token ids ``ends``."""
        return self._lookup if self._assistant is None else Assistant(self._assistant, longest, ends)


def _assistant(model: Any, vocabulary: int) -> PreTrainedModel:
    """A model that can propose tokens of a vocabulary of so many."""
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(f"assistant_model must be a loaded transformers model, got {type(model).__name__}")
    alone = model.can_generate() and "input_ids" in inspect.signature(model.forward).parameters
    if not alone or model.config.is_encoder_decoder or model._is_stateful:
        raise ArgumentError(
            "assistant_model must be a decoder that generates from ids alone and can go back in its text: "
            f"{type(model).__name__} is none"
        )
    size = model.get_input_embeddings().weight.shape[0]
    if size != vocabulary:
        raise ArgumentError(
            f"assistant_model has a vocabulary of {size} tokens and the model one of {vocabulary}: it must have the model's "
            "own tokenizer"
        )
    return model
