"""The record: one chunk's KV as bytes that outlive the process that made them.

A record is a safetensors file (header, then the tensors' bytes: layer 0's K, V, layer 1's K, V ...), kept as

    header   b"RAGKV" | version u8 | 0 u16 | xxh3_64 of key and header u64 | safetensors header (u64 length, JSON)
    payload  the tensors' bytes, cut into segments of ``segment_bytes``; the last one is shorter

so that a header and its segments, one after the other, *are* a safetensors file. The checksums of the segments stand in
the header, whose own checksum covers the key: a record that is found under another's key is damaged. All numbers are
little-endian.

L layers, H kv heads, T tokens, D head_dim.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.errors import RecordError
from ragkv.store.codecs import Side, get_codec

VERSION = 1
MAGIC = b"RAGKV"
# An overflow page of LMDB has a header of 16 bytes: with it a segment fills its pages exactly, and as all full
# segments are equally long, the room that one leaves fits the next.
SEGMENT_BYTES = (1 << 20) - 16

DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = struct.Struct("<5sBHQ")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor: its dtype, shape and place in the payload, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Record:
    """The header of a record: what it holds, where, and what its bytes must sum to.

    Attributes:
        parts: stored tensors by name (``k.3``, ``v.3``, ``k.3.scale``), in the order of the payload.
        shapes: per layer the K and the V shape ``[H, T, D]`` as they were before encoding.
        dtypes: per layer the dtype as it was before encoding.
        base: position at which the chunk's first token stood when the KV was made.
        codec: how tensors were encoded.
        space: fingerprint of all that the KV depends on besides its ids.
        segment_bytes: bytes of each segment but the last.
        checksums: xxh3_64 of each segment.
    """

    parts: dict[str, Part]
    shapes: list[tuple[tuple[int, int, int], tuple[int, int, int]]]
    dtypes: list[torch.dtype]
    base: int
    codec: str
    space: str
    segment_bytes: int
    checksums: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """T, the chunk's tokens."""
        return self.shapes[0][0][1]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all segments together."""
        return max(part.stop for part in self.parts.values())

    @cached_property
    def layer_parts(self) -> list[dict[Side, dict[str, Part]]]:
        """Per layer and side the parts, by the names that the codec gave them."""
        layers: list[dict[Side, dict[str, Part]]] = [{"k": {}, "v": {}} for _ in self.shapes]
        for name, part in self.parts.items():
            side, layer, *rest = name.split(".", 2)
            layers[int(layer)]["k" if side == "k" else "v"]["".join(rest)] = part
        return layers

    def span(self, layer: int) -> tuple[int, int]:
        """First and last-but-one byte of a layer in the payload."""
        parts = [part for side in self.layer_parts[layer].values() for part in side.values()]
        return min(part.start for part in parts), max(part.stop for part in parts)

    def segment_span(self, index: int) -> tuple[int, int]:
        """First and last-but-one byte of a segment in the payload."""
        start = index * self.segment_bytes
        return start, min(start + self.segment_bytes, self.payload_bytes)

    def segments_of(self, layer: int) -> range:
        """The segments in which a layer's bytes lie."""
        start, stop = self.span(layer)
        return range(start // self.segment_bytes, -(-stop // self.segment_bytes))

    def check_segment(self, index: int, data: Tensor) -> None:
        """Raises RecordError where a segment's bytes (uint8) are not those that were stored."""
        if checksum(data) != self.checksums[index]:
            raise RecordError(f"segment {index} of {len(self.checksums)} is damaged: its checksum differs")

    def layer(self, payload: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer.

        Args:
            payload: uint8 ``[payload_bytes]``, of which at least the layer's span must be there.
            layer: which.

        Returns:
            With the codec ``raw``, views of the payload.
        """
        codec = get_codec(self.codec)
        sides = self.layer_parts[layer]
        dtype = self.dtypes[layer]
        key_shape, value_shape = self.shapes[layer]
        return (
            codec.decode(_views(payload, sides["k"]), key_shape, dtype, "k"),
            codec.decode(_views(payload, sides["v"]), value_shape, dtype, "v"),
        )

    def decode(self, payload: Tensor) -> ChunkKV:
        """All layers of a whole payload."""
        pairs = [self.layer(payload, layer) for layer in range(len(self.shapes))]
        return ChunkKV([key for key, _ in pairs], [value for _, value in pairs], self.base)

    def safetensors_header(self) -> bytes:
        """``u64 length, JSON``: what a safetensors file begins with."""
        table: dict[str, object] = {"__metadata__": _metadata(self)}
        for name, part in self.parts.items():
            table[name] = {
                "dtype": NAMES[part.dtype],
                "shape": list(part.shape),
                "data_offsets": [part.start, part.stop],
            }
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return _LENGTH.pack(len(text)) + text

    def pack(self, key: bytes) -> bytes:
        """The header's bytes, bound to the key that it is stored under."""
        header = self.safetensors_header()
        return _PREFIX.pack(MAGIC, VERSION, 0, _header_checksum(key, header)) + header

    @classmethod
    def unpack(cls, key: bytes, data: bytes) -> Record:
        """Reads what :meth:`pack` wrote.

        Raises:
            RecordError: the bytes are not a header of this version under this key, or contradict themselves.
        """
        if len(data) < _PREFIX.size + _LENGTH.size:
            raise RecordError(f"a record's header has at least {_PREFIX.size + _LENGTH.size} bytes, got {len(data)}")
        magic, version, _, checksum = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise RecordError(f"a record begins with {MAGIC!r}, got {magic!r}")
        if version != VERSION:
            raise RecordError(f"this version of ragkv reads records of version {VERSION}, got {version}: store it anew")
        header = data[_PREFIX.size :]
        if _header_checksum(key, header) != checksum:
            raise RecordError("the record's header is damaged: its checksum differs")
        return parse_safetensors(header)


def parse_safetensors(header: bytes) -> Record:
    """The record that a safetensors header describes.

    Raises:
        RecordError: it is not one that ragkv wrote, or its numbers contradict each other.
    """
    try:
        (length,) = _LENGTH.unpack_from(header)
        if length != len(header) - _LENGTH.size:
            raise RecordError(f"the record's header says {length} bytes and has {len(header) - _LENGTH.size}")
        table = json.loads(header[_LENGTH.size :])
        facts = table.pop("__metadata__")
        parts = {name: _part(entry) for name, entry in table.items()}
        layers = _expand(json.loads(facts["layers"]), int(facts["tokens"]))
        digits = facts["xxh3_64"]
        record = Record(
            parts=parts,
            shapes=[shapes for _, shapes in layers],
            dtypes=[dtype for dtype, _ in layers],
            base=int(facts["base"]),
            codec=facts["codec"],
            space=facts["space"],
            segment_bytes=int(facts["segment_bytes"]),
            checksums=tuple(int(digits[at : at + 16], 16) for at in range(0, len(digits), 16)),
        )
        _check(record)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, struct.error, RecursionError) as error:
        raise RecordError(f"the record's header cannot be read: {type(error).__name__}: {error}") from error
    return record


def _metadata(record: Record) -> dict[str, str]:
    runs: list[list[object]] = []
    for dtype, (key, value) in zip(record.dtypes, record.shapes, strict=True):
        kind: list[object] = [NAMES[dtype], key[0], key[2], value[0], value[2]]
        if runs and runs[-1][1:] == kind:
            runs[-1][0] = int(str(runs[-1][0])) + 1
        else:
            runs.append([1, *kind])
    return {
        "format": f"ragkv-{VERSION}",
        "space": record.space,
        "codec": record.codec,
        "base": str(record.base),
        "tokens": str(record.tokens),
        "layers": json.dumps(runs, separators=(",", ":")),
        "segment_bytes": str(record.segment_bytes),
        "xxh3_64": "".join(f"{checksum:016x}" for checksum in record.checksums),
    }


def _expand(
    runs: Sequence[Sequence], tokens: int
) -> list[tuple[torch.dtype, tuple[tuple[int, int, int], tuple[int, int, int]]]]:
    layers = []
    for count, dtype, key_heads, key_dim, value_heads, value_dim in runs:
        if not 0 < count <= 1 << 16:
            raise ValueError(f"{count} layers of one kind")
        layers += [(DTYPES[dtype], ((key_heads, tokens, key_dim), (value_heads, tokens, value_dim)))] * count
    return layers


def _part(entry: dict) -> Part:
    start, stop = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = DTYPES[entry["dtype"]]
    count = 1
    for size in shape:
        count *= size
    if start < 0 or min(shape, default=1) < 0 or stop - start != count * dtype.itemsize:
        raise ValueError(f"a tensor {shape} of {dtype} cannot lie in bytes {start} to {stop}")
    return Part(dtype, shape, start, stop)


def _check(record: Record) -> None:
    """Raises ValueError unless parts follow each other without holes, layers are complete, and segments fit."""
    end = 0
    for name, part in record.parts.items():
        if part.start != end:
            raise ValueError(f"{name} begins at byte {part.start}, the part before it ends at {end}")
        end = part.stop
    if not record.shapes or record.base < 0 or record.segment_bytes < 1 or end < 1:
        raise ValueError("an empty record")
    if len(record.checksums) != -(-end // record.segment_bytes):
        raise ValueError(f"{len(record.checksums)} checksums for {end} bytes in segments of {record.segment_bytes}")
    for layer, sides in enumerate(record.layer_parts):
        if "" not in sides["k"] or "" not in sides["v"]:
            raise ValueError(f"layer {layer} is not complete")


def _views(payload: Tensor, parts: dict[str, Part]) -> dict[str, Tensor]:
    return {name: _view(payload, part) for name, part in parts.items()}


def _view(payload: Tensor, part: Part) -> Tensor:
    data = payload[part.start : part.stop]
    if part.start % part.dtype.itemsize:
        # A view needs an aligned start; only parts behind those of odd length have none.
        data = data.clone()
    return data.view(part.dtype).view(part.shape)


def checksum(data: Tensor) -> int:
    """xxh3_64 of a uint8 tensor."""
    return xxhash.xxh3_64_intdigest(data.numpy().data)


def _header_checksum(key: bytes, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + header)
