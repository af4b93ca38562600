"""Where the time to the first token goes: with KV in memory, and when the documents have still to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ragkv.evaluation.report.markup import Markup, join, tag

_WIDTH, _ROW, _TOP = 960, 26, 40
_GAP, _FIGURES, _LETTER = 12, 84, 6.6
_WARM = (("place", "load, decode, rotate"), ("select", "select"), ("compute", "compute"), ("other", "the rest"))
_COLD = (("read", "read the documents"), ("after", "then as above"))


def stages(arms: Sequence[dict[str, Any]]) -> Markup:
    """Bars for some arms: on the left with KV in memory by stage, on the right cold. Medians, so that parts need not add up."""
    names = 20 + _LETTER * max((len(arm["name"]) for arm in arms), default=0)
    width = (_WIDTH - names - _GAP) / 2 - _FIGURES
    warm, cold = [_warm(arm["cost"]) for arm in arms], [_cold(arm["cost"]) for arm in arms]
    rows = [
        tag(
            "g",
            tag("text", arm["name"], x=names - 10, y=_TOP + _ROW * number + 14, class_="note end"),
            _bar(parts, names, _TOP + _ROW * number, width / _longest(warm), dict(_WARM)),
            _bar(read, names + width + _FIGURES + _GAP, _TOP + _ROW * number, width / _longest(cold), dict(_COLD)),
        )
        for number, (arm, parts, read) in enumerate(zip(arms, warm, cold, strict=True))
    ]
    heads = join(
        tag("text", "KV in memory", x=names, y=20, class_="axis"),
        tag("text", "nothing read yet", x=names + width + _FIGURES + _GAP, y=20, class_="axis"),
    )
    return tag(
        "svg",
        heads,
        *rows,
        viewBox=f"0 0 {_WIDTH} {_TOP + _ROW * len(arms) + 8}",
        role="img",
        aria_label="time to first token by stage",
        data_plot="stages",
    )


def legend() -> Markup:
    """What the colours of the bars mean."""
    entries = [*_WARM, *_COLD]
    return tag(
        "p",
        *[tag("span", tag("i", class_=f"swatch s-{name}"), words, class_="key") for name, words in entries],
        class_="legend",
    )


def _warm(cost: dict[str, Any]) -> dict[str, float]:
    parts = dict(cost["stages_ms"])
    return {**parts, "other": max(0.0, cost["ttft_ms"] - sum(parts.values()))}


def _cold(cost: dict[str, Any]) -> dict[str, float]:
    if "cold_ms" not in cost:
        return {}
    return {"read": cost["cold_read_ms"], "after": max(0.0, cost["cold_ms"] - cost["cold_read_ms"])}


def _longest(bars: Sequence[dict[str, float]]) -> float:
    return max((sum(parts.values()) for parts in bars), default=1.0) or 1.0


def _bar(parts: dict[str, float], left: float, top: float, scale: float, names: dict[str, str]) -> Markup:
    pieces, at = [], left
    for name, ms in parts.items():
        if not ms:
            continue
        title = tag("title", f"{names[name]}: {ms:.1f} ms")
        pieces.append(tag("rect", title, x=at, y=top, width=ms * scale, height=_ROW - 8, class_=f"s-{name}"))
        at += ms * scale
    total = f"{sum(parts.values()):,.1f} ms" if parts else "not timed"
    return tag("g", *pieces, tag("text", total, x=at + 6, y=top + 14, class_="tick"))
