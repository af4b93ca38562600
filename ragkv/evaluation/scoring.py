"""One row: what an arm answered to a case, what it is worth and what it cost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ragkv.chunk import Chunk, digest
from ragkv.errors import in_one_line
from ragkv.evaluation import longbench, metrics
from ragkv.evaluation.arms import Arm
from ragkv.evaluation.bench import REFUSALS, Bench, CaseChunks, Outcome
from ragkv.evaluation.cases import Case
from ragkv.evaluation.errors import EvaluationError
from ragkv.evaluation.rows import Row
from ragkv.methods import FullPrefill, Method
from ragkv.report import FusedPrompt

_FULL = FullPrefill()
#: So many prompts are answered side by side, each with its keys and values in memory.
_AT_ONCE = 8

#: Names a prompt: what it was made of.
_Key = tuple[Any, ...]


class Group:
    """All arms of one case in one order of its chunks.

    Prompts are made one by one, so that each has its own time, and answered several at once. Those that are the same for several
    arms are run once: the whole documents' where everything was retrieved, say.

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
        self._about: Row = {
            "case": case.id,
            "fingerprint": case.fingerprint,
            "document": case.about,
            "kind": case.kind,
            "order": order,
        }
        self._fused: dict[_Key, tuple[FusedPrompt, float]] = {}
        self._known: dict[_Key, Outcome] = {}

    def rows(self, arms: Sequence[Arm], seed: int = 0) -> Iterator[Row]:
        """A row for each arm that the case has chunks for.

        Args:
            arms: in random order, so that a machine whose speed drifts slows all alike; random controls stay last.
            seed: of that order.
        """
        shuffled = random.Random(f"{seed}/{self.case.id}/{self.order}").sample(arms, len(arms))
        asked = sorted((arm for arm in shuffled if arm.suits(self.case)), key=lambda arm: bool(arm.like))
        full = {
            name: self._fuse(self.reading.at(places, "document"), _FULL, True)
            for name, places in (("chunks", self.case.retrieved), ("documents", self.case.whole))
            if self.bench.fits(self.case, places)
        }
        self._answer()
        references = {name: self._known[key] for name, key in full.items()}
        for begin in range(0, len(asked), _AT_ONCE):
            made = [(arm, self._made(arm)) for arm in asked[begin : begin + _AT_ONCE]]
            self._answer()
            for arm, key in made:
                row = {"refused": key} if isinstance(key, str) else self._row(arm, self._known[key], references)
                yield {**self._about, "arm": arm.name, **row}

    def _made(self, arm: Arm) -> _Key | str:
        """The prompt of an arm, or why there is none."""
        try:
            key = self._fuse(*self.reading.given(arm, self.case, self.charged), arm.rotated)
        except REFUSALS as error:
            return in_one_line(error)
        report = self._known[key].report if key in self._known else self._fused[key][0].report
        self.charged[arm.name] = report.budget
        return key

    def _fuse(self, chunks: Sequence[Chunk], method: Method, rotated: bool) -> _Key:
        contexts = () if method == _FULL else tuple(chunk.context for chunk in chunks)
        key = (method, rotated, contexts, tuple(chunk.ids for chunk in chunks))
        if key not in self._known and key not in self._fused:
            self._fused[key] = self.bench.fuse(chunks, self.case, method, rotated)
        return key

    def _answer(self) -> None:
        """What was fused and is not answered yet."""
        outcomes = self.bench.answers(list(self._fused.values()), self.case)
        self._known.update(zip(self._fused, outcomes, strict=True))
        self._fused.clear()

    def _row(self, arm: Arm, outcome: Outcome, references: Mapping[str, Outcome]) -> Row:
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


def _scores(answer: str, case: Case) -> Row:
    """What an answer is worth."""
    own = longbench.score(case.kind, answer, case.answers, case.language, case.classes)
    return {
        "answer": answer.strip(),
        "em": metrics.exact_match(answer, case.answers, case.language),
        "f1": metrics.f1(answer, case.answers, case.language),
        "rouge_l": metrics.rouge_l(answer, case.answers, case.language),
        "contained": metrics.contains(answer, case.answers, case.language),
        **({} if own is None else {"longbench": own}),
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
