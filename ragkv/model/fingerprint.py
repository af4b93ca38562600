"""What keys and values depend on besides the token ids: the model, as it was loaded."""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ragkv.chunk import digest

_SAMPLES = 64
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_digest(module: nn.Module) -> bytes:
    """Digest of a module's weights and persistent buffers that changes when any single element changes.

    Every tensor contributes its name, shape, dtype, the exact integer sum of its bit patterns, and evenly spaced samples.
    It is not a cryptographic hash of the weights: it guards against mistakes, not against an adversary.
    """
    parts: list[bytes | str] = []
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor):
            continue
        parts.append(f"{name}{tuple(tensor.shape)}{tensor.dtype}")
        parts.append(_bits_digest(tensor.detach()))
    return digest(*parts)


def _bits_digest(tensor: Tensor) -> bytes:
    if tensor.numel() == 0 or tensor.is_meta:
        return b""
    bits = tensor.contiguous().flatten()
    bits = bits.view(_BITS[bits.element_size()]) if bits.dtype != torch.bool else bits.to(torch.uint8)
    step = max(1, bits.numel() // _SAMPLES)
    total = int(bits.sum(dtype=torch.int64))
    return total.to_bytes(8, "little", signed=True) + bits[::step].cpu().numpy().tobytes()


def model_fingerprint(model: nn.Module, config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> str:
    """Hex digest of model weights (an adapter's among them), configuration, rope, dtype and attention kind.

    Args:
        model: the loaded decoder.
        config: its text config.
        dtype: of keys and values.
        attention: the attention implementation that the model was loaded with.
    """
    skip = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
    settings = {key: value for key, value in config.to_dict().items() if key not in skip}
    described = json.dumps(settings, sort_keys=True, default=str)
    return digest(weight_digest(model), described, str(dtype), attention).hex()
