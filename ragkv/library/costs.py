"""What prefilling costs: a small grid of times, measured once per model, kept in the store and for other stores of the process
(RAGCache, arXiv:2404.12457).

The eviction policy weighs chunks by it. The time that reading a document took would do too, but it is noisy, and the same
for all chunks of a piece, however much text stood before them.
"""

from __future__ import annotations

import logging
from time import perf_counter

import torch

from ragkv.chunk import digest
from ragkv.errors import RecordError, StoreError
from ragkv.lazy import keep_last
from ragkv.library.reading import Reader
from ragkv.machine import machine
from ragkv.store import CostProfile, TieredStore

logger: logging.Logger = logging.getLogger(__name__)

#: Tokens of prefills, as far as the piece that one forward computes: a line beyond the longest would say too little.
_CACHED, _NEW = 1024, (16, 128, 512, 2048, 8192)
#: A token of the next column will hardly take more than this many times as long.
_GROWTH = 1.25
_LIMIT_S = 2.0
#: What this process measured, by model and machine, and the lengths that a reader needs.
_measured: dict[tuple[str, tuple[int, ...]], CostProfile] = {}
_MODELS = 64


def cost_profile(reader: Reader, store: TieredStore, most_tokens: int) -> CostProfile | None:
    """The prefill times of a model on this machine; None where the store's policy does not look at costs.

    Args:
        reader: of the model.
        store: keeps the profile beside its entries.
        most_tokens: that are ever read at once.
    """
    if not store.uses_costs:
        return None
    known = known_costs(reader, store)
    if known is None:
        known = _measured.get(_wanted(reader, most_tokens))
        if known is None:
            return measured_costs(reader, store, most_tokens, _LIMIT_S)
        _keep(reader, store, known)
    return known


def known_costs(reader: Reader, store: TieredStore) -> CostProfile | None:
    """The profile that a store keeps of a model on this machine, if it does."""
    try:
        known = store.meta_get(_name(reader))
        return None if known is None else CostProfile.from_bytes(known)
    except RecordError as error:
        logger.warning("measuring prefill times again: %s", str(error))
        return None


def measured_costs(reader: Reader, store: TieredStore, most_tokens: int, limit_s: float) -> CostProfile:
    """As :func:`cost_profile`, measured now, in the place of what was kept; ``limit_s`` as for :func:`measure`."""
    profile = keep_last(_measured, _wanted(reader, most_tokens), measure(reader, most_tokens, limit_s), _MODELS)
    _keep(reader, store, profile)
    return profile


def _keep(reader: Reader, store: TieredStore, profile: CostProfile) -> None:
    try:
        store.meta_put(_name(reader), profile.to_bytes())
    except StoreError as error:  # full, or open for reading only
        logger.warning("prefill times are used but not stored: %s", str(error))


def _wanted(reader: Reader, most_tokens: int) -> tuple[str, tuple[int, ...]]:
    return _name(reader), _lengths(reader, most_tokens)[1]


def _name(reader: Reader) -> str:
    return f"prefill seconds:{digest(reader.fingerprint, machine(reader.decoder.device)).hex()}"


def measure(reader: Reader, most_tokens: int, limit_s: float) -> CostProfile:
    """Measures prefills of some tokens, behind none and behind many, until the next step would go beyond ``limit_s``.

    The first step is always taken. Nothing of the model is changed. What stands before is made of zeros: attention takes as long
    over them.
    """
    cached, sizes = _lengths(reader, most_tokens)
    _prefill(reader, 0, sizes[0])  # the first pass of a process is slow
    begin = perf_counter()
    columns, token_s = [[0.0] * len(cached)], 0.0
    for new in sizes:
        if len(columns) > 1 and perf_counter() - begin + _GROWTH * token_s * new > limit_s:
            break
        started = perf_counter()
        # The faster of two: what else the machine does is not the model's cost, and the profile is kept for good.
        columns.append([min(_prefill(reader, before, new) for _ in range(2)) for before in cached])
        token_s = (perf_counter() - started) / new
    new_tokens = (0, *sizes[: len(columns) - 1])
    return CostProfile(cached, new_tokens, tuple(zip(*columns, strict=True)))


def _lengths(reader: Reader, most_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that stand before, and tokens of a prefill."""
    cached = (0, min(_CACHED, most_tokens // 2)) if most_tokens > 1 else (0,)
    most = min(most_tokens - cached[-1], reader.piece_tokens)
    return cached, tuple(count for count in _NEW if count <= most) or (most,)


def _prefill(reader: Reader, cached: int, new: int) -> float:
    """Seconds that ``new`` tokens take behind ``cached`` ones."""
    decoder = reader.decoder
    cache = decoder.cache(cached + new)
    for layer in cache.layers:
        layer.key_room.zero_()
        layer.value_room.zero_()
    cache.set_length(cached)
    positions = torch.arange(cached, cached + new, device=decoder.device)
    with reader.turn():
        begin = perf_counter()
        hidden = decoder.read(positions % decoder.vocab_size, cache, cached)
        int(hidden[-1].argmax())  # waits for the device
        return perf_counter() - begin
