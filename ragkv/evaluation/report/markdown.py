"""The figures as Markdown, to be quoted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ragkv.evaluation.report.tables import figure
from ragkv.evaluation.summary import ALL, METRICS, Metric

_SCORES = ("em", "f1", "perplexity", "kl_chunks", "kl_documents", "same_documents")


def write_markdown(path: Path, summary: dict[str, Any], metric: Metric) -> None:
    """Write two tables: all arms, and one metric by kind of question.

    Args:
        path: of the file.
        summary: of the run.
        metric: of the second table.
    """
    ran = [arm for arm in summary["arms"] if arm["cost"]]
    slices = list(summary["slices"])
    heads = ["arm", "n", *(METRICS[name].label for name in _SCORES), "EM less full-documents", "budget", "TTFT ms"]
    by_slice = ["arm", *(f"{name} ({count})" for name, count in summary["slices"].items())]
    parts = [
        f"`{summary['conditions']['command']}`, {summary['cases']} cases, {summary['conditions']['date']}",
        _table(heads, [_row(arm) for arm in ran]),
        f"{metric.label}, mean and 95 % interval",
        _table(by_slice, [[_code(arm), *[_interval(arm, name, metric) for name in slices]] for arm in ran]),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _row(arm: dict[str, Any]) -> list[str]:
    cost = arm["cost"]
    means = [_mean(arm, METRICS[name]) if name != "em" else _interval(arm, ALL, METRICS[name]) for name in _SCORES]
    against = arm["against_documents"].get(ALL, {}).get("em")
    less = f"{100 * against[0]:+.1f} ({100 * against[1]:+.1f} to {100 * against[2]:+.1f})" if against else ""
    return [_code(arm), str(arm["n"]), *means, less, f"{cost['budget']:.1%}", f"{cost['ttft_ms']:.1f}"]


def _code(arm: dict[str, Any]) -> str:
    return f"`{arm['name']}`"


def _mean(arm: dict[str, Any], metric: Metric) -> str:
    held = arm["scores"][ALL].get(metric.name)
    return "" if held is None else figure(metric, held[0])


def _interval(arm: dict[str, Any], slice_: str, metric: Metric) -> str:
    held = arm["scores"].get(slice_, {}).get(metric.name)
    if held is None:
        return ""
    mean, low, high, _ = held
    return f"{figure(metric, mean)} ({figure(metric, low)} to {figure(metric, high)})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
