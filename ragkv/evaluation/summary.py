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
    by_arm: dict[str, list[Row]] = {arm: [] for arm in arms}
    known = set(cases)
    for row in rows:
        if row["arm"] in by_arm and row["case"] in known:
            by_arm[row["arm"]].append(row)
    resampling = Resampling(cases, seed)
    reference = by_arm.get(FULL_DOCUMENTS, [])
    slices = _slices([row for held in by_arm.values() for row in held])
    found = []
    for arm, held in by_arm.items():
        scored = [row for row in held if "refused" not in row]
        found.append(
            {
                "name": arm,
                "n": len({row["case"] for row in scored}),
                "prompts": len(scored),
                "refused": dict(Counter(row["refused"] for row in held if "refused" in row)),
                "scores": {name: _scores(resampling, filter(wanted, scored)) for name, wanted in slices.items()},
                "against_documents": {
                    name: _against(resampling, filter(wanted, scored), filter(wanted, reference))
                    for name, wanted in slices.items()
                },
                "cost": _cost(scored, [times[arm] for times in timed if arm in times]),
            }
        )
    counts = {
        name: len({row["case"] for held in by_arm.values() for row in held if wanted(row)})
        for name, wanted in slices.items()
    }
    return {"slices": counts, "arms": found}


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


def _values(rows: Iterable[Row], names: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """By metric its values by case, orders ascending."""
    ordered = sorted(rows, key=lambda row: row["order"])
    values: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    for name, by_case in values.items():
        field = "gold_nll" if name == "perplexity" else name
        for row in ordered:
            if field in row:
                by_case[row["case"]].append(row[field])
    return values


def _scores(resampling: Resampling, rows: Iterable[Row]) -> dict[str, Estimate]:
    scores = _estimates(resampling, _values(rows, METRICS))
    if "perplexity" in scores:
        mean, low, high, n = scores["perplexity"]
        scores["perplexity"] = Estimate(exp(mean), exp(low), exp(high), n)
    return scores


def _against(resampling: Resampling, rows: Iterable[Row], reference: Iterable[Row]) -> dict[str, Estimate]:
    held, other = _values(rows, ("em", "f1")), _values(reference, ("em", "f1"))
    return _estimates(resampling, {name: difference(held[name], other[name]) for name in held})


def _estimates(resampling: Resampling, values: dict[str, dict[str, list[float]]]) -> dict[str, Estimate]:
    found = {name: resampling.estimate(held) for name, held in values.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


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
