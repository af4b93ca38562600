"""One row: what an arm answered to a case, what it is worth and what it cost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

import torch

from ragkv.chunk import Chunk, digest
from ragkv.evaluation import metrics
from ragkv.evaluation.arms import Arm
from ragkv.evaluation.bench import REFUSALS, Bench, CaseChunks, Outcome
from ragkv.evaluation.cases import Case
from ragkv.evaluation.errors import EvaluationError
from ragkv.evaluation.rows import Row
from ragkv.methods import FullPrefill, Method

_FULL = FullPrefill()


class Group:
    """All arms of one case in one order of its chunks.

    Prompts that are the same for several arms are run once: the whole documents' where everything was retrieved, say.

    Args:
        bench: the model.
        case: in its order.
        order: the order's number.
        reading: the case's chunks.
        charged: budgets charged to arms whose rows are there already.
    """

    def __init__(
        self, bench: Bench, case: Case, order: int, reading: CaseChunks, charged: Mapping[str, float] | None = None
    ):
        self.bench: Bench = bench
        self.case: Case = case
        self.order: int = order
        self.reading: CaseChunks = reading
        self.charged: dict[str, float] = dict(charged or {})
        self._about: Row = {"case": case.id, "fingerprint": case.fingerprint, "kind": case.kind, "order": order}
        self._known: dict[tuple, Outcome] = {}

    def rows(self, arms: Sequence[Arm], seed: int = 0) -> Iterator[Row]:
        """A row for each arm that the case has chunks for.

        Args:
            arms: in random order, so that a machine whose speed drifts slows all alike; random controls stay last.
            seed: of that order.
        """
        shuffled = random.Random(f"{seed}/{self.case.id}/{self.order}").sample(arms, len(arms))
        references = {
            name: self._outcome(self.reading.at(places, "document"), _FULL, True)
            for name, places in (("chunks", self.case.retrieved), ("documents", self.case.whole))
            if self.bench.fits(self.case, places)
        }
        for arm in sorted(shuffled, key=lambda arm: bool(arm.like)):
            if arm.suits(self.case):
                yield {**self._about, "arm": arm.name, **self._row(arm, references)}

    def _row(self, arm: Arm, references: Mapping[str, Outcome]) -> Row:
        try:
            outcome = self._outcome(*self.reading.given(arm, self.case, self.charged), arm.rotated)
        except REFUSALS as error:
            return {"refused": " ".join(str(error).split())}
        self.charged[arm.name] = outcome.report.budget
        same = references.get({"retrieved": "chunks"}.get(arm.reads, arm.reads))
        if same is not None and not torch.equal(outcome.ids, same.ids):
            raise EvaluationError(
                f"case {self.case.id}: {arm.name} was given other token ids than the full prefill that it is compared with; this "
                "is a bug of ragkv, please report it"
            )
        row = _figures(outcome)
        if self.bench.max_new_tokens:
            row |= _scores(outcome.text, self.case)
        for name, reference in references.items():
            row[f"kl_{name}"] = metrics.divergence(reference.logits, outcome.logits)
            row[f"top1_{name}"] = metrics.same_top(reference.logits, outcome.logits)
            if self.bench.max_new_tokens:
                row[f"same_{name}"] = float(reference.reply.ids == outcome.reply.ids)
        return row

    def _outcome(self, chunks: Sequence[Chunk], method: Method, rotated: bool) -> Outcome:
        contexts = () if method == _FULL else tuple(chunk.context for chunk in chunks)
        key = (method, rotated, contexts, tuple(chunk.ids for chunk in chunks))
        if key not in self._known:
            self._known[key] = self.bench.run(chunks, self.case, method, rotated)
        return self._known[key]


def _scores(answer: str, case: Case) -> Row:
    """What an answer is worth."""
    return {
        "answer": answer,
        "em": metrics.exact_match(answer, case.answers, case.language),
        "f1": metrics.f1(answer, case.answers, case.language),
        "rouge_l": metrics.rouge_l(answer, case.answers, case.language),
        "contained": metrics.contains(answer, case.answers, case.language),
    }


def _figures(outcome: Outcome) -> Row:
    """What a prompt gave without its answer, and what it cost."""
    report = outcome.report
    return {
        "gold_nll": outcome.reply.gold_nll,
        "method": report.method,
        "ids": digest(outcome.ids.tolist()).hex()[:16],
        "tokens": len(outcome.ids),
        "budget": report.budget,
        "ttft_ms": round(outcome.ttft_ms, 3),
        "stages": {name: round(value, 3) for name, value in report.milliseconds.items() if name != "total"},
    }
