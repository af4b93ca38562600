"""The record: one chunk's KV as bytes that outlive the process that made them.

A record is a safetensors file (header, then the tensors' bytes: layer 0's K, V, layer 1's K, V ...), kept as

    header   b"RAGKV" | version u8 | 0 u16 | xxh3_64 of key and rest u64 | safetensors header (length u64, JSON)
    payload  the tensors' bytes, cut into segments of at most ``segment_bytes``, between layers where that is possible

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
from functools import lru_cache
from itertools import groupby, pairwise
from math import prod
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ragkv.chunk import Attended, ChunkKV
from ragkv.errors import RecordError
from ragkv.store import attending, rope
from ragkv.store.attending import from_base64, to_base64
from ragkv.store.codecs import decoder
from ragkv.store.payload import DTYPES, NAMES, Contents, Part, Payload, Segments
from ragkv.store.rope import Rope

VERSION = 1
MAGIC = b"RAGKV"
# Small enough to be copied out of the second-level cache right after it was hashed, and bounded so that the room
# that a segment leaves in the file fits another.
SEGMENT_BYTES = 1 << 19

_PREFIX = struct.Struct("<5sBHQ")
_LENGTH = struct.Struct("<Q")
_METADATA = '{"__metadata__":'
_JSON = json.JSONDecoder()
_MOST_LAYERS = 1 << 16
_UNREADABLE = (KeyError, ValueError, TypeError, AttributeError, IndexError, struct.error, RecursionError)

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Record:
    """The header of a record: what it holds, where, and what its bytes must sum to.

    Attributes:
        contents: where the stored tensors lie.
        shapes: per layer the K and the V shape ``[H, T, D]`` as they were before encoding.
        dtypes: per layer the dtype as it was before encoding.
        base: position at which the chunk's first token stood when the KV was made.
        codec: how tensors were encoded.
        space: fingerprint of all that the KV depends on besides its ids.
        segment_bytes: the most that a segment has.
        checksums: xxh3_64 of each segment.
        label: what whoever stored it knows it by; never looked at by the store.
        sensitivity: of each token, see :class:`~ragkv.chunk.ChunkKV`; ``None`` where it was not measured.
        foreign: what it was measured with, see there.
        rows: which of a chunk's tokens it holds, see there; ``None`` for all.
        attended: what all of the chunk's tokens attended to, see there; ``None`` where it was not measured.
        ropes: how each layer's keys turn; empty where nobody said. A codec that encodes keys before rotation
            (:attr:`Codec.before_rotation`) has done so where they are known.
    """

    contents: Contents
    shapes: Sequence[tuple[Shape, Shape]]
    dtypes: Sequence[torch.dtype]
    base: int
    codec: str
    space: str
    segment_bytes: int
    checksums: tuple[int, ...]
    label: str = ""
    sensitivity: Tensor | None = None
    foreign: str = ""
    ropes: tuple[Rope | None, ...] = ()
    rows: Tensor | None = None
    attended: Attended | None = None

    @property
    def tokens(self) -> int:
        """T, the chunk's tokens."""
        return self.shapes[0][0][1]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all segments together."""
        return self.contents.payload_bytes

    @property
    def plain_bytes(self) -> int:
        """Bytes of its numbers, decoded."""
        return sum(
            prod(side) * dtype.itemsize for pair, dtype in zip(self.shapes, self.dtypes, strict=True) for side in pair
        )

    @property
    def segments(self) -> Segments:
        """How the payload is cut."""
        return Segments.cut(self.contents, self.segment_bytes)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Per segment its first byte in the payload, and the byte behind its last."""
        return self.segments.spans

    def segments_of(self, layer: int) -> range:
        """The segments in which a layer's bytes lie."""
        return self.segments.of_layer[layer]

    def check_segment(self, index: int, data: Any) -> None:
        """Raises RecordError where a segment's bytes (a uint8 tensor or array) are not those that were stored."""
        if checksum(data) != self.checksums[index]:
            raise RecordError(f"segment {index} of {len(self.checksums)} is damaged: its checksum differs")

    def layer(self, payload: Payload, layer: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H, T, D]`` of one layer, whose bytes must be in the payload.

        With the codec ``raw`` they are views of the payload.
        """
        codec, dtype = decoder(self.codec), self.dtypes[layer]
        key_shape, value_shape = self.shapes[layer]
        parts, values = self.parts(payload, layer)
        if self.turned_back and (turns := self.ropes[layer]) is not None:
            keys = turns.turned(codec.decode(parts, key_shape, torch.float32, "k"), self.base).to(dtype)
        else:
            keys = codec.decode(parts, key_shape, dtype, "k")
        return keys, codec.decode(values, value_shape, dtype, "v")

    def parts(self, payload: Payload, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """K and V of one layer as the codec made them, by the names that it gave them; views of the payload."""
        place = self.contents.layers[layer]
        return _views(payload, place.keys), _views(payload, place.values)

    def check(self, layer: int, keys: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """Raises RecordError where a layer's parts are not what its codec makes for its shapes."""
        codec, dtype, shapes = decoder(self.codec), self.dtypes[layer], self.shapes[layer]
        codec.check(keys, shapes[0], dtype, "k")
        codec.check(values, shapes[1], dtype, "v")

    @property
    def turned_back(self) -> bool:
        """Whether keys are stored as they were before rotary embedding."""
        return bool(self.ropes) and decoder(self.codec).before_rotation

    def decode(self, payload: Payload) -> ChunkKV:
        """All layers of a whole payload."""
        pairs = [self.layer(payload, layer) for layer in range(len(self.shapes))]
        return self.chunk([key for key, _ in pairs], [value for _, value in pairs])

    def chunk(self, keys: list[Tensor], values: list[Tensor]) -> ChunkKV:
        """The chunk whose K and V these are."""
        return ChunkKV(keys, values, self.base, self.sensitivity, self.foreign, self.rows, self.attended)

    def safetensors_header(self) -> bytes:
        """``length u64, JSON``: what a safetensors file begins with."""
        text = f"{_METADATA}{json.dumps(self._metadata(), separators=(',', ':'))},{self.contents.to_json()}}}".encode()
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
        magic, version, _, expected = _PREFIX.unpack_from(data)
        if magic != MAGIC:
            raise RecordError(f"a record begins with {MAGIC!r}, got {magic!r}")
        if version != VERSION:
            raise RecordError(f"this version of ragkv reads records of version {VERSION}, got {version}: store it anew")
        header = data[_PREFIX.size :]
        if _header_checksum(key, header) != expected:
            raise RecordError("the record's header is damaged: its checksum differs")
        return cls.from_safetensors_header(header)

    @classmethod
    def from_safetensors_header(cls, header: bytes) -> Record:
        """The record that a safetensors header describes.

        Raises:
            RecordError: it is not one that ragkv wrote, or its numbers contradict each other.
        """
        try:
            (length,) = _LENGTH.unpack_from(header)
            if length != len(header) - _LENGTH.size:
                raise ValueError(f"it says {length} bytes and has {len(header) - _LENGTH.size}")
            return cls._parse(header[_LENGTH.size :].decode())
        except _UNREADABLE as error:
            raise RecordError(f"the record's header cannot be read: {type(error).__name__}: {error}") from error

    @classmethod
    def _parse(cls, text: str) -> Record:
        if not text.startswith(_METADATA):
            raise ValueError("it does not begin with ragkv's metadata")
        facts, end = _JSON.raw_decode(text, len(_METADATA))
        contents = Contents.from_json(text[end + 1 :].rstrip()[:-1])
        shapes, dtypes = _expand(facts["layers"], int(facts["tokens"]))
        digits = bytes.fromhex(facts["xxh3_64"])
        record = cls(
            contents=contents,
            shapes=shapes,
            dtypes=dtypes,
            base=int(facts["base"]),
            codec=str(facts["codec"]),
            space=str(facts["space"]),
            segment_bytes=int(facts["segment_bytes"]),
            checksums=struct.unpack(f">{len(digits) // 8}Q", digits),
            label=str(facts.get("label", "")),
            sensitivity=from_base64(facts["sensitivity"]) if "sensitivity" in facts else None,
            foreign=str(facts.get("foreign", "")),
            ropes=rope.from_text(facts["rope"]) if "rope" in facts else (),
            rows=_numbers(facts["rows"]) if "rows" in facts else None,
            attended=attending.from_text(facts["attended"]) if "attended" in facts else None,
        )
        if record.sensitivity is not None and len(record.sensitivity) != record.tokens:
            raise ValueError(f"{len(record.sensitivity)} sensitivities for {record.tokens} tokens")
        if record.rows is not None and len(record.rows) != record.tokens:
            raise ValueError(f"{len(record.rows)} rows for {record.tokens} tokens")
        if record.attended is not None and record.rows is None and len(record.attended.tokens) != record.tokens:
            raise ValueError(f"{len(record.attended.tokens)} tokens attended to something, of {record.tokens}")
        if len(shapes) != len(contents.layers) or record.base < 0 or record.segment_bytes < 1:
            raise ValueError(f"{len(shapes)} layers, base {record.base}, segments of {record.segment_bytes} bytes")
        if record.ropes and not rope.fit(record.ropes, [key[2] for key, _ in shapes]):
            raise ValueError("its rotations are not those of its layers")
        if record.payload_bytes > record.segment_bytes * len(record.checksums):  # or to cut it would take all memory
            raise ValueError(f"{len(record.checksums)} checksums for {record.payload_bytes} bytes")
        if len(record.checksums) != len(record.spans):
            raise ValueError(f"{len(record.checksums)} checksums for {len(record.spans)} segments")
        return record

    def _metadata(self) -> dict[str, str]:
        sides = zip(self.dtypes, self.shapes, strict=True)
        kinds = groupby([NAMES[dtype], key[0], key[2], value[0], value[2]] for dtype, (key, value) in sides)
        return {
            "format": f"ragkv-{VERSION}",
            "space": self.space,
            **({"label": self.label} if self.label else {}),
            **({} if self.sensitivity is None else {"sensitivity": to_base64(self.sensitivity)}),
            **({"foreign": self.foreign} if self.foreign else {}),
            **({"rope": rope.to_text(self.ropes)} if self.ropes else {}),
            **({} if self.rows is None else {"rows": json.dumps(self.rows.tolist(), separators=(",", ":"))}),
            **({} if self.attended is None else {"attended": attending.to_text(self.attended)}),
            "codec": self.codec,
            "base": str(self.base),
            "tokens": str(self.tokens),
            "layers": json.dumps([[len(list(run)), *kind] for kind, run in kinds], separators=(",", ":")),
            "segment_bytes": str(self.segment_bytes),
            "xxh3_64": "".join(f"{number:016x}" for number in self.checksums),
        }


def _numbers(text: str) -> Tensor:
    numbers = json.loads(text)
    ascending = [-1, *numbers, 1 << 31]
    if not all(type(one) is int and one < next_one for one, next_one in pairwise(ascending)):
        raise ValueError("its rows do not ascend")
    return torch.tensor(numbers, device="cpu")


def checksum(data: Any) -> int:
    """xxh3_64 of a uint8 tensor or array."""
    return xxhash.xxh3_64_intdigest(np.asarray(data).data)


def _header_checksum(key: bytes, header: bytes) -> int:
    return xxhash.xxh3_64_intdigest(key + header)


@lru_cache(maxsize=256)
def _expand(text: str, tokens: int) -> tuple[tuple[tuple[Shape, Shape], ...], tuple[torch.dtype, ...]]:
    """Shapes and dtype of every layer, from ``[[count, dtype, key heads, key dim, value heads, value dim]...]`` as JSON."""
    shapes: list[tuple[Shape, Shape]] = []
    dtypes: list[torch.dtype] = []
    for count, dtype, key_heads, key_dim, value_heads, value_dim in json.loads(text):
        if not 0 < count <= _MOST_LAYERS - len(shapes):
            raise ValueError(f"{count} layers of one kind behind {len(shapes)} others")
        shapes += [((key_heads, tokens, key_dim), (value_heads, tokens, value_dim))] * count
        dtypes += [DTYPES[dtype]] * count
    return tuple(shapes), tuple(dtypes)


def _views(payload: Payload, parts: dict[str, Part]) -> dict[str, Tensor]:
    return {name: payload.view(part) for name, part in parts.items()}
