"""What the rows of a run add up to: a plain dictionary, which the terminal's table and the page are made of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import exp
from statistics import median
from typing import Any

import numpy as np

from ragkv.evaluation.arms import FULL_DOCUMENTS
from ragkv.evaluation.errors import EvaluationError
from ragkv.evaluation.rows import Row
from ragkv.evaluation.statistics import Estimate, Resampling, difference


@dataclass(frozen=True)
class Metric:
    """One thing that is counted.

    Attributes:
        name: of the row's field.
        label: as it is shown.
        meaning: in a sentence.
        share: shown in per cent.
        higher_is_better: or lower.
    """

    name: str
    label: str
    meaning: str
    share: bool = True
    higher_is_better: bool = True

    def merit(self, score: float) -> float:
        """A score so that more is better."""
        return score if self.higher_is_better else -score

    def figure(self, score: float) -> str:
        """A score for tables: per cent without the sign, or three digits."""
        if self.share:
            return f"{100 * score:.1f}"
        return f"{score:.3g}" if score >= 1e-4 or score == 0 else f"{score:.0e}"

    def shown(self, score: float, digits: int = 0) -> str:
        """A score by itself: per cent, or three digits."""
        return f"{score:.{digits}%}" if self.share else f"{score:.3g}"


_REFERENCES = {"chunks": "a full prefill of the same chunks", "documents": "a full prefill of the whole documents"}
METRICS = {
    metric.name: metric
    for metric in (
        Metric("em", "exact match", "the answer is a gold answer, both normalised as for SQuAD"),
        Metric("f1", "F1", "words shared with the best gold answer"),
        Metric("rouge_l", "Rouge-L", "longest common subsequence of words with the best gold answer, F-measure"),
        Metric("longbench", "LongBench", "the score that LongBench counts for the data set"),
        Metric("contained", "contained", "a gold answer stands in the answer"),
        Metric("perplexity", "perplexity", "of the gold answer, a token", share=False, higher_is_better=False),
        *(
            metric
            for what, full in _REFERENCES.items()
            for metric in (
                Metric(f"top1_{what}", f"top-1, {what}", f"the first token is that of {full}"),
                Metric(f"same_{what}", f"same answer, {what}", f"the greedy answer is that of {full}"),
                Metric(f"kl_{what}", f"KL, {what}", f"nats from {full} to the arm, first token", False, False),
            )
        ),
    )
}
"""What is counted for each arm, by name."""


def of_fewer(held: Sequence[float], cases: int) -> str:
    """Behind an estimate that is not of all cases that it stands beside: of how many."""
    return f" n = {held[3]}" if held[3] != cases else ""


#: Slices of the rows besides the kinds of question.
ALL, GIVEN, SHUFFLED = "all", "order as given", "order shuffled"


def metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        EvaluationError: there is none; the message lists those that there are.
    """
    if name not in METRICS:
        raise EvaluationError(f"no metric {name!r}; there are: {', '.join(METRICS)}")
    return METRICS[name]


def summarise(
    rows: Iterable[Row], timed: Sequence[dict[str, Row]], arms: Sequence[str], cases: Sequence[str], seed: int
) -> dict[str, Any]:
    """Add rows up by arm and slice.

    Args:
        rows: of all arms; those of other arms or cases are passed over.
        timed: for the timed cases, what each arm cost cold and from disk.
        arms: names, in the order in which they are shown.
        cases: ids.
        seed: of the resampling.

    Returns:
        ``slices``: cases by slice. ``arms``: for each arm ``n``, ``refused`` (reasons and how often), ``scores[slice][metric]`` as
        [mean, low, high, n], ``against_documents`` likewise for the difference to the full prefill of whole documents, ``cost``.
    """
    ids, ordered = set(cases), sorted(rows, key=lambda row: row["order"])
    known = [row for row in ordered if row["arm"] in arms and row["case"] in ids]
    resampling, slices = Resampling(cases, seed, documents_of(known)), _slices(known)

    def scored(arm: str) -> dict[str, list[Row]]:
        rows = [row for row in known if row["arm"] == arm and "refused" not in row]
        return {name: list(filter(wanted, rows)) for name, wanted in slices.items()}

    reference, found = scored(FULL_DOCUMENTS), []
    for arm in arms:
        held = scored(arm)
        found.append(
            {
                "name": arm,
                "n": len({row["case"] for row in held[ALL]}),
                "prompts": len(held[ALL]),
                "refused": dict(Counter(row["refused"] for row in known if row["arm"] == arm and "refused" in row)),
                "scores": {name: _estimates(resampling, METRICS, held[name]) for name in slices},
                "against_documents": {
                    name: _estimates(resampling, ("em", "f1"), held[name], less=reference[name]) for name in slices
                },
                "cost": _cost(held[ALL], [times[arm] for times in timed if arm in times]),
            }
        )
    counts = {name: len({row["case"] for row in known if wanted(row)}) for name, wanted in slices.items()}
    return {"slices": counts, "arms": found}


def documents_of(rows: Iterable[Row]) -> dict[str, str]:
    """By case, what names the document that it is about; rows of before 2026-11-28 do not say."""
    return {row["case"]: row["document"] for row in rows if "document" in row}


def _slices(rows: Sequence[Row]) -> dict[str, Callable[[Row], bool]]:
    """All, every kind in order of appearance, and where chunks were shuffled, both orders of those cases that were."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    shuffled = {row["case"] for row in rows if row["order"]}
    slices: dict[str, Callable[[Row], bool]] = {ALL: lambda row: True}
    if len(kinds) > 1:
        slices |= {kind: lambda row, kind=kind: row["kind"] == kind for kind in kinds}
    if shuffled:
        slices[GIVEN] = lambda row: row["order"] == 0 and row["case"] in shuffled
        slices[SHUFFLED] = lambda row: row["order"] > 0
    return slices


def _values(rows: Iterable[Row], name: str) -> dict[str, list[float]]:
    """A metric's values by case."""
    field = "gold_nll" if name == "perplexity" else name
    values = defaultdict(list)
    for row in rows:
        if field in row:
            values[row["case"]].append(row[field])
    return dict(values)


def _estimates(
    resampling: Resampling, names: Iterable[str], rows: Sequence[Row], less: Sequence[Row] | None = None
) -> dict[str, Estimate]:
    """Of the metrics of these names that rows have; with ``less``, of what they have more than those."""
    found = {}
    for name in names:
        values = _values(rows, name)
        estimate = resampling.estimate(values if less is None else difference(values, _values(less, name)))
        if estimate is not None:
            found[name] = estimate
    if "perplexity" in found:
        mean, low, high, n = found["perplexity"]
        found["perplexity"] = Estimate(exp(mean), exp(low), exp(high), n)
    return found


def _cost(rows: Sequence[Row], timed: Sequence[Row]) -> dict[str, Any]:
    """Means of budgets, medians of times."""
    if not rows:
        return {}
    stages = {stage: median(row["stages"].get(stage, 0.0) for row in rows) for stage in ("place", "select", "compute")}
    times = [row["ttft_ms"] for row in rows]
    cost: dict[str, Any] = {
        "budget": sum(row["budget"] for row in rows) / len(rows),
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "ttft_ms": median(times),
        "ttft_p95_ms": float(np.quantile(times, 0.95)),
        "stages_ms": stages,
        "timed": len(timed),
    }
    for name in ("cold_ms", "cold_read_ms", "disk_ms", "disk_place_ms", "bytes_read", "kv_bytes", "peak_bytes"):
        known = [row[name] for row in timed if row.get(name) is not None]
        if known:
            cost[name] = median(known)
    return cost
