"""Generation arguments, as one answer has them: which tokens are chosen, and where it ends."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Sequence
from threading import Event
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ragkv.errors import ArgumentError, NonFiniteError, PromptTooLongError, whole_number
from ragkv.kernels.upload import sent
from ragkv.logprobs import asked_logprobs
from ragkv.model.arguments import BESIDE, OWN, check, check_own, check_values
from ragkv.model.decoder import Decoder
from ragkv.model.inspection import non_finite
from ragkv.model.proposals import Proposer
from ragkv.model.schema import Constraint, Schema

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

#: Tokens generated when neither the call nor the model's generation config says how many.
DEFAULT_NEW_TOKENS = 64


class Stop(Event):
    """Ends an answer behind the token at hand, as one of its stopping criteria; made when the answer is asked for.

    Attributes:
        asked_s: ``perf_counter()`` then.
        loop: the event loop that waits for it, where one does: a closed one does not, and may not have told anybody.
    """

    def __init__(self, loop: AbstractEventLoop | None = None) -> None:
        super().__init__()
        self.asked_s: float = perf_counter()
        self.loop: AbstractEventLoop | None = loop

    def is_set(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return super().is_set() or (self.loop is not None and self.loop.is_closed())

    def __call__(self, ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        """Whether each of ``ids [B, N]`` is done."""
        return torch.full((len(ids),), self.is_set(), device=ids.device)

    def among(self, options: dict[str, Any]) -> dict[str, Any]:
        """Generation arguments with this among the criteria; what is no list is left to be refused by name."""
        criteria = options.get("stopping_criteria") or []
        return {**options, "stopping_criteria": [*criteria, self] if isinstance(criteria, list) else criteria}


def stopping(generation: dict[str, Any]) -> Stop | None:
    """What of the stopping criteria stops the answer from outside, if there is one."""
    criteria = generation.get("stopping_criteria")
    return next((item for item in criteria if isinstance(item, Stop)), None) if isinstance(criteria, list) else None


# What beam search by ``model.generate`` must not take from the model's own generation config.
_PLAIN = {"return_dict_in_generate": False, "use_cache": True, "cache_implementation": None, "num_return_sequences": 1}


class Settings:
    """Generation arguments, resolved by transformers.

    Args:
        decoder: the model. What its own generation config says holds where the arguments say nothing.
        tokenizer: for stop strings; may be ``None``.
        arguments: what ``model.generate`` takes.
        stop: texts at which the answer ends, for beam search.

    Attributes:
        decoder: the model.
        config: all settings together.
        stop: texts at which the answer ends.
        beams: searched at once; 1 for greedy decoding and sampling.
        ends: the token ids at which an answer ends.
        streamer: of transformers, if one was given.
        schema: that the answer must fit; ``None`` for free text.
        logprobs: how many of the likeliest tokens are wanted beside each; ``None`` for no log-probabilities.
        proposer: of tokens to be computed along with the next one.
        runs_model: logits processors run the model, as classifier-free guidance does.

    Raises:
        UnknownArgumentError: neither transformers nor ragkv knows an argument of that name.
        ArgumentError: an argument that cannot be honoured, or that transformers refuses.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase | None,
        arguments: dict[str, Any],
        stop: Sequence[str] = (),
    ):
        self.logprobs: int | None = asked_logprobs(arguments.get("logprobs"))
        given_schema = arguments.get("schema")
        arguments = {name: value for name, value in arguments.items() if name not in OWN}
        check(decoder.model, arguments)
        fields = {name: value for name, value in arguments.items() if name not in BESIDE}
        self.decoder: Decoder = decoder
        self.stop: Sequence[str] = stop
        self._fields = fields
        self._beside: dict[str, Any] = {**dict.fromkeys(BESIDE), "tokenizer": tokenizer}
        self._beside |= {name: arguments[name] for name in BESIDE if arguments.get(name) is not None}
        self.streamer: Any = self._beside["streamer"]
        given: GenerationConfig | None = self._beside["generation_config"]
        configs = (GenerationConfig(), given or GenerationConfig(), decoder.model.generation_config)
        try:
            config, _ = decoder.model._prepare_generation_config(given, **fields)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"transformers refuses the generation arguments: {error}") from error
        self.config: GenerationConfig = config
        check_own(config)
        said = {name: fields.get(name, getattr(given, name, None)) for name in ("max_new_tokens", "max_length")}
        for name, number in said.items():
            if number is not None:
                whole_number(name, number, 1)
        self._new_tokens: int | None = self.config.max_new_tokens
        limited = fields.get("max_length") is not None or any(config.max_length is not None for config in configs[1:])
        self._length: int | None = self.config.max_length if limited and self._new_tokens is None else None
        self._said = said["max_new_tokens"] is not None or (said["max_length"] is not None and self._length is not None)
        check_values(self.config, decoder.vocab_size)
        self.beams: int = 1 if self.config.num_beams is None else whole_number("num_beams", self.config.num_beams, 1)
        ends = self.config.eos_token_id
        self.ends: frozenset[int] = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.proposer: Proposer = Proposer(self.config, self._beside["assistant_model"], decoder.vocab_size)
        if self.beams > 1 and self.logprobs is not None:
            raise ArgumentError("logprobs: a beam's tokens were not taken one by one: leave out logprobs, or num_beams")
        self.schema: Schema | None = None if given_schema is None else Schema(given_schema)
        if self.schema is not None:
            constraint = Constraint(self.schema, tokenizer, self.ends)
            own = {"logits_processor": constraint, "stopping_criteria": constraint.ended}
            self._beside |= {name: [one, *(self._beside[name] or ())] for name, one in own.items()}
        self.runs_model: bool = self.config.guidance_scale not in (None, 1)
        if self.beams > 1 and self.streamer is not None:
            raise ArgumentError(
                "streamer: beam search knows its tokens only at the end: leave out streamer, or num_beams"
            )
        # Whatever transformers refuses, before the prompt is paid for.
        ids = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        try:
            self._resolve(ids, ids, 1)
        except (LookupError, RuntimeError) as error:  # it does not look at the form of all of them
            raise ArgumentError(f"transformers refuses the generation arguments: {error!r}") from error

    def asked(self, prompt_tokens: int) -> int | None:
        """Tokens to generate behind a prompt, where the call says how many.

        Raises:
            PromptTooLongError: as :meth:`new_tokens`, or prompt and answer are too long for the assistant.
        """
        new = self.new_tokens(prompt_tokens)
        self.proposer.fits(prompt_tokens, new)
        return new if self._said else None

    def new_tokens(self, prompt_tokens: int) -> int:
        """The most tokens to generate: as asked, or by default no more than the model's positions leave.

        The last one takes no position, for the model never runs it.

        Raises:
            PromptTooLongError: ``max_length``, which counts the prompt too, is used up.
        """
        if self._length is not None and self._length <= prompt_tokens:
            raise PromptTooLongError(
                f"max_length={self._length} counts the prompt, which has {prompt_tokens} tokens: give fewer or shorter chunks, a "
                "larger max_length, or max_new_tokens in its place"
            )
        wanted = self._new_tokens or (DEFAULT_NEW_TOKENS if self._length is None else self._length - prompt_tokens)
        limit = self.decoder.max_positions
        return wanted if self._said or limit is None else min(wanted, limit + 1 - prompt_tokens)

    def resolve(self, ids: Tensor, said: Tensor, begin: float) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """Logits processors and stopping criteria for a prompt ``[1, N]``. Nothing waits for the device, which computes it.

        Args:
            ids: the prompt.
            said: the same on the CPU.
            begin: ``perf_counter()`` from which ``max_time`` counts.
        """
        if self.config.max_time is not None:
            self.config.max_time -= perf_counter() - begin
        return self._resolve(ids, said, self.new_tokens(ids.shape[1]))

    def for_generate(self, prompt_tokens: int, begin: float) -> dict[str, Any]:
        """The arguments as ``model.generate`` takes them, for one sequence; ``max_time`` counts from ``begin``."""
        arguments = {**self._fields, **self._beside, **_PLAIN, "max_new_tokens": self.new_tokens(prompt_tokens)}
        arguments.pop("max_length", None)
        if self.config.max_time is not None:
            arguments["max_time"] = self.config.max_time - (perf_counter() - begin)
        arguments["logits_processor"] = [*(arguments["logits_processor"] or ()), self._finite]
        if self.stop:
            own = self.config.stop_strings or []
            arguments["stop_strings"] = [*([own] if isinstance(own, str) else own), *self.stop]
        return arguments

    def _finite(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores as they are; NaN where any is, so no beam ends with one."""
        if not scores.max(-1).values.isfinite().all():
            raise NonFiniteError(f"a beam's scores are NaN or infinite: {non_finite(self.decoder.dtype)}")
        return scores

    def _resolve(self, ids: Tensor, said: Tensor, new_tokens: int) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        model, config, beside = self.decoder.model, self.config, self._beside
        tokens = ids.shape[1]
        config.max_length = tokens + new_tokens
        if config.min_new_tokens is not None:
            config.min_length = tokens + config.min_new_tokens
        names = ("negative_prompt_ids", "negative_prompt_attention_mask")
        negative = {name: beside[name].to(ids.device) for name in names if beside[name] is not None}
        try:
            model._prepare_special_tokens(config, True, device="cpu")  # looks at their values
            criteria = model._get_stopping_criteria(
                generation_config=config,
                stopping_criteria=beside["stopping_criteria"] or [],
                tokenizer=beside["tokenizer"],
            )
            for name, special in vars(config).items():
                if name.endswith("_token_tensor") and special is not None:
                    setattr(config, name, sent(special, ids.device))
            processors = model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=tokens,
                encoder_input_ids=said if config.encoder_repetition_penalty in (None, 1.0) else ids,  # looked at, too
                prefix_allowed_tokens_fn=beside["prefix_allowed_tokens_fn"],
                logits_processor=beside["logits_processor"],
                device=ids.device,
                **negative,
            )
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"transformers refuses the generation arguments: {error}") from error
        return processors, criteria
