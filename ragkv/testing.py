"""Tiny random decoders and gates, for tests of ragkv and of programs built on it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from ragkv.model.cache import cache_argument

#: Small sizes that nearly every decoder config takes.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,  # so large that a token left out shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}

_WINDOWED = {"sliding_window": 16}
_MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: What an architecture needs besides; every one of these is driven exactly.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _WINDOWED,
    "mixtral": _MIXTURE,
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_MIXTURE, "decoder_sparse_step": 1},
    "phi": {},
    "phi3": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {**_WINDOWED, "attn_implementation": "eager", "query_pre_attn_scalar": 16},
    "gemma3_text": {
        **_WINDOWED,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "cohere2": _WINDOWED,
    "glm": {},
    "glm4": {},
    "stablelm": {},
    "smollm3": {},
    "starcoder2": _WINDOWED,
    "gpt_neox": {},
    "gptj": {
        "rotary_dim": 8,
        "head_dim": None,
        "num_key_value_heads": None,
        "attn_implementation": "eager",
    },
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "gpt_oss": {**_WINDOWED, **_MIXTURE, "attn_implementation": "eager"},
    "llama4_text": {**_MIXTURE, "attention_chunk_size": 32, "intermediate_size_mlp": 96},
}


def tiny_model(architecture: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random decoder of a few thousand parameters, in fp32 on the CPU.

    Args:
        architecture: a transformers model type; :data:`ARCHITECTURES` lists those that are tried.
        seed: of its weights.
        **overrides: config values that replace the small defaults; ``attn_implementation`` among them.
    """
    # Configs write into what they get.
    settings = deepcopy({**SMALL, **ARCHITECTURES.get(architecture, {}), **overrides})
    attention = settings.pop("attn_implementation")
    settings = {name: value for name, value in settings.items() if value is not None}
    config = AutoConfig.for_model(architecture, **settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    finally:
        torch.random.set_rng_state(state)
    for module in model.modules():  # random sinks and biases, so that dropping them would show
        for name in ("sinks", "bias"):
            parameter = getattr(module, name, None)
            if isinstance(parameter, torch.nn.Parameter):
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(seed))
    return model.eval()


def as_cache(cache: Cache) -> dict[str, Cache]:
    """A cache as the argument of a model's call, by the name that the installed transformers gives it."""
    return {cache_argument(create_causal_mask): cache}


def shows_attention(architecture: str) -> bool:
    """Whether a model's attention goes through transformers' interface, where it is seen and exchanged; gptj's does since 5.24."""
    return bool(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[architecture]]._supports_attention_backend)


def random_ids(count: int, seed: int | None = None) -> list[int]:
    """``count`` random token ids that every tiny model knows; by default those of ``seed = count``."""
    generator = torch.Generator().manual_seed(count if seed is None else seed)
    return torch.randint(3, SMALL["vocab_size"], (count,), generator=generator, device="cpu").tolist()
