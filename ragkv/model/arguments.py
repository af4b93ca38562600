"""The arguments of ``model.generate`` by name: which do here what they do there, and which are refused, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import BaseWatermarkingConfig

from ragkv.errors import ArgumentError, ArgumentTypeError, UnknownArgumentError, instance, is_number, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _names(text: str) -> list[str]:
    return text.split()


#: Fields of a ``GenerationConfig`` that do what they do in ``model.generate``.
HONOURED = frozenset(
    _names("""
    max_length max_new_tokens min_length min_new_tokens max_time stop_strings
    do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits
    num_beams early_stopping length_penalty guidance_scale watermarking_config remove_invalid_values
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids suppress_tokens begin_suppress_tokens sequence_bias exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id pad_token_id bos_token_id eos_token_id
    prompt_lookup_num_tokens max_matching_ngram_size
    disable_compile transformers_version
    """)
)

#: What ``model.generate`` takes besides these fields, and what is honoured too.
BESIDE = frozenset(
    _names("""
    generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer tokenizer
    negative_prompt_ids negative_prompt_attention_mask assistant_model
    """)
)

#: What ragkv takes besides; see :meth:`ragkv.Engine.generate`.
OWN = frozenset(("schema", "logprobs"))

_PROMPT = "the engine makes the prompt and runs the model: give chunks and a question"
_STRATEGY = "transformers fetches this strategy from the Hub: use do_sample, num_beams, or a logits_processor of your own instead"
_ASSISTED = (
    "tokens are proposed by a smaller model with the same tokenizer (assistant_model), or by prompt_lookup_num_tokens"
)
_ASSISTANTS = "set it in assistant_model.generation_config, where transformers reads it"
_OUTPUTS = (
    "an answer holds text, ids and a report: take logits from Engine.fuse(...).logits, or from a logits_processor"
)
_CACHE = "the answer grows in the prompt's own cache: leave it out"
_COMPILED = "the model is not compiled here: leave it out"

#: What cannot be honoured, and why.
REFUSED: dict[str, str] = {
    name: why
    for why, names in {
        _PROMPT: "inputs input_ids inputs_embeds attention_mask position_ids cache past_key_values custom_generate "
        "trust_remote_code",
        _STRATEGY: "penalty_alpha dola_layers num_beam_groups diversity_penalty constraints force_words_ids low_memory",
        _ASSISTED: "assistant_tokenizer is_assistant use_mtp speculation_type assistant_early_exit assistant_lookbehind "
        "target_lookbehind assistant_ensemble_weight",
        _ASSISTANTS: "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold",
        _OUTPUTS: "output_scores output_logits output_attentions output_hidden_states return_dict_in_generate",
        _CACHE: "use_cache cache_implementation cache_config max_cache_len",
        _COMPILED: "compile_config",
        "an answer is one sequence: ask again for another sample": "num_return_sequences",
        "the engine's piece_tokens says how many tokens one pass computes": "prefill_chunk_size",
        "prompts are spliced as ids, which healing would change: leave it out": "token_healing",
        "answers are not batched: leave it out": "continuous_batching_config",
        "decoders have no such token, only encoder-decoders": "decoder_start_token_id",
        "one process runs the model: leave it out": "synced_gpus",
    }.items()
    for name in _names(names)
}
# Refused also where the model's own generation config says so, for without them the answer would be another one.
_DECISIVE = [name for name, why in REFUSED.items() if why == _STRATEGY or name == "token_healing"]


@runtime_checkable
class _Streams(Protocol):
    """A streamer of transformers, or one like it."""

    def put(self, value: Tensor) -> object: ...
    def end(self) -> object: ...


_FUNCTION: Any = Callable
# Types of those that transformers looks at only when it needs them.
_KINDS: dict[str, tuple[Any, str]] = {
    "prefix_allowed_tokens_fn": (_FUNCTION, "a function"),
    "streamer": (_Streams, "a transformers streamer"),
    "negative_prompt_ids": (Tensor, "a tensor [1, N]"),
    "negative_prompt_attention_mask": (Tensor, "a tensor [1, N]"),
    "watermarking_config": (dict | BaseWatermarkingConfig, "a transformers WatermarkingConfig, or a dict of one"),
}
_NUMBERS = _names(
    "temperature top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty "
    "length_penalty guidance_scale max_time"
)
_WHOLE = _names("min_length min_new_tokens no_repeat_ngram_size encoder_no_repeat_ngram_size")
_IDS = ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias")
# Values at which an argument of those refused asks for nothing, besides None and False.
_NEUTRAL = {**GenerationConfig._get_default_generation_params(), "cache_implementation": "dynamic"}


def check(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse what is unknown or cannot be honoured, be it by itself or in the generation config that is given.

    Raises:
        UnknownArgumentError: neither transformers nor ragkv knows an argument of that name.
        ArgumentError: an argument that cannot be honoured.
    """
    given = arguments.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise ArgumentError(f"generation_config must be a transformers GenerationConfig, got {type(given).__name__}")
    for name in ("logits_processor", "stopping_criteria"):
        if not isinstance(arguments.get(name), list | None):
            raise ArgumentError(
                f"{name} must be a list, got {type(arguments[name]).__name__}: give [...] of one or more"
            )
        for item in arguments.get(name) or ():
            instance(f"each of {name}", item, _FUNCTION, "a function")
    for name, (kind, must) in _KINDS.items():
        instance(name, arguments.get(name), kind | None, must)
    known = vars(GenerationConfig())
    said = (
        {} if given is None else {name: vars(given)[name] for name in known if name[0] != "_" and name in vars(given)}
    )
    for name, value in {**said, **arguments}.items():
        if name in HONOURED or name in BESIDE or (name in {*REFUSED, *known} and _neutral(name, value)):
            continue
        why = REFUSED.get(name)
        if why is None and name in known:
            why = "this version of ragkv does not know it: leave it out"
        elif why is None and name in inspect.signature(model.forward).parameters:
            why = _PROMPT
        if why is None:
            raise UnknownArgumentError(_unknown(name))
        raise ArgumentError(f"{name}={_short(value)}: {why}")


def check_own(config: GenerationConfig) -> None:
    """Refuse what a model's own generation config says and what the answer would be another one without.

    Raises:
        ArgumentError: it says so.
    """
    for name in _DECISIVE:
        if not _neutral(name, getattr(config, name, None)):
            raise ArgumentError(f"{name} (the model's generation config sets it): {REFUSED[name]}")


def check_values(config: GenerationConfig, vocabulary: int) -> None:
    """Refuse what transformers would find out in the middle of an answer: numbers that are none, ids that the model has not.

    Raises:
        ArgumentTypeError: no number.
        ArgumentError: an id that is none of the vocabulary's.
    """
    for name in _NUMBERS:
        value: Any = getattr(config, name, None)
        if value is not None and not is_number(value):
            said = "a number of seconds" if name == "max_time" else "a number"
            raise ArgumentTypeError(f"{name} must be {said}, got {value!r:.80}")
    for name in _WHOLE:
        value = getattr(config, name, None)
        if value is not None:
            whole_number(name, value)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list | tuple) and name[0] == "e" else [value]
        if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            raise ArgumentTypeError(f"{name} must be a token's id, got {value!r:.80}")
    for name in _IDS:
        value = getattr(config, name, None)
        if name == "sequence_bias":  # what its form is, transformers looks at
            value = list(value) if isinstance(value, Mapping) else [pair[:1] for pair in _lists(value)]
        wrong = [token for token in _flat(value) if isinstance(token, bool) or not 0 <= token < vocabulary]
        if wrong:
            raise ArgumentError(f"{name}: {wrong[0]} is none of the model's {vocabulary} ids")


def _flat(value: Any) -> list[int]:
    """The whole numbers in lists of lists."""
    if isinstance(value, list | tuple):
        return [token for part in value for token in _flat(part)]
    return [value] if isinstance(value, int) else []


def _lists(value: Any) -> list[Any]:
    return [part for part in value if isinstance(part, list | tuple)] if isinstance(value, list | tuple) else []


def _neutral(name: str, value: Any) -> bool:
    """Whether an argument that is refused otherwise asks for nothing."""
    return value is None or (isinstance(value, bool | int | float | str) and value == _NEUTRAL.get(name, False))


def _unknown(name: str) -> str:
    near = get_close_matches(name, [*HONOURED, *BESIDE, *OWN, "method", "stop", "priority", "deadline_s"], 3)
    hint = f": did you mean {' or '.join(near)}?" if near else ": it takes what model.generate takes"
    return f"there is no generation argument {name}{hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"<{type(value).__name__}>"
