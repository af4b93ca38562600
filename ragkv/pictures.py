"""Pictures of an answer and of a store over time. They need matplotlib, which is imported when one is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from itertools import accumulate, pairwise
from pathlib import PurePath
from time import localtime, strftime
from typing import TYPE_CHECKING, Any, Protocol

from ragkv.amounts import milliseconds, number, size
from ragkv.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ragkv.advice import Advice
    from ragkv.store.stats import Sample

#: What is drawn in these is the page's own colours on a page, light or dark; all others do in both, and carry white text.
_INK, _PAPER = "#1d2026", "#fefefd"
_MARK = "#d6336c"
_OTHER = "#15866a"  # a tier of one's own
_SOURCES = {
    "gpu": ("GPU memory", "#1f7f55"),
    "cpu": ("memory", "#2e70c4"),
    "disk": ("disk", "#7c5fcb"),
    "computed": ("not stored: read now", "#b6571b"),
    "unused": ("computed by the method", "#8a6d10"),
    "late": ("computed, as it came too slowly", "#8a6d10"),
    "path": ("computed here before", "#0f7a8a"),
    "variant": ("mended here before", "#4d6a1f"),
    "prompt": ("there already", "#666c76"),
    "fresh": ("prefix and question", "#8b919b"),
}
_STAGES = {
    "read": ("read what was missing", "#b6571b"),
    "place": ("load and place", "#2e70c4"),
    "select": ("select", "#8a6d10"),
    "compute": ("compute", "#d6336c"),
    "other": ("the rest", "#8b919b"),
}
# Inches: a picture's width, a line of its key, and what is kept for titles.
_WIDTH, _LINE, _TOP, _GAP = 10.0, 0.17, 0.75, 0.65


class Report(Protocol):
    """What is drawn of a :class:`~ragkv.report.AnswerReport`."""

    fusion: Any
    first_token_ms: float
    decode_ms: float
    new_tokens: int


def answer_picture(report: Report) -> Figure:
    """Where the KV of a prompt came from, which tokens were recomputed, and where the time went; see :meth:`AnswerReport.plot`."""
    chunks = report.fusion.chunks
    columns = 1 if len(chunks) <= 6 else 2 if len(chunks) <= 16 else 3
    lines = -(-len(chunks) // columns)
    bar, key, time = 1.15, max(lines, 1) * _LINE, 0.3
    below = (0.55, 0.85)  # behind the key, and behind the times: their titles and legends
    height = _TOP + bar + _GAP + key + below[0] + time + below[1]
    figure = _figure(height)

    def axes(top: float, tall: float) -> Axes:
        return figure.add_axes((0.09, 1 - (top + tall) / height, 0.88, tall / height))

    _draw_prompt(axes(_TOP, bar), report)
    _draw_key(axes(_TOP + bar + _GAP, key), report, columns, lines)
    _draw_times(axes(_TOP + bar + _GAP + key + below[0], time), report)
    return figure


def store_picture(samples: Sequence[Sample]) -> Figure:
    """A store from closing to closing: reads by tier and misses, evictions, what it held.

    Args:
        samples: of its history, at least two.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = _figure(8.4)
    reads, evicted, entries, sizes = figure.subplots(4, sharex=True, height_ratios=(2, 1, 1, 1))
    figure.subplots_adjust(left=0.09, right=0.97, top=0.93, bottom=0.07, hspace=0.5)
    missed = [max(new.misses - old.misses, 0) for old, new in pairwise(samples)]
    found = {**_by_tier([sample.hits for sample in samples]), ("missed", _MARK): missed}
    _draw_columns(reads, "chunks read, by where they were found", found)
    _draw_columns(evicted, "entries evicted, by tier", _by_tier([sample.evictions for sample in samples]))
    held = samples[1:]
    _draw_columns(entries, "entries on disk", {("", _SOURCES["disk"][1]): [sample.entries for sample in held]})
    _draw_columns(sizes, "size on disk", {("", _SOURCES["disk"][1]): [sample.bytes for sample in held]})
    step = 2 ** max(0, max(sample.bytes for sample in held).bit_length() - 2)
    sizes.yaxis.set_ticks([part * step for part in range(4)], [size(part * step) for part in range(4)])
    shown = range(0, len(held), -(-_columns(held) // 6))  # as many dates as fit side by side
    sizes.set_xticks([at + 0.5 for at in shown], [strftime("%Y-%m-%d %H:%M", localtime(held[at].at_s)) for at in shown])
    return figure


def advice_picture(advice: Advice) -> Figure:
    """Seconds to the first token over the chunk tokens of a prompt: full prefill, and from each tier.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figure = _figure(4.2)
    axes = figure.add_axes((0.09, 0.13, 0.88, 0.72))
    most = max(advice.lengths)
    lengths = sorted({max(1, round(most ** (step / 60))) for step in range(61)})
    lines = {("full prefill", _MARK): [advice.full_s(length) for length in lengths]}
    for tier in advice.rates.tiers:
        lines[_look(tier)] = [advice.reuse_s(tier, length) for length in lengths]
    for (words, colour), seconds in lines.items():
        axes.plot(lengths, seconds, color=colour, linewidth=1.8, label=words)
    axes.set(xscale="log", yscale="log", xlim=(1, most))
    axes.yaxis.set_major_formatter(lambda value, _: milliseconds(value * 1e3))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(axes, "First token after, by the chunk tokens of the prompt", "tokens")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=6, **_LEGEND)
    return figure


def svg(figure: Figure, title: str) -> str:
    """A picture as an element of a page: its text is text, ink and paper are ``currentColor`` and ``--paper``."""
    from matplotlib import rc_context

    out = StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ragkv"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a browser has other fonts
        figure.savefig(out, format="svg", transparent=True, metadata={**nothing, "Title": title})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_PAPER, "var(--paper)")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def need_matplotlib() -> None:
    """Says in time that no picture can be drawn.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("pictures need matplotlib: pip install 'ragkv[plots]'") from error


def _figure(height: float) -> Figure:
    need_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), facecolor=_PAPER)


def _draw_prompt(axes: Axes, report: Report) -> None:
    fusion = report.fusion
    known = fusion.reused_tokens
    parts = [("", known, "prompt"), ("", fusion.prefix_tokens - known, "fresh")]
    parts += [(str(number), chunk.tokens, chunk.source) for number, chunk in enumerate(fusion.chunks, 1)]
    parts.append(("", fusion.suffix_tokens, "fresh"))
    starts = list(accumulate((tokens for _, tokens, _ in parts), initial=0))
    total = starts.pop()
    named = set()
    for start, (name, tokens, source) in zip(starts, parts, strict=True):
        if not tokens:
            continue
        words, colour = _look(source)
        label = None if words in named else words
        named.add(words)
        axes.barh(0, tokens, left=start, height=1, color=colour, edgecolor=_PAPER, linewidth=0.8, label=label)
        if tokens > total * (0.008 + 0.008 * len(name)):
            axes.text(start + tokens / 2, 0, name, ha="center", va="center", color="white", fontsize=8, weight="bold")
    runs = [(start, stop - start) for start, stop in fusion.recomputed]
    if not runs:
        axes.text(0, 0.82, " none", va="center", color=_INK, fontsize=8)
    else:
        axes.broken_barh(runs, (0.62, 0.4), facecolor=_MARK, edgecolor=_MARK, linewidth=0.5, label="recomputed")
    axes.set_xlim(0, max(total, 1))
    axes.set_ylim(-0.5, 1.05)
    share = f"{fusion.budget:.1%} of the chunks recomputed" if fusion.chunks else "no chunk placed"
    _dress(axes, f"The prompt: {number(total, 'token')}, {number(len(fusion.chunks), 'chunk')}; {share}", "tokens")
    axes.set_yticks([0, 0.82], ["KV from", "recomputed"])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=8, **_LEGEND)


def _draw_key(axes: Axes, report: Report, columns: int, lines: int) -> None:
    """What the numbers in the bar stand for."""
    fusion = report.fusion
    axes.set_axis_off()
    axes.set(xlim=(0, columns), ylim=(max(lines, 1), 0))
    room = (90, 42, 22)[columns - 1]
    lengths = list(accumulate((chunk.tokens for chunk in fusion.chunks), initial=fusion.prefix_tokens))
    runs = fusion.recomputed
    for at, (chunk, name) in enumerate(zip(fusion.chunks, _names(fusion.chunks), strict=True)):
        fresh = sum(max(0, min(stop, lengths[at + 1]) - max(start, lengths[at])) for start, stop in runs)
        words = f"{at + 1}  {_short(name, room)}, {chunk.number + 1}: {fresh} of {chunk.tokens}"
        column, line = divmod(at, lines)
        axes.text(column, line + 0.5, words, va="center", color=_INK, fontsize=8, parse_math=False)
    standing = fusion.sources.count("prompt")
    there = f"; {number(standing, 'passage')} found for the question stood in the prompt already" if standing else ""
    axes.set_title(f"Chunks: document, passage, tokens recomputed{there}", loc="left", fontsize=8, color=_INK, pad=3)


def _draw_times(axes: Axes, report: Report) -> None:
    fusion = report.fusion
    spent = dict(fusion.milliseconds)
    whole = max(spent.pop("total"), report.first_token_ms)
    spent["other"] = max(0.0, whole - sum(spent.values()))
    at = 0.0
    for stage, (words, colour) in _STAGES.items():
        if spent[stage]:
            label = f"{words} {milliseconds(spent[stage])}"
            axes.barh(0, spent[stage], left=at, height=1, color=colour, edgecolor=_PAPER, linewidth=0.8, label=label)
            at += spent[stage]
    axes.set_xlim(0, whole or 1.0)
    axes.set_ylim(-0.5, 0.5)
    if report.first_token_ms:
        ahead = fusion.speculated == "used"
        first = f"{milliseconds(report.first_token_ms)}, the prompt begun before" if ahead else milliseconds(whole)
        title = f"First token after {first}; {number(report.new_tokens - 1, 'token')} more in {milliseconds(report.decode_ms)}"
    else:
        title = f"The prompt after {milliseconds(whole)}; {number(report.new_tokens, 'token')} in {milliseconds(report.decode_ms)}"
    _dress(axes, title, "ms")
    axes.set_yticks([0], ["time"])
    axes.legend(loc="upper left", bbox_to_anchor=(0, -1.6), ncols=5, **_LEGEND)


_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "labelcolor": _INK,
    "borderpad": 0,
    "borderaxespad": 0.4,
    "handlelength": 1.0,
    "handleheight": 0.8,
    "columnspacing": 1.4,
}


def _draw_columns(axes: Axes, title: str, series: Mapping[tuple[str, str], Sequence[int]]) -> None:
    """Numbers from closing to closing, one upon the other."""
    base: list[int] | None = None
    for (words, colour), values in series.items():
        lower = base or [0] * len(values)
        base = [low + value for low, value in zip(lower, values, strict=True)]
        axes.stairs(base, range(len(base) + 1), baseline=lower, fill=True, color=colour, label=words)
    axes.set_xlim(0, _columns(base or ()))
    axes.set_ylim(0, max([1, *(base or [])]) * 1.08)
    axes.locator_params(axis="y", integer=True, nbins=4)
    if not series:
        axes.text(0.1, 0.5, "none", va="center", color=_INK, fontsize=8)
    _dress(axes, title)
    if any(words for words, _ in series):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=6, **_LEGEND)


def _columns(values: Sequence[object]) -> int:
    """Room for as many columns, so that few are not broad."""
    return max(12, len(values))


def _dress(axes: Axes, title: str, unit: str = "") -> None:
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", fontsize=10, color=_INK, pad=24 if unit == "tokens" else 6)
    axes.tick_params(colors=_INK, labelsize=8, length=2)
    for side, line in axes.spines.items():
        line.set_visible(side == "bottom")
        line.set_color(_INK)
    axes.set_xlabel(unit, fontsize=8, color=_INK, loc="right", labelpad=1)


def _names(chunks: Sequence[Any]) -> list[str]:
    """What the chunks' documents are called; those without a name are numbered."""
    numbers: dict[str, int] = {}
    for chunk in chunks:
        if chunk.document and not chunk.name:
            numbers.setdefault(chunk.document, len(numbers) + 1)
    return [chunk.name or (f"document {numbers[chunk.document]}" if chunk.document else "passage") for chunk in chunks]


def _short(name: str, room: int) -> str:
    """A name in one line: where it is long without its folder, and where that is not enough without its middle."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    name = name if len(name) <= room else PurePath(name).name
    return name if len(name) <= room else f"{name[: room // 3]}…{name[-(room - room // 3 - 1) :]}"


def _by_tier(counts: Sequence[Mapping[str, int]]) -> dict[tuple[str, str], list[int]]:
    """How much each tier's counts rise from sample to sample; those that do not are left out."""
    tiers = dict.fromkeys(tier for count in counts for tier in count)
    risen = {tier: [max(new.get(tier, 0) - old.get(tier, 0), 0) for old, new in pairwise(counts)] for tier in tiers}
    return {_look(tier): values for tier, values in risen.items() if any(values)}


def _look(source: str) -> tuple[str, str]:
    return _SOURCES.get(source, (source, _OTHER))
