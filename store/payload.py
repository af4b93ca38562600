"""Where the tensors of a record lie in its payload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ragkv.lazy import lazy
from ragkv.store.buffers import allocate

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 16

Kind = tuple[tuple[int, ...], torch.dtype]  # of one tensor: shape and dtype


@dataclass(frozen=True)
class Part:
    """One stored tensor: its dtype, shape and place in the payload, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @lazy
    def stop(self) -> int:
        """The byte behind its last."""
        return self.start + prod(self.shape) * self.dtype.itemsize

    @lazy
    def strides(self) -> tuple[int, ...]:
        """Numbers from one to the next along each dimension."""
        return tuple(prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))


@dataclass(frozen=True)
class Layer:
    """The parts of one layer, by the names that the codec gave them, and the bytes between which they lie."""

    keys: dict[str, Part]
    values: dict[str, Part]
    start: int
    stop: int

    @lazy
    def kinds(self) -> tuple[Kind, Kind]:
        """Shape and dtype of the main parts of K and V."""
        return (self.keys[""].shape, self.keys[""].dtype), (self.values[""].shape, self.values[""].dtype)


@dataclass(frozen=True, eq=False)
class Contents:
    """All parts by name (``k.3``, ``v.3``, ``k.3.scale``), in the order of the payload, without holes."""

    parts: Mapping[str, Part]

    def __post_init__(self) -> None:
        end = 0
        for name, part in self.parts.items():
            if part.start != end:
                raise ValueError(f"{name} begins at byte {part.start}, the part before it ends at {end}")
            end = part.stop
        if not self.layers or not end:
            raise ValueError("no bytes")

    @lazy
    def payload_bytes(self) -> int:
        """Bytes of all parts."""
        return max(layer.stop for layer in self.layers)

    @lazy
    def layers(self) -> tuple[Layer, ...]:
        """The parts by layer."""
        grouped: dict[int, tuple[dict[str, Part], dict[str, Part]]] = {}
        for name, part in self.parts.items():
            side, layer, *rest = name.split(".", 2)
            grouped.setdefault(int(layer), ({}, {}))[("k", "v").index(side)]["".join(rest)] = part
        layers = []
        for number in range(len(grouped)):
            keys, values = grouped[number]
            if "" not in keys or "" not in values:
                raise ValueError(f"layer {number} is not complete")
            both = [*keys.values(), *values.values()]
            layers.append(Layer(keys, values, min(part.start for part in both), max(part.stop for part in both)))
        return tuple(layers)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Contents:
        """The tensors one after the other."""
        parts: dict[str, Part] = {}
        end = 0
        for name, tensor in tensors.items():
            parts[name] = Part(tensor.dtype, tuple(tensor.shape), end)
            end = parts[name].stop
        return cls(parts)

    def to_json(self) -> str:
        """The tensors of a safetensors header, without the outer braces."""
        table = {
            name: {"dtype": NAMES[part.dtype], "shape": part.shape, "data_offsets": [part.start, part.stop]}
            for name, part in self.parts.items()
        }
        return json.dumps(table, separators=(",", ":"))[1:-1]

    @staticmethod
    @lru_cache(maxsize=256)
    def from_json(text: str) -> Contents:
        """Reads :meth:`to_json`. Chunks of one length and model share them.

        Raises:
            ValueError, KeyError, TypeError: it is none, or contradicts itself.
        """
        return Contents({name: _part(entry) for name, entry in json.loads("{" + text + "}").items()})


@dataclass(frozen=True)
class Segments:
    """How a payload is cut: layers that follow each other as long as they fit, a layer that does not in equal pieces.

    Attributes:
        spans: first byte of each segment, and the byte behind its last.
        of_layer: per layer the segments that it lies in.
    """

    spans: tuple[tuple[int, int], ...]
    of_layer: tuple[range, ...]

    def of_layers(self, first: int, last: int) -> range:
        """The segments in which layers lie, the first and the last and all between."""
        return range(self.of_layer[first].start, self.of_layer[last].stop)

    @staticmethod
    @lru_cache(maxsize=256)
    def cut(contents: Contents, bound: int) -> Segments:
        """Cuts a payload into segments of at most ``bound`` bytes."""
        spans: list[tuple[int, int]] = []
        of_layer: list[range] = []
        for layer in contents.layers:
            size = layer.stop - layer.start
            if size > bound:
                pieces = -(-size // bound)
                piece = -(-size // (pieces * _ALIGNMENT)) * _ALIGNMENT
                starts = range(layer.start, layer.stop, min(piece, bound))
                of_layer.append(range(len(spans), len(spans) + len(starts)))
                spans += [(start, min(start + starts.step, layer.stop)) for start in starts]
            elif spans and of_layer and layer.stop - spans[-1][0] <= bound:
                spans[-1] = (spans[-1][0], layer.stop)
                of_layer.append(range(len(spans) - 1, len(spans)))
            else:
                spans.append((layer.start, layer.stop))
                of_layer.append(range(len(spans) - 1, len(spans)))
        return Segments(tuple(spans), tuple(of_layer))


class Extent(NamedTuple):
    """What one segment has of a layer's K or V: all its heads, or a part of one.

    Attributes:
        layer: which layer.
        side: 0 for K, 1 for V.
        heads: which of ``[H, T x bytes of a token]``.
        first: first byte of them in the chunk's row.
        last: the byte behind the last.
        start: where they begin in the segment.
        stop: where they end there.
        token_bytes: bytes of a token in one head.
    """

    layer: int
    side: int
    heads: slice | int
    first: int
    last: int
    start: int
    stop: int
    token_bytes: int


@lru_cache(maxsize=256)
def extents(contents: Contents, bound: int) -> tuple[tuple[Extent, ...], ...]:
    """What to copy out of each segment of a payload whose parts are stored as they are, each ``[H, T, D]``."""
    found: list[tuple[Extent, ...]] = []
    for start, stop in Segments.cut(contents, bound).spans:
        parts = (
            (number, side, part)
            for number, layer in enumerate(contents.layers)
            for side, part in enumerate((layer.keys[""], layer.values[""]))
            if part.start < stop and part.stop > start
        )
        found.append(tuple(extent for item in parts for extent in _extents(*item, start, stop)))
    return tuple(found)


def _extents(layer: int, side: int, part: Part, start: int, stop: int) -> list[Extent]:
    """What the segment from ``start`` to ``stop`` has of a part."""
    heads, tokens, dim = part.shape
    token = dim * part.dtype.itemsize
    row = tokens * token
    if start <= part.start and part.stop <= stop:
        return [Extent(layer, side, slice(None), 0, row, part.start - start, part.stop - start, token)]
    found = []
    for head in range(heads):
        begin = part.start + head * row
        first, last = max(begin, start), min(begin + row, stop)
        if first < last:
            found.append(Extent(layer, side, head, first - begin, last - begin, first - start, last - start, token))
    return found


class Payload:
    """The bytes of a record in memory.

    Attributes:
        data: uint8 ``[payload_bytes]``.
        taken_bytes: what its memory takes: more than it has where that is pinned.
    """

    def __init__(self, size: int) -> None:
        self.data: Tensor
        self.taken_bytes: int
        self.data, self.taken_bytes = allocate(size)
        self._typed: dict[torch.dtype, Tensor] = {}

    def view(self, part: Part) -> Tensor:
        """A part as the tensor that it is; shares the payload's memory where alignment allows."""
        size = part.dtype.itemsize
        if part.start % size:
            return self.data[part.start : part.stop].clone().view(part.dtype).view(part.shape)
        typed = self._typed.get(part.dtype)
        if typed is None:
            typed = self._typed[part.dtype] = self.data[: len(self.data) // size * size].view(part.dtype)
        # One step, for every layer of every chunk of a prompt: to cut and view twice takes more than twice as long.
        return typed.as_strided(part.shape, part.strides, part.start // size)

    def fill(self, part: Part, tensor: Tensor) -> None:
        """Copies a tensor to its place. From a GPU it is there once that has come so far: nothing waits."""
        if part.start % part.dtype.itemsize:
            place, tensor = self.data[part.start : part.stop], tensor.contiguous().view(-1).view(torch.uint8)
        else:
            place = self.view(part)
        place.copy_(tensor, non_blocking=tensor.is_cuda)


def _part(entry: dict[str, Any]) -> Part:
    start, stop = entry["data_offsets"]
    part = Part(DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]), int(start))
    if start < 0 or min(part.shape, default=1) < 0 or part.stop != stop:
        raise ValueError(f"a tensor {part.shape} of {part.dtype} cannot lie in bytes {start} to {stop}")
    return part
