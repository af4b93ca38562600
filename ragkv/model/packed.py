"""Weights packed for a CPU: linear layers that read half or a quarter of fp32's bytes, which is what a decoded token waits for.

The kernels are FBGEMM's, which PyTorch brings along on x86. Activations, and so KV, are fp32.

O rows of a weight, I columns, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ragkv.chunk import digest
from ragkv.errors import ArgumentError, UnsupportedModelError
from ragkv.model.weights import part_digest

#: How weights may be packed.
Packing = Literal["float16", "int8"]

_ENGINE = "fbgemm"
_HIGH = 63  # 7 bits of an activation at once: two products of 7 by 8 bits fit the 16 bits in which AVX2 sums them
_LOW = 2 * _HIGH  # what is left of it lies in [-1/2, 1/2]
#: Of high and low, where a token's largest activation is 1; on the CPU, whatever PyTorch's defaults are just now.
_STEPS = torch.tensor([1 / _HIGH, 1 / (_HIGH * _LOW)], dtype=torch.float32, device="cpu")
_TINY = torch.tensor(1e-30, dtype=torch.float32, device="cpu")


class Float16Linear(nn.Module):
    """A linear layer with weights in fp16, multiplied and summed in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.register_buffer("digest", _digest(weight.half()))
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., I]`` fp32 to ``[..., O]``."""
        out = torch.ops.quantized.linear_dynamic_fp16(inputs, self._packed)
        return out if self.bias is None else out + self.bias


class Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits, a scale a row; activations count with 13 bits of each token's largest one.

    An activation is split into its first 7 bits and the next 7: two rows of 8-bit numbers, multiplied exactly, so that what comes
    out for a token does not hang on which others are computed with it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        with catch_warnings():
            # PyTorch means to move its quantised tensors out one day, and has nothing else for these kernels.
            simplefilter("ignore")
            rounded = torch.quantize_per_channel(weight, scales.double(), scales.long() * 0, 0, torch.qint8)
        self.register_buffer("digest", _digest(rounded.int_repr(), scales))
        self._packed = torch.ops.quantized.linear_prepack(rounded, None)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[..., I]`` fp32 to ``[..., O]``."""
        split, scales = _split(inputs)
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(split, 1.0, _HIGH + 1, self._packed)
        out = out.mul_(scales).sum(0)
        return out if self.bias is None else out.add_(self.bias)


def _split(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Activations ``[..., I]`` as whole numbers of 7 bits ``[2, ..., I]``, high and low, and the scales ``[2, ..., 1]`` of both.

    Layers that read the same tensor, as query, key and value do, share its split: it stays with the tensor.
    """
    version = None if inputs.is_inference() else inputs._version  # what is written in place is split again
    kept = getattr(inputs, "_ragkv_split", None)
    if kept is not None and version is not None and kept[0] == version:
        return kept[1]
    steps = _STEPS.view(2, *[1] * inputs.dim())
    tops = inputs.abs().amax(-1, keepdim=True)
    scales = torch.addcmul(_TINY, steps, tops)
    split = inputs / scales
    high, low = split.unbind()
    low.sub_(high.round_(), alpha=_LOW)
    inputs._ragkv_split = version, (split, scales)  # type: ignore[attr-defined]
    return split, scales


_LAYERS: dict[str, Callable[[Tensor, Tensor | None], nn.Module]] = {"float16": Float16Linear, "int8": Int8Linear}


def check_packing(packing: str, device: str | None, options: dict[str, Any]) -> None:
    """Refuse what cannot be packed, before anything is loaded.

    Raises:
        ArgumentError: there is no such packing; or it is asked for with another device than a CPU, another dtype than fp32, or
            weights that are quantised already.
        UnsupportedModelError: this PyTorch has no kernels for it.
    """
    if packing not in _LAYERS:
        raise ArgumentError(f"weights must be one of {', '.join(get_args(Packing))}, got {packing!r}")
    if device not in (None, "cpu") or "device_map" in options:
        raise ArgumentError(f"weights={packing!r} is packed for a CPU: leave out device and device_map")
    if options.get("dtype") not in (None, "auto", "float32", torch.float32):
        raise ArgumentError(f"weights={packing!r} computes in float32, got dtype={options['dtype']}: leave it out")
    if options.get("quantization_config") is not None:
        raise ArgumentError(f"weights={packing!r} packs plain weights: leave out quantization_config")
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise UnsupportedModelError(
            f"weights={packing!r} needs FBGEMM, which this PyTorch lacks (it is built for x86): leave it out"
        )


def pack(model: PreTrainedModel, packing: Packing) -> PreTrainedModel:
    """Replace a model's linear layers, in place; everything else becomes fp32.

    Args:
        model: on the CPU.
        packing: of :data:`Packing`.

    Returns:
        The model.

    Raises:
        ArgumentError, UnsupportedModelError: as :func:`check_packing`; or there is no linear layer in the model.
    """
    check_packing(packing, model.device.type, {})
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward
    ]
    if not found:
        raise UnsupportedModelError(f"weights={packing!r}: {type(model).__name__} has no linear layers to pack")
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE  # asked for when weights are packed, not when they are used
    try:
        with torch.no_grad():
            while found:  # each layer's own weights go as it is packed
                parent, name, child = found.pop()
                bias = None if child.bias is None else nn.Parameter(child.bias.float(), requires_grad=False)
                setattr(parent, name, _LAYERS[packing](child.weight.float(), bias))
    finally:
        torch.backends.quantized.engine = engine
    return model.float().eval()


def _digest(*parts: Tensor) -> Tensor:
    """Bytes by which packed weights, which nothing else can read, are told apart: part of the space of KV."""
    return torch.frombuffer(bytearray(digest(*map(part_digest, parts))), dtype=torch.uint8)
