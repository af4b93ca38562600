"""The figures as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragkv.evaluation.report.markup import Markup, tag
from ragkv.evaluation.report.series import Look
from ragkv.evaluation.summary import ALL, METRICS, Metric

_GOLD = ("em", "f1", "rouge_l", "contained", "perplexity")
_FULL = ("top1_chunks", "same_chunks", "kl_chunks", "top1_documents", "same_documents", "kl_documents")

Arm = dict[str, Any]
_NONE = "\u2013"

#: What arms cost: the figure's name, how it is shown, and in what unit.
_COSTS: dict[str, tuple] = {
    "charged budget": ("budget", "{:.1%}"),
    "tokens": ("tokens", "{:,.0f}"),
    "TTFT, memory": ("ttft_ms", "{:.1f} ms"),
    "p95": ("ttft_p95_ms", "{:.1f} ms"),
    "place": ("place", "{:.1f}"),
    "select": ("select", "{:.1f}"),
    "compute": ("compute", "{:.1f}"),
    "TTFT, disk": ("disk_ms", "{:.1f} ms"),
    "read from disk": ("bytes_read", "{:.1f} MiB", 2**20),
    "TTFT, cold": ("cold_ms", "{:.1f} ms"),
    "prompt's KV": ("kv_bytes", "{:.1f} MiB", 2**20),
    "peak memory": ("peak_bytes", "{:.1f} MiB", 2**20),
}


def against_gold(arms: Sequence[Arm], looks: dict[str, Look]) -> Markup:
    """What answers are worth."""
    heads = ["arm", "n", *(METRICS[name].label for name in _GOLD), "EM less full-documents"]
    rows = [
        [
            _name(arm, looks),
            _plain(f"{arm['n']}"),
            *[_score(arm, ALL, METRICS[name]) for name in _GOLD],
            _difference(arm),
        ]
        for arm in arms
    ]
    return _table(heads, rows)


def against_full_prefill(arms: Sequence[Arm], looks: dict[str, Look]) -> Markup:
    """How close the model is to itself."""
    heads = ["arm", *(METRICS[name].label for name in _FULL)]
    return _table(heads, [[_name(arm, looks), *[_score(arm, ALL, METRICS[name]) for name in _FULL]] for arm in arms])


def costs(arms: Sequence[Arm], looks: dict[str, Look]) -> Markup:
    """What arms cost: medians, but means for budget and tokens."""
    rows = [[_name(arm, looks), *[_cost(arm, *column) for column in _COSTS.values()]] for arm in arms if arm["cost"]]
    return _table(["arm", *_COSTS], rows)


def by_slice(summary: dict[str, Any], looks: dict[str, Look], metric: Metric) -> Markup:
    """One metric by kind of question and by order of chunks, shaded by its value."""
    heads = ["arm", *(f"{name} ({count})" for name, count in summary["slices"].items())]
    rows = [
        [_name(arm, looks), *[_score(arm, name, metric, shaded=True) for name in summary["slices"]]]
        for arm in summary["arms"]
    ]
    return _table(heads, rows)


def pairs(values: dict[str, Any]) -> Markup:
    """Names and what they stand for."""
    rows = [tag("tr", tag("th", str(name), scope="row"), tag("td", str(value))) for name, value in values.items()]
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="scroll")


def _cost(arm: Arm, name: str, form: str, unit: float = 1) -> Markup:
    cost = {**arm["cost"], **arm["cost"]["stages_ms"]}
    return _plain(form.format(cost[name] / unit) if name in cost else _NONE)


def _table(heads: Sequence[str], rows: Sequence[Sequence[Markup]]) -> Markup:
    head = tag("tr", *[tag("th", name, scope="col") for name in heads])
    body = [tag("tr", *cells) for cells in rows]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def _name(arm: Arm, looks: dict[str, Look]) -> Markup:
    look = looks[arm["name"]]
    return tag("th", tag("i", class_=look.swatch), arm["name"], scope="row")


def _plain(text: str) -> Markup:
    return tag("td", text)


def _score(arm: Arm, slice_: str, metric: Metric, shaded: bool = False) -> Markup:
    held = arm["scores"].get(slice_, {}).get(metric.name)
    if held is None:
        return tag("td", _NONE, title="refused" if arm["refused"] else None)
    mean, low, high, n = held
    shade = f"--share:{mean:.2f}" if shaded and metric.share else None
    words = f"95 % interval {figure(metric, low)} to {figure(metric, high)}, n = {n}"
    interval = tag("small", f"{figure(metric, low)} to {figure(metric, high)}")
    return tag("td", figure(metric, mean), interval, title=words, style=shade, class_="shaded" if shade else None)


def _difference(arm: Arm) -> Markup:
    held = arm["against_documents"].get(ALL, {}).get("em")
    if held is None:
        return tag("td", _NONE)
    mean, low, high, n = held
    sure = "better" if low > 0 else "worse" if high < 0 else None
    interval = tag("small", f"{100 * low:+.1f} to {100 * high:+.1f}")
    return tag("td", f"{100 * mean:+.1f}", interval, class_=sure, title=f"paired, 95 % interval, n = {n}")


def figure(metric: Metric, score: float) -> str:
    """A score for people: per cent without the sign, or three digits."""
    return f"{100 * score:.1f}" if metric.share else f"{score:.3g}" if score >= 1e-4 or score == 0 else f"{score:.0e}"
