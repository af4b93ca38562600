"""What was measured of this machine and a model, kept beside the KV, and measuring it.

Prefill times are those of :mod:`ragkv.library.costs`, which the eviction policy uses too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from weakref import WeakKeyDictionary

from ragkv.chunk import digest
from ragkv.errors import RecordError, StoreError
from ragkv.library.costs import known_costs, measure, measured_costs
from ragkv.library.documents import Documents
from ragkv.library.loading import measure_loading
from ragkv.machine import machine
from ragkv.store import Loading, Rates, TieredStore
from ragkv.store.rates import loading_from_bytes, loading_to_bytes

logger: logging.Logger = logging.getLogger(__name__)

#: A profile of fewer is measured again: it was made in less time.
_LENGTHS, _MOMENT_S = 3, 2.0

#: What this process has found in its stores: a warm question looks into none.
_found: WeakKeyDictionary[TieredStore, dict[str, Rates | None]] = WeakKeyDictionary()


def known_rates(documents: Documents) -> Rates | None:
    """What is known of the model as it is now, on this machine and in this store; ``None`` where it was not measured.

    Tiers that are not measured beforehand, as a pool, are in it as they were seen lately.
    """
    found, name = _found.setdefault(documents.store, {}), _name(documents)
    if name not in found:
        found[name] = _kept(documents, name)
    rates, seen = found[name], documents.store.loading()
    return rates if rates is None or not seen else replace(rates, tiers={**rates.tiers, **seen})


def measured_rates(documents: Documents, limit_s: float = 10.0, again: bool = False) -> Rates:
    """What is known, or else what is measured now, and kept.

    Args:
        documents: of the model.
        limit_s: seconds that measuring may take, about; its first steps are always taken.
        again: measure all the same.
    """
    known = None if again else known_rates(documents)
    if known is not None:
        return known
    reader, store, begin = documents.reader, documents.store, perf_counter()
    costs = known_costs(reader, store)
    if again or costs is None or len(costs.new) <= _LENGTHS:
        costs = measured_costs(reader, store, documents.document_tokens, limit_s / 2)
    tiers = measure_loading(documents, max(0.0, limit_s - (perf_counter() - begin)))
    name = _name(documents)
    try:
        store.meta_put(name, loading_to_bytes(tiers))
    except StoreError as error:  # full, or open for reading only
        logger.warning("measured rates are used but not stored: %s", str(error))
    rates = _found.setdefault(store, {})[name] = Rates(costs, tiers, reader.piece_tokens, _beside(documents))
    return rates


def to_fetch(documents: Documents, keys: Sequence[bytes]) -> list[bytes]:
    """Those of the chunks that are worth moving to memory before a prompt is known: not what comes slower than it is computed."""
    rates = known_rates(documents)
    if rates is None:
        return list(keys)
    computed_s = rates.compute_s(rates.piece_tokens)
    slow = {name for name, tier in rates.tiers.items() if tier.beside and tier.seconds(rates.piece_tokens) > computed_s}
    places = documents.store.where(keys, rates.patience_s(rates.piece_tokens)) if slow else {}
    return [key for key in keys if places.get(key) not in slow]


def reading_s(documents: Documents, tokens: Sequence[int]) -> float:
    """Seconds that adding documents takes, each of which the model runs so many tokens for.

    Where no prefill times are known they are measured for a moment, and not kept.
    """
    if not any(tokens):
        return 0.0
    reader, most = documents.reader, documents.document_tokens
    costs = known_costs(reader, documents.store) or measure(reader, most, _MOMENT_S)
    rates = Rates(costs, {}, reader.piece_tokens)
    return documents.passes * sum(rates.read_s(count, most) for count in tokens)


def _kept(documents: Documents, name: str) -> Rates | None:
    costs, data = known_costs(documents.reader, documents.store), documents.store.meta_get(name)
    if costs is None or data is None:
        return None
    try:
        tiers: dict[str, Loading] = loading_from_bytes(data)
        return Rates(costs, tiers, documents.reader.piece_tokens, _beside(documents))
    except (RecordError, StoreError) as error:
        logger.warning("measured rates are not used: %s", str(error))
        return None


def _beside(documents: Documents) -> bool:
    """Whether loading goes on while the model computes, see :class:`~ragkv.fusion.placement.Placement`."""
    return documents.reader.decoder.device.type != "cpu"


def _name(documents: Documents) -> str:
    """Rates hang on model, machine, and how the store's tiers encode."""
    reader = documents.reader
    codecs = [None if codec is None else (codec.name, sorted(vars(codec).items())) for codec in documents.store.codecs]
    where = machine(reader.decoder.device)
    return f"loading:{digest(reader.fingerprint, where, str(codecs), reader.decoder.kernels).hex()}"
