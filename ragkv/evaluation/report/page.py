"""The page: one file, no network, light and dark, no script."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ragkv.evaluation.arms import FULL, FULL_DOCUMENTS
from ragkv.evaluation.report import heatmap, stages, tables
from ragkv.evaluation.report.markup import Markup, join, tag
from ragkv.evaluation.report.scatter import BUDGET, TTFT, Axis, scatter
from ragkv.evaluation.report.series import CONTROLS, LINES, Look, best_of_series, looks, value
from ragkv.evaluation.summary import ALL, METRICS, Metric

_SMALL_BUDGET = 0.10


def write_page(path: Path, summary: dict[str, Any], tokens: dict[str, Any], metric: Metric) -> None:
    """Write the report.

    Args:
        path: of the HTML file.
        summary: of the run.
        tokens: of one prompt.
        metric: what is drawn upwards.
    """
    path.write_text(page(summary, tokens, metric), encoding="utf-8")


def page(summary: dict[str, Any], tokens: dict[str, Any], metric: Metric) -> str:
    """The report as HTML."""
    look = looks(summary)
    style = files("ragkv.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    ran = [arm for arm in summary["arms"] if arm["cost"]]
    body = [
        _head(summary, metric),
        _section(
            "Gates", "What must hold before a score means anything. Off by / at most (relative).", _gates(summary)
        ),
        _plots(summary, look, metric, BUDGET, "Quality against charged budget"),
        _plots(summary, look, metric, TTFT, "Quality against time to first token"),
        _section(
            "Where the time goes",
            f"Of every method and context the best arm by {metric.label}. Medians; cold: {_number(_timed(ran), 'timed case')}.",
            stages.legend(),
            tag("figure", stages.stages(best_of_series(summary, metric.name, ALL))),
        ),
        _tokens(tokens),
        _section(
            f"By kind of question: {metric.label}",
            "Mean and 95 % interval; cases in brackets. All orders of chunks count, but in the last two columns.",
            tables.by_slice(summary, look, metric),
        ),
        _section("Against the gold answers", _meanings(("em", "f1")), tables.against_gold(ran, look)),
        _section("Against full prefill", _meanings(("kl_chunks",)), tables.against_full_prefill(ran, look)),
        _section("Cost", "Medians over prompts; disk, cold and memory over the timed cases.", tables.costs(ran, look)),
        _section("Left out and refused", "", _left_out(summary)),
        _section("Conditions", "", tables.pairs(_conditions(summary))),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"ragkv eval: {summary['model']} on {summary['data']}"),
        tag("style", Markup(style + _tab_rules(len(summary["slices"]), len(heatmap.kinds(tokens))))),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', *body)), lang='en')}\n"


def _section(title: str, words: str, *content: Markup | None) -> Markup:
    return tag("section", tag("h2", title), tag("p", words) if words else None, *content)


def _meanings(names: Sequence[str]) -> str:
    return " ".join(f"{METRICS[name].label}: {METRICS[name].meaning}." for name in names)


def _timed(arms: Sequence[dict[str, Any]]) -> int:
    return max((arm["cost"]["timed"] for arm in arms), default=0)


def _head(summary: dict[str, Any], metric: Metric) -> Markup:
    where = summary["conditions"]
    cases, orders = _number(summary["cases"], "case"), _number(summary["orders"], "order")
    machine = f"{where['dtype']} on {where['device']}, {_number(where['threads'], 'thread')}"
    about = f"{cases}, up to {orders} of chunks each, seed {summary['seed']}. {machine}. {where['date']}."
    by_name = {arm["name"]: arm for arm in summary["arms"]}
    tiles = [
        _tile("full prefill of the whole documents", by_name.get(FULL_DOCUMENTS), metric),
        _tile("full prefill of the retrieved chunks", by_name.get(FULL), metric),
        _tile("naive reuse, chunks read alone", by_name.get("reuse@alone"), metric),
        _tile(f"best within a budget of {_SMALL_BUDGET:.0%}", _best_within(summary, metric), metric),
    ]
    return tag(
        "header",
        tag("h1", "Which repair, at what cost"),
        tag("p", tag("b", summary["model"]), " on ", tag("b", summary["data"]), class_="subject"),
        tag("p", about),
        tag("div", *tiles, class_="tiles"),
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _best_within(summary: dict[str, Any], metric: Metric) -> dict[str, Any] | None:
    sign = 1 if metric.higher_is_better else -1
    real = [
        arm
        for arm in summary["arms"]
        if arm["cost"]
        and arm["cost"]["budget"] <= _SMALL_BUDGET
        and arm["name"] not in LINES
        and summary["families"][arm["name"]][0] not in CONTROLS
        and value(arm, ALL, metric.name) is not None
    ]
    return max(
        real, key=lambda arm: (sign * (value(arm, ALL, metric.name) or 0.0), -arm["cost"]["ttft_ms"]), default=None
    )


def _tile(title: str, arm: dict[str, Any] | None, metric: Metric) -> Markup | None:
    held = arm and arm["scores"].get(ALL, {}).get(metric.name)
    if not arm or not held:
        return None
    mean, low, high, _ = held
    return tag(
        "div",
        tag("span", title, class_="what"),
        tag("strong", tables.figure(metric, mean), tag("small", "%") if metric.share else None),
        tag("span", f"{metric.label} {tables.figure(metric, low)} to {tables.figure(metric, high)}"),
        tag("span", arm["name"], class_="name"),
        tag("span", f"budget {arm['cost']['budget']:.0%} · TTFT {arm['cost']['ttft_ms']:.0f} ms"),
        class_="tile",
    )


def _gates(summary: dict[str, Any]) -> Markup:
    chips = [
        tag(
            "li",
            tag("b", "✓" if gate["passed"] else "✗"),
            tag("span", gate["name"]),
            tag("small", f"{gate['error']:.1e} / {gate['limit']:.1e}"),
            class_="good" if gate["passed"] else "bad",
            title=gate["note"],
        )
        for gate in summary["gates"]
    ]
    return tag("ul", *chips, class_="gates")


def _plots(summary: dict[str, Any], look: dict[str, Look], metric: Metric, axis: Axis, title: str) -> Markup:
    plots = [tag("figure", scatter(summary, look, metric, name, axis)) for name in summary["slices"]]
    names = [f"{name} ({count})" for name, count in summary["slices"].items()]
    words = (
        "Every arm; the dashed line is the Pareto front, its points are named and carry their 95 % interval. Rest the pointer on a "
        "point for its figures."
    )
    return _section(title, words, _legend(look), _tabs(axis.name, names, plots))


def _legend(look: dict[str, Look]) -> Markup:
    first = {held.family: held for held in reversed(look.values()) if held.family not in LINES}
    keys = [
        tag("span", tag("i", class_=f"swatch {held.shape} {held.colour}"), family, class_="key")
        for family, held in reversed(first.items())
    ]
    contexts = [
        tag("span", tag("i", class_="swatch grey"), "chunks read in their document", class_="key"),
        tag("span", tag("i", class_="swatch grey hollow"), "chunks read alone", class_="key"),
    ]
    return tag("p", *keys, tag("span", class_="gap"), *contexts, class_="legend")


def _tabs(group: str, names: Sequence[str], panes: Sequence[Markup]) -> Markup:
    """Panes of which one is shown: radio buttons and rules of the style sheet, no script."""
    inputs = [
        tag("input", type="radio", name=group, id=f"{group}-{number}", class_=f"t{number}", checked=number == 0)
        for number in range(len(names))
    ]
    labels = [tag("label", name, for_=f"{group}-{number}") for number, name in enumerate(names)]
    bar = tag("div", *labels, class_="bar") if len(names) > 1 else None
    return tag("div", *inputs, bar, tag("div", *panes, class_="panes"), class_="tabs")


def _tab_rules(panes: int, heats: int) -> str:
    rules = []
    for number in range(max(panes, heats)):
        nth = f"nth-child({number + 1})"
        rules.append(f".t{number}:checked~.panes>figure:{nth}{{display:block}}")
        rules.append(f".t{number}:checked~.bar>label:{nth}{{background:var(--ink);color:var(--paper)}}")
        rules.append(f".t{number}:focus-visible~.bar>label:{nth}{{outline:2px solid var(--c0);outline-offset:2px}}")
    for heat in range(heats):
        for level in range(1, heatmap.LEVELS):
            depth = f"{80 * level / (heatmap.LEVELS - 1):.0f}%"
            rules.append(
                f".t{heat}:checked~.panes .h{heat}-{level}{{background:color-mix(in srgb,var(--heat) {depth},transparent)}}"
            )
    for level in range(1, heatmap.LEVELS):
        rules.append(f".heat-{level}{{fill:var(--heat);fill-opacity:{level / (heatmap.LEVELS - 1):.2f}}}")
    return "\n".join(rules)


def _tokens(tokens: dict[str, Any]) -> Markup:
    shown = next(iter(tokens["recomputed"]), None)
    underlined = f"; underlined: recomputed by {shown}" if shown else ""
    words = (
        f"Case {tokens['case']} ({tokens['kind']}): “{tokens['question']}” Gold answer: {tokens['answers'][0]}. Deviation: how far "
        "a token's stored keys and values are from those of a full prefill (relative, mean over layers). Lines are borders of "
        "chunks."
    )
    names = heatmap.kinds(tokens)
    text = tag("div", heatmap.text(tokens))
    return _section(
        "One prompt, token by token",
        words,
        tag("figure", heatmap.strips(tokens)),
        tag("p", f"The same prompt as it reads; choose what the colour shows{underlined}."),
        _tabs("heat", names, [text]),
    )


def _left_out(summary: dict[str, Any]) -> Markup:
    cases = tables.pairs({f"cases left out: {why}": count for why, count in summary["left_out"].items()})
    refused = {
        f"{arm['name']} refused ({count} prompts)": why
        for arm in summary["arms"]
        for why, count in arm["refused"].items()
    }
    nothing = tag("p", "No case was left out, no arm was refused.")
    parts = [cases if summary["left_out"] else None, tables.pairs(refused) if refused else None]
    return join(*parts) if any(parts) else nothing


def _conditions(summary: dict[str, Any]) -> dict[str, Any]:
    chosen = {"model": summary["model"], "data": summary["data"], "seed": summary["seed"], "cases": summary["cases"]}
    longest = {"longest answer": f"{summary['max_new_tokens']} tokens"}
    return {
        **summary["conditions"],
        **chosen,
        **longest,
        "intervals": "95 %, paired bootstrap over cases, 2,000 resamples",
    }
