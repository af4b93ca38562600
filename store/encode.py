"""From a chunk's KV to a record: checked, encoded, laid out one part after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ragkv.chunk import ChunkKV
from ragkv.errors import StoreError, instance
from ragkv.store.attending import stored
from ragkv.store.codecs import Codec, Side
from ragkv.store.payload import Contents, Payload, Segments
from ragkv.store.record import SEGMENT_BYTES, Record, Shape, checksum
from ragkv.store.rope import Rope, fit

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST_LABEL = 256


def encode(
    kv: ChunkKV,
    *,
    codec: Codec,
    space: str = "",
    label: str = "",
    ropes: tuple[Rope | None, ...] = (),
    segment_bytes: int = SEGMENT_BYTES,
) -> tuple[Record, Payload]:
    """A chunk's KV as a record's header and its payload, which shares no memory with ``kv``.

    Args:
        kv: L pairs ``[H, T, D]``.
        codec: how it is encoded.
        space: fingerprint of what it depends on.
        label: what whoever stores it knows it by.
        ropes: how each layer's keys turn; a codec that prefers keys before that gets them so.
        segment_bytes: the most that a segment has.

    Raises:
        StoreError: the tensors are not L pairs ``[H, T, D]`` of one T in fp32, bf16 or fp16; a label is too long;
            the rotations are not those of the layers.
    """
    if codec.anywhere:
        validate(kv)
    else:
        kv = on_cpu(kv)
    instance("label", label, str, "a str")
    if ropes and not fit(ropes, [key.shape[2] for key in kv.keys]):
        raise StoreError(f"{len(ropes)} rotations are not those of {len(kv.keys)} layers")
    if len(label) > _LONGEST_LABEL:
        raise StoreError(f"a label has at most {_LONGEST_LABEL} characters, got {len(label)}")
    contents, payload = _laid_out(_parts(kv, codec, ropes))
    spans = Segments.cut(contents, segment_bytes).spans
    record = Record(
        contents=contents,
        shapes=[(_shape(key), _shape(value)) for key, value in kv],
        dtypes=[key.dtype for key in kv.keys],
        base=kv.base,
        codec=codec.name,
        space=space,
        segment_bytes=segment_bytes,
        checksums=tuple(checksum(payload.data[start:stop]) for start, stop in spans),
        label=label,
        # As exact as it is on disk, so that a chunk is the same wherever it comes from.
        sensitivity=None if kv.sensitivity is None else kv.sensitivity.detach().cpu().half().float(),
        foreign=kv.foreign,
        ropes=ropes,
        rows=None if kv.rows is None else kv.rows.detach().cpu(),
        attended=None if kv.attended is None else stored(kv.attended),
    )
    return record, payload


def recoded(record: Record, payload: Payload, codec: Codec) -> tuple[Record, Payload]:
    """The same chunk in another codec."""
    kv = record.decode(payload)
    return encode(kv, codec=codec, space=record.space, label=record.label, ropes=record.ropes)


def on_cpu(kv: ChunkKV) -> ChunkKV:
    """The same numbers on the CPU: where they are not, all are waited for at once.

    Raises:
        StoreError: as :func:`validate`.
    """
    validate(kv)
    return kv if all(side.is_cpu for pair in kv for side in pair) else gathered(kv)


def gathered(kv: ChunkKV) -> ChunkKV:
    """A copy in memory like that of payloads, which a GPU copies from, and to, while nobody waits."""
    names = [(f"k.{layer}", f"v.{layer}") for layer in range(len(kv.keys))]
    sides = (
        (name, side) for named, pair in zip(names, kv, strict=True) for name, side in zip(named, pair, strict=True)
    )
    contents, payload = _laid_out(dict(sides))
    keys, values = ([payload.view(contents.parts[pair[side]]) for pair in names] for side in (0, 1))
    return replace(kv, keys=keys, values=values)


@torch.no_grad()
def _parts(kv: ChunkKV, codec: Codec, ropes: tuple[Rope | None, ...]) -> dict[str, Tensor]:
    """What a codec makes of each layer, by the names that a record has for it."""
    tensors: dict[str, Tensor] = {}
    for layer, (key, value) in enumerate(kv):
        if codec.before_rotation and ropes and (rope := ropes[layer]) is not None:
            key = rope.turned(key, kv.base, back=True)
        sides: tuple[tuple[Side, Tensor], ...] = (("k", key), ("v", value))
        for side, tensor in sides:
            for suffix, part in codec.encode(tensor, side, layer / len(kv.keys)).items():
                tensors[f"{side}.{layer}.{suffix}" if suffix else f"{side}.{layer}"] = part
    return tensors


@torch.no_grad()
def _laid_out(tensors: Mapping[str, Tensor]) -> tuple[Contents, Payload]:
    """Tensors one after the other in one payload, wherever they lie: a copy each, and one wait a device."""
    contents = Contents.of(tensors)
    payload = Payload(contents.payload_bytes)
    for name, tensor in tensors.items():
        payload.fill(contents.parts[name], tensor)
    for device in {tensor.device for tensor in tensors.values()}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).record_event().synchronize()
    return contents, payload


def validate(kv: ChunkKV) -> None:
    """Raises StoreError unless ``kv`` is at least one pair of layers ``[H, T, D]`` with one T and known dtypes."""
    instance("kv", kv, ChunkKV, "a ChunkKV")
    if not kv.keys or len(kv.keys) != len(kv.values):
        raise StoreError(f"KV needs as many values as keys and at least one, got {len(kv.keys)} and {len(kv.values)}")
    if kv.base < 0:
        raise StoreError(f"a chunk's base is a position, got {kv.base}")
    tokens = kv.keys[0].shape[1] if kv.keys[0].dim() == 3 else 0
    if kv.sensitivity is not None and kv.sensitivity.shape != (tokens,):
        raise StoreError(f"sensitivity must be [T] with T = {tokens}, got {tuple(kv.sensitivity.shape)}")
    if kv.rows is not None and kv.rows.shape != (tokens,):
        raise StoreError(f"rows must be [T] with T = {tokens}, got {tuple(kv.rows.shape)}")
    for layer, (key, value) in enumerate(kv):
        for name, tensor in (("keys", key), ("values", value)):
            if tensor.dim() != 3 or tensor.shape[1] != tokens or not tensor.numel():
                raise StoreError(f"{name}[{layer}] must be [H, T, D] with T = {tokens}, got {tuple(tensor.shape)}")
        if key.dtype not in KV_DTYPES or key.dtype != value.dtype:
            raise StoreError(f"layer {layer} must be fp32, bf16 or fp16 in K and V, got {key.dtype} and {value.dtype}")


def _shape(tensor: Tensor) -> Shape:
    heads, tokens, dim = tensor.shape
    return heads, tokens, dim
