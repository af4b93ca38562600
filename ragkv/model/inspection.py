"""What can be told of a model before it runs: what is inside a wrapper, where its layers are, and which are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ragkv.errors import UnsupportedModelError

_ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model in the wrappers of PEFT (its adapters stay active) and ``torch.compile``.

    Raises:
        UnsupportedModelError: the wrapper adds tokens of its own, or there is no transformers model inside.
    """
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "the adapter puts learned tokens in front of the prompt (prompt learning), of which a chunk's KV know nothing: use "
                "adapters that change weights, as LoRA"
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            raise UnsupportedModelError(f"ragkv drives transformers models, got {type(model).__name__}")
    return model


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The model's decoder layers.

    Raises:
        UnsupportedModelError: there is no list of ``count`` modules.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep its decoder layers in one list of {count}, as many as its config says it has "
            "(num_hidden_layers): it runs some of them several times, or has several stacks. ragkv steps in between layers, and "
            "needs a decoder that runs one list of them from the first to the last"
        )
    return lists[0]  # a mixture's experts may be as many, but they stand inside the layers and come later


def most_positions(config: PreTrainedConfig) -> int | None:
    """The positions that a config says a model has, as far as it is exact; ``None``: no limit."""
    names = "max_position_embeddings", "keep_window_size"
    # Beyond so many keys (Doge) each query keeps those of the largest scores, and of equal tokens' rounding chooses one.
    limits = [limit for limit in (getattr(config, name, None) for name in names) if limit is not None]
    return min(limits, default=None)


def non_finite(dtype: torch.dtype) -> str:
    """Why a model computes NaN or infinities, and what to do."""
    if dtype == torch.float16:
        return "float16 is too narrow for this model: load it with dtype=torch.bfloat16 or dtype=torch.float32"
    return f"its weights hold NaN, or {dtype} is too narrow: look at the weights, or load it with dtype=torch.float32"


def refuse_autocast(device: torch.device) -> None:
    """Refuse to run in another precision than the model's own, which stored KV would not tell.

    Raises:
        UnsupportedModelError: autocast is on in this thread.
    """
    kinds = ("cpu", "cuda") if device.type == "meta" else (device.type,)  # offloaded: it runs on whatever there is
    if any(map(torch.is_autocast_enabled, kinds)):
        raise UnsupportedModelError(
            "torch.autocast is on: KV would be of another precision than the model's. Load it with dtype=... and leave autocast off"
        )


def refuse_state(model: nn.Module) -> None:
    """Refuse a model in training mode, whose KV would be random, or one that is compiled in place.

    Raises:
        UnsupportedModelError: it, or a dropout in it (an adapter's, say), is in training mode; or a part of it was compiled.
    """
    dropout, random = nn.modules.dropout._DropoutNd, model.training
    modules, seen = [model], set[int]()
    for module in modules:  # once for both
        if id(module) in seen:
            continue
        seen.add(id(module))
        modules += [child for child in module._modules.values() if child is not None]
        if _compiled(module):
            raise UnsupportedModelError(
                f"{type(module).__name__} was compiled in place, and fusion steps into it while it runs: load the model again "
                "without that; what torch.compile(model) returns may be given, and is driven uncompiled"
            )
        random = random or (module.training and isinstance(module, dropout) and module.p > 0)
    if random:
        raise UnsupportedModelError("the model is in training mode, where dropout makes KV random: call model.eval()")


def _compiled(module: nn.Module) -> bool:
    own = module.__dict__
    return (
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in own["_modules"]
        or ("forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"))
    )


def each_layers(config: PreTrainedConfig, name: str) -> list[Any]:
    """A config's setting: one value, or one a layer where its layers differ in it; ``None`` where it is not set."""
    if name not in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(config, name, None)]
    return [getattr(layer, name, None) for layer in config.per_layer_config]


def refuse_by_config(config: PreTrainedConfig) -> None:
    """Refuse by name what a config says that ragkv cannot drive exactly.

    Raises:
        UnsupportedModelError: the message names the reason.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder: ragkv drives decoders only")
    if any(each_layers(config, "alibi")):
        raise UnsupportedModelError(
            f"{name} uses ALiBi: its attention depends on absolute key positions, which ragkv does not move"
        )
    if any(each_layers(config, "kv_lora_rank")):
        raise UnsupportedModelError(
            f"{name} keeps a latent (MLA) cache: its rotated part is not where ragkv looks for it. Use a decoder that keeps keys "
            "and values of heads"
        )
    for window in ("sliding_window", "attention_chunk_size"):
        if len(set(each_layers(config, window))) > 1:
            raise UnsupportedModelError(
                f"{name} has layers that differ in their {window}, and ragkv takes one for all layers of a kind. Use a config "
                "that says it once, and by layer_types which layers have it"
            )
    foreign = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_KINDS
    if foreign:
        raise UnsupportedModelError(
            f"{name} has layers of kind {', '.join(sorted(foreign))}: recurrent and other states cannot be cut into chunks. ragkv "
            f"supports {', '.join(sorted(_ATTENTION_KINDS))}."
        )
    for kind in _rope_kinds(getattr(config, "rope_parameters", None)):
        if kind in ("dynamic", "longrope"):
            raise UnsupportedModelError(
                f"{name} uses rope type '{kind}', whose frequencies depend on the prompt's length: keys of one length do not fit "
                "another. Use a checkpoint or a config with rope type default, linear, llama3 or yarn."
            )


def _rope_kinds(parameters: Any) -> list[str]:
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [kind for value in parameters.values() for kind in _rope_kinds(value)]
