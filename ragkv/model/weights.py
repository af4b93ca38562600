"""A model's weights as they run: every tensor that its forward reads, and a digest of each.

Offloaded weights (accelerate) are read where they are kept, and of adapters (PEFT) those count that are active. PEFT and
accelerate are known by what their modules carry, not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ragkv.errors import UnsupportedModelError

_LANES = 1 << 13  # 64-bit words that are summed into one
_BLOCK = 1 << 10  # sums made at once, which bounds the memory they take
_ODD = 0x1E3779B97F4A7C15  # large, odd, bits as if drawn at random


class OnDisk(NamedTuple):
    """A tensor that accelerate reads from a file whenever it is needed.

    Attributes:
        weights: by name.
        name: of this one.
        mark: the file, and when and how large it was written.
    """

    weights: Mapping[str, Tensor]
    name: str
    mark: tuple[object, ...]


class Saved(NamedTuple):
    """A tensor that stands for what a module of quantised weights keeps; many are made anew whenever they are asked for.

    Attributes:
        tensor: its numbers.
    """

    tensor: Tensor


#: A tensor that runs, or what else decides what is computed, in words.
Bare = Tensor | OnDisk | str
Part = Bare | Saved


def parts(module: nn.Module) -> Iterator[tuple[str, Part]]:
    """Everything that a module's forward depends on, named as in the bare model, in an order of its own.

    Raises:
        UnsupportedModelError: a weight is on the meta device, and nothing says where it is kept.
    """
    return _walk(module, "", ())


def _walk(module: Any, path: str, offloaded: tuple[tuple[str, Mapping], ...]) -> Iterator[tuple[str, Part]]:
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            offloaded = (*offloaded, (path, hook.weights_map))
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield from _resolved(tensor, path + name, offloaded)
    for name, tensor in _packed(module):
        for inner, part in _resolved(tensor, path + name, offloaded):
            yield inner, Saved(part) if isinstance(part, Tensor) else part
    adapters = _adapters(module)
    if adapters:
        yield path, _adapter_state(module, adapters)
    for name, child in module._modules.items():
        if child is None:
            continue
        if adapters is None:
            yield from _walk(child, f"{path}{name}.", offloaded)
        elif name in module.adapter_layer_names:
            for number, adapter in enumerate(adapters):
                for kind in (child._parameters, child._buffers):
                    if kind.get(adapter) is not None:
                        yield from _resolved(kind[adapter], f"{path}{name}.{number}", offloaded)
                if adapter in child._modules:
                    yield from _walk(child._modules[adapter], f"{path}{name}.{number}.", offloaded)
        else:  # what the adapter stands about keeps the name that it has without one
            yield from _walk(child, path if name in ("base_layer", "original_module") else f"{path}{name}.", offloaded)


def contained(module: nn.Module) -> bool:
    """Whether parameters and buffers are all that runs: not so with offloading, packed weights, or tensors within tensors."""
    for child in module.modules():
        tensors = (*child._parameters.values(), *child._buffers.values())
        plain = all(tensor is None or type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
        if _hooks(child) or next(_packed(child), None) is not None or not plain:
            return False
    return True


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _packed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a module of quantised weights keeps besides its parameters, scales say, as far as it would save them."""
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    for name, value in saved.items():
        if name not in module._parameters and name not in module._buffers:
            # PyTorch's own quantised layers save weight and bias as one.
            tensors = value if isinstance(value, tuple) else (value,)
            yield from (
                (f"{name}.{at}" if at else name, part) for at, part in enumerate(tensors) if isinstance(part, Tensor)
            )


def _adapters(module: Any) -> list[str] | None:
    """Names of the adapters that take part in a module's forward; ``None`` where it has no place for any."""
    if not hasattr(module, "adapter_layer_names"):
        return None
    active = [] if module.disable_adapters else module.active_adapters
    return list(dict.fromkeys([*module.merged_adapters, *active]))


def _adapter_state(module: Any, adapters: list[str]) -> str:
    settings = [getattr(module, name, None) for name in module.other_param_names]
    numbers = [
        value[adapter]
        for value in settings
        if isinstance(value, Mapping)
        for adapter in adapters
        if isinstance(value.get(adapter), bool | int | float | str)
    ]
    return f"{len(module.merged_adapters)} merged, disabled {module.disable_adapters}, {numbers}"


def _resolved(tensor: Tensor, name: str, offloaded: tuple[tuple[str, Mapping], ...]) -> Iterator[tuple[str, Bare]]:
    if type(tensor) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(tensor):
        inner, context = tensor.__tensor_flatten__()
        yield name, f"{type(tensor).__name__} {context}"
        for attribute in inner:
            yield from _resolved(getattr(tensor, attribute), f"{name}.{attribute}", offloaded)
    elif tensor.is_meta:
        yield name, _kept(name, offloaded)
    else:
        yield name, tensor


def _kept(name: str, offloaded: tuple[tuple[str, Mapping], ...]) -> Tensor | OnDisk:
    for path, weights in reversed(offloaded):
        own = name.removeprefix(path)
        prefix, source = getattr(weights, "prefix", ""), getattr(weights, "dataset", weights)
        key = prefix + own
        info = {} if key in getattr(source, "state_dict", {}) else getattr(source, "index", {}).get(key, {})
        file = info.get("safetensors_file") or os.path.join(getattr(source, "save_folder", None) or "", f"{key}.dat")
        if info and os.path.exists(file):
            written = os.stat(file)
            return OnDisk(weights, own, (file, key, written.st_mtime_ns, written.st_size))
        if key in source:
            return weights[own]
    raise UnsupportedModelError(
        f"{name} has no numbers (meta device), and no hook of accelerate says where they are kept: whether stored KV are this "
        "model's cannot be told. Load its weights first."
    )


def part_digest(part: Bare) -> bytes:
    """A digest that changes when any element, the order of elements, the shape or the dtype changes.

    Not cryptographic: it guards against mistakes, not against an adversary.
    """
    if isinstance(part, str):
        return part.encode()
    tensor = (part.weights[part.name] if isinstance(part, OnDisk) else part).detach()
    if tensor.layout != torch.strided:
        raise UnsupportedModelError(f"weights must be dense to be told apart, got {tensor.layout}")
    about = f"{tensor.dtype} {list(tensor.shape)}"
    if tensor.is_quantized:
        about, tensor = f"{about} {tensor.qscheme()} {tensor}", tensor.int_repr()
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    return about.encode() + (xxhash.xxh3_128_digest(_bytes(raw)) if raw.device.type == "cpu" else device_digest(raw))


def _bytes(raw: Tensor) -> Any:
    return raw.numpy()  # without a copy


def device_digest(raw: Tensor) -> bytes:
    """Digest of bytes ``[B]`` where they are: weighted sums of mixed 64-bit words, of which only the sums leave the device.

    Each word is multiplied by an odd number of its lane, so that order counts, and folded, so that no two changes of high bits
    cancel (multiply and xor-shift, as in the finaliser of MurmurHash3).
    """
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) - len(raw) % (8 * _LANES)
    lanes = (torch.arange(1, _LANES + 1, device=raw.device) * _ODD) | 1
    hasher = xxhash.xxh3_128()
    sums = []
    for words in raw[:whole].view(torch.int64).view(-1, _LANES).split(_BLOCK):
        mixed = (words ^ (words >> 29)) * lanes
        mixed ^= mixed >> 32
        mixed *= _ODD
        sums.append((mixed ^ (mixed >> 29)).sum(1))
    if whole:
        hasher.update(_bytes(torch.cat(sums).cpu()))
    hasher.update(_bytes(raw[whole:].cpu()))
    return hasher.digest()
