"""A store's numbers for Prometheus. Needs ``prometheus-client``; starts no server and touches no global registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from ragkv.errors import ArgumentError, StoreError
from ragkv.store.tiered import TieredStore

_POOLS = (
    ("pending", "Gauge", "Chunks that wait to be sent to a shared pool, or deleted there."),
    ("down", "Gauge", "1 while a pool that failed is left alone."),
    ("sent", "Counter", "Chunks sent to a pool."),
    ("sent_bytes", "Counter", "Their bytes."),
    ("failed", "Counter", "Tries to send or delete that failed."),
    ("unanswered", "Counter", "Reads that a pool did not answer."),
    ("late", "Counter", "Chunks that came so slowly from a pool that they were computed instead."),
)
_BUCKETS_S = (1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)


class Collector(ABC):
    """Gives numbers to Prometheus.

    Args:
        registry: a ``prometheus_client.CollectorRegistry`` to register with; None to do that yourself.

    Raises:
        StoreError: ``prometheus-client`` is not installed.
        ArgumentError: the registry has such numbers, of another store or engine.
    """

    def __init__(self, registry: Any = None) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise StoreError(
                "metrics need prometheus-client. Install it with: pip install prometheus-client"
            ) from error
        self._core: Any = core
        if registry is None:
            return
        try:
            registry.register(self)
        except ValueError as error:
            raise ArgumentError(f"each engine and each store needs a registry of its own: {error}") from error

    @abstractmethod
    def collect(self) -> Iterator[Any]:
        """The metrics now."""

    def describe(self) -> list[Any]:
        """Their names, of which a registry takes each once."""
        return list(self.collect())

    def _family(self, kind: str, name: str, text: str, values: Mapping[str, float], label: str) -> Any:
        family = getattr(self._core, f"{kind}MetricFamily")(name, text, labels=[label])
        for value_of, value in values.items():
            family.add_metric([value_of], value)
        return family


class StoreCollector(Collector):
    """Reads a store's :meth:`TieredStore.stats` whenever Prometheus asks; a closed store has none.

    Args:
        store: whose numbers.
        registry: as of :class:`Collector`.

    Raises:
        As :class:`Collector`.
    """

    def __init__(self, store: TieredStore, registry: Any = None) -> None:
        self._store = store
        super().__init__(registry)

    def collect(self) -> Iterator[Any]:
        """The metrics now."""
        if self._store.closed:
            return
        stats = self._store.stats()
        yield self._family("Gauge", "ragkv_store_entries", "Chunks stored.", stats.entries, "tier")
        yield self._family("Gauge", "ragkv_store_bytes", "Bytes of the chunks stored.", stats.bytes, "tier")
        yield self._family("Counter", "ragkv_store_hits", "Reads that found their chunk.", stats.hits, "tier")
        yield self._core.CounterMetricFamily("ragkv_store_misses", "Reads that found nothing.", stats.misses)
        yield self._core.CounterMetricFamily("ragkv_store_tokens_hit", "Tokens found.", stats.tokens_hit)
        yield self._core.CounterMetricFamily("ragkv_store_puts", "Chunks stored so far.", stats.puts)
        yield self._core.CounterMetricFamily("ragkv_store_refused", "Chunks not admitted.", stats.refused)
        yield self._core.CounterMetricFamily("ragkv_store_read_bytes", "Bytes read from disk.", stats.bytes_read)
        yield self._core.CounterMetricFamily("ragkv_store_written_bytes", "Bytes written.", stats.bytes_written)
        seconds = self._core.HistogramMetricFamily("ragkv_store_seconds", "Time by stage.", labels=["stage"])
        for stage, latency in stats.latency.items():
            buckets = [(str(bound), latency.below(bound)) for bound in _BUCKETS_S]
            seconds.add_metric([stage], [*buckets, ("+Inf", latency.count)], latency.total_s)
        yield seconds
        for name, kind, text in _POOLS:
            of_pools = {tier: float(getattr(pool, name)) for tier, pool in stats.pools.items()}
            yield self._family(kind, f"ragkv_store_pool_{name}", text, of_pools, "tier")
        for name, text, of_methods in (
            ("checks", "Prompts compared with a full prefill.", {m: item.count for m, item in stats.checks.items()}),
            ("checks_kl_nats", "Their KL to it, summed.", {m: item.kl for m, item in stats.checks.items()}),
            ("checks_agreed", "Those of the same first token.", {m: item.agreed for m, item in stats.checks.items()}),
        ):
            yield self._family("Counter", f"ragkv_store_{name}", text, of_methods, "method")
        evictions = self._core.CounterMetricFamily(
            "ragkv_store_evictions", "Chunks dropped.", labels=["tier", "reason"]
        )
        for tier, reasons in stats.evictions.items():
            for reason, count in reasons.items():
                evictions.add_metric([tier, reason], count)
        yield evictions
