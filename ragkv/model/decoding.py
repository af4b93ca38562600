"""Decoding behind a fused prompt, with transformers' own generation settings.

``model.generate`` would run the prompt's last token a second time, because it knows no ready logits. The loop here begins with
them. Settings, logits processors and stopping criteria are transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ragkv.errors import whole_number
from ragkv.model.cache import FusedCache
from ragkv.model.decoder import Decoder
from ragkv.report import FusedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Tokens generated when neither the call nor the model's generation config says how many.
DEFAULT_NEW_TOKENS = 64


class Settings:
    """Generation arguments, resolved by transformers for one prompt.

    Args:
        decoder: the model.
        tokenizer: for stop strings; may be ``None``.
        arguments: what ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``temperature``, ``stop_strings``,
            ``generation_config``, ``logits_processor``, ``stopping_criteria``, ...

    Attributes:
        asked: tokens to generate, where the call says how many.

    Raises:
        ArgumentError, TypeError, ValueError: arguments that make no sense, or that transformers does not know.
    """

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase | None, arguments: dict[str, Any]):
        self.decoder, self.tokenizer, self.arguments = decoder, tokenizer, arguments
        arguments = dict(arguments)
        self.own_processors = arguments.pop("logits_processor", None)
        self.own_criteria = arguments.pop("stopping_criteria", None)
        given: GenerationConfig | None = arguments.pop("generation_config", None)
        if "max_length" in arguments:
            raise ValueError("max_length counts the prompt, whose length is fusion's: give max_new_tokens instead")
        said = arguments.get("max_new_tokens", given.max_new_tokens if given is not None else None)
        self.asked: int | None = None if said is None else whole_number("max_new_tokens", said, 1)
        self.config, unknown = decoder.model._prepare_generation_config(given, **arguments)
        unknown.pop("attention_mask", None)
        if unknown:
            raise TypeError(f"unknown generation arguments: {', '.join(sorted(unknown))}")
        if (self.config.num_return_sequences or 1) > 1:
            raise ValueError(
                "num_return_sequences > 1: an answer holds one sequence; call generate again for another sample"
            )
        if self.config.max_new_tokens is None:
            self.config.max_new_tokens = DEFAULT_NEW_TOKENS

    def new_tokens(self, prompt_tokens: int) -> int:
        """The most tokens to generate: as asked, or by default no more than the model's positions leave.

        The last one takes no position, for the model never runs it.
        """
        limit, wanted = self.decoder.max_positions, self.config.max_new_tokens
        return wanted if self.asked is not None or limit is None else min(wanted, limit + 1 - prompt_tokens)

    @property
    def beams(self) -> int:
        """Beams searched at once; 1 for greedy decoding and sampling."""
        return self.config.num_beams or 1

    def resolve(self, ids: Tensor):
        """Logits processors and stopping criteria for a prompt ``[1, N]``."""
        model, config = self.decoder.model, self.config
        config.max_length = ids.shape[1] + self.new_tokens(ids.shape[1])
        if config.min_new_tokens is not None:
            config.min_length = ids.shape[1] + config.min_new_tokens
        model._prepare_special_tokens(config, True, device=ids.device)
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            logits_processor=self.own_processors or [],
            device=ids.device,
        )
        criteria = model._get_stopping_criteria(
            generation_config=config, stopping_criteria=self.own_criteria or [], tokenizer=self.tokenizer
        )
        return processors, criteria


def decode(
    settings: Settings, prompt: FusedPrompt, turn: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[int]:
    """Token ids one by one, an end token included; the prompt's cache grows with them.

    The first one comes from the prompt's logits, without running the model.

    Args:
        settings: resolved for this prompt.
        prompt: with its cache.
        turn: taken for every step.
    """
    decoder, cache = settings.decoder, prompt.past_key_values
    assert isinstance(cache, FusedCache)
    ids, logits = prompt.input_ids, prompt.logits
    processors, criteria = settings.resolve(ids)
    sample = settings.config.do_sample
    while True:
        scores = processors(ids, logits.float().to(ids.device))
        with torch.no_grad():
            token = torch.multinomial(scores.softmax(-1), 1) if sample else scores.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        yield int(token)
        if bool(criteria(ids, None).all()):
            return
        position = torch.tensor(
            [prompt.next_position + ids.shape[1] - prompt.input_ids.shape[1] - 1], device=ids.device
        )
        with turn():
            logits = decoder.step(token[0], position, cache)


def beam_search(settings: Settings, prompt: FusedPrompt) -> list[int]:
    """The best beam's ids, by ``model.generate`` over the fused cache.

    transformers needs one token to begin with: the prompt's last one is run again, and only that one.
    """
    cache, ids = prompt.past_key_values, prompt.input_ids
    cache.crop(-1)
    cache.batch_repeat_interleave(settings.beams)
    out = settings.decoder.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        **{"max_new_tokens": settings.new_tokens(ids.shape[1]), **settings.arguments},
        tokenizer=settings.tokenizer,
    )
    return out[0, ids.shape[1] :].tolist()
