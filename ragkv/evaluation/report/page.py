"""The page, one file, no network, light and dark, no script; and its figures as Markdown, to be quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ragkv.errors import MissingPackageError
from ragkv.evaluation.arms import FULL, FULL_DOCUMENTS
from ragkv.evaluation.report import heatmap, scatter
from ragkv.evaluation.report.series import CONTROLS, LINES, Arm, best, by_series, looks
from ragkv.evaluation.summary import ALL, METRICS, Metric, of_fewer

if TYPE_CHECKING:
    from jinja2 import Environment

_SMALL_BUDGET = 0.10


def templates(package: str = "ragkv.evaluation.report") -> Environment:
    """What a package's pages are made with. Called before a long run, it tells in time that they cannot be made.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError("the report needs jinja2: pip install 'ragkv[report]'") from error
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_coordinate,
    )


def page(summary: dict[str, Any], tokens: dict[str, Any], metric: Metric) -> str:
    """The report as HTML.

    Args:
        summary: of the run.
        tokens: of one prompt; empty where the run was stopped.
        metric: what is drawn upwards.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    look = looks(summary)
    series = by_series(summary["arms"], look).values()
    timed = [arm for arms in series if (arm := best(arms, metric))]
    sides = [[_warm(arm["cost"]) for arm in timed], [_cold(arm["cost"]) for arm in timed]]
    return _render(
        "page.html.j2",
        summary,
        metric,
        LINES=LINES,
        LEVELS=heatmap.LEVELS,
        FRAME=scatter.FRAME,
        looks=look,
        tiles=_tiles(summary, metric),
        scatters=[
            (axis, [scatter.plot(summary["arms"], look, metric, name, axis) for name in summary["slices"]])
            for axis in (scatter.BUDGET, scatter.TTFT)
        ],
        bars=list(zip([arm["name"] for arm in timed], *sides, strict=True)),
        longest=[max([sum(parts.values()) for parts in side], default=0.0) or 1.0 for side in sides],
        tokens=tokens,
        heats=list(heatmap.heats(tokens)) if tokens else [],
        strips=heatmap.strips(tokens) if tokens else [],
        read=heatmap.text(tokens) if tokens else (),
    )


def tables(summary: dict[str, Any], metric: Metric) -> str:
    """Two tables as Markdown: all arms, and one metric by kind of question. Arguments and errors as for :func:`page`."""
    return _render("tables.md.j2", summary, metric)


def _render(name: str, summary: dict[str, Any], metric: Metric, **values: Any) -> str:
    values |= {"summary": summary, "metric": metric, "ALL": ALL, "METRICS": METRICS, "of_fewer": of_fewer}
    stopped = f"{summary['slices'][ALL]} of {summary['cases']} cases asked"
    values["left_out"] = [
        *([("stopped early", stopped)] if summary["stopped"] else []),
        *((f"cases left out: {why}", count) for why, count in summary["left_out"].items()),
    ]
    values["refused"] = [
        (f"{arm['name']} refused ({count} prompts)", why)
        for arm in summary["arms"]
        for why, count in arm["refused"].items()
    ]
    values["slices"] = [f"{name} ({count})" for name, count in summary["slices"].items()]
    values["ran"] = [arm for arm in summary["arms"] if arm["cost"]]
    return templates().get_template(name).render(values).strip() + "\n"


def _coordinate(value: Any) -> Any:
    """Numbers that are not formatted are places in a plot: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value


def _tiles(summary: dict[str, Any], metric: Metric) -> dict[str, Arm]:
    by_name = {arm["name"]: [arm] for arm in summary["arms"]}
    cheap = [
        arm
        for arm in summary["arms"]
        if arm["cost"].get("budget", 1.0) <= _SMALL_BUDGET
        and arm["name"] not in LINES
        and summary["families"][arm["name"]][0] not in CONTROLS
    ]
    shown: dict[str, Sequence[Arm]] = {
        "full prefill of the whole documents": by_name.get(FULL_DOCUMENTS, []),
        "full prefill of the retrieved chunks": by_name.get(FULL, []),
        "naive reuse, chunks read alone": by_name.get("reuse@alone", []),
        f"best within a budget of {_SMALL_BUDGET:.0%}": cheap,
    }
    return {title: arm for title, arms in shown.items() if (arm := best(arms, metric))}


def _warm(cost: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by stage with KV in memory. Medians, so that parts need not add up."""
    stages = cost["stages_ms"]
    return {**stages, "other": max(0.0, cost["ttft_ms"] - sum(stages.values()))}


def _cold(cost: dict[str, Any]) -> dict[str, float]:
    """Milliseconds where nothing was read yet; empty where that was not timed."""
    if "cold_ms" not in cost:
        return {}
    return {"read": cost["cold_read_ms"], "after": max(0.0, cost["cold_ms"] - cost["cold_read_ms"])}
