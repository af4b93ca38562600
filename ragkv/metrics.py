"""An engine's numbers for Prometheus. Needs ``prometheus-client``; starts no server and touches no global registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ragkv.engine import Engine
from ragkv.store.metrics import Collector

_PROMPTS = (1, 2, 4, 8, 16, 32, 64)


class EngineCollector(Collector):
    """Reads an engine's figures whenever Prometheus asks, also when it is closed; those of its store are
    :class:`~ragkv.store.metrics.StoreCollector`'s.

    Args:
        engine: whose numbers.
        registry: as of :class:`~ragkv.store.metrics.Collector`.

    Raises:
        As :class:`~ragkv.store.metrics.Collector`.
    """

    def __init__(self, engine: Engine, registry: Any = None) -> None:
        self._engine = engine
        super().__init__(registry)

    def collect(self) -> Iterator[Any]:
        """The metrics now."""
        line, sizes = self._engine.scheduler.stats(), dict(self._engine.documents.steps.sizes)
        for kind, name, field, text in (
            ("Gauge", "requests_waiting", "waiting", "Requests that wait for their turn."),
            ("Gauge", "requests_running", "running", "Requests that are computed or answered."),
            ("Counter", "requests_done", "done", "Requests that were let in and are over."),
            ("Counter", "requests_refused", "refused", "Requests that gave up waiting."),
            ("Counter", "waiting_seconds", "waited_s", "Time in the line."),
            ("Counter", "service_seconds", "served_s", "Time from a request's beginning to its end."),
            ("Counter", "reused_tokens", "reused_tokens", "Tokens of prompts that were stored."),
            ("Counter", "computed_tokens", "computed_tokens", "Tokens of prompts that were computed."),
            ("Counter", "output_tokens", "output_tokens", "Tokens of answers."),
        ):
            values = {namespace: getattr(service, field) for namespace, service in line.namespaces.items()}
            yield self._family(kind, f"ragkv_{name}", text, values, "namespace")
        yield self._core.GaugeMetricFamily("ragkv_prompts_bytes", "Bytes that prompts and answers take.", line.bytes)
        forwards = self._core.HistogramMetricFamily("ragkv_forward_prompts", "Prompts in one forward of the model.")
        held = [(str(most), sum(n for size, n in sizes.items() if size <= most)) for most in _PROMPTS]
        total = sum(size * count for size, count in sizes.items())
        forwards.add_metric([], [*held, ("+Inf", sum(sizes.values()))], total)
        yield forwards
