"""Trains the bundled model: `python -m training.train`. Stops and goes on where it was.

Writes ``checkpoint.pt`` and ``log.csv`` (one row every few steps) into ``training/results/<run>``.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from training.data import Batch, Stage, batches
from training.model import SIZES, Reader, Size
from training.optim import optimizers
from training.tokenizer import DEFAULT_PATH as TOKENIZER_PATH
from training.world.writer import Shape

RESULTS = Path(__file__).parent / "results"

SHORT = Shape(documents=(3, 5), chunks=(1, 2), words=(6, 14), facts=(1, 2), types=(1, 2))
MIDDLE = Shape(documents=(3, 7), chunks=(1, 3), words=(10, 40), facts=(1, 3))
LONG = Shape(documents=(2, 8), chunks=(1, 3), words=(24, 100), facts=(1, 3))
WIDE = Shape(documents=(3, 10), chunks=(1, 3), words=(24, 100), facts=(1, 3))
LONGEST = Shape(documents=(3, 12), chunks=(1, 3), words=(24, 100), facts=(1, 3))

_SHORT = Stage(0, SHORT, context=176, asked=320, batch=8, mixed=0.5, orders=6, absents=3)
_MIDDLE = Stage(0, MIDDLE, context=512, asked=480, batch=4, longest_gap=600, fewest=300, mixed=0.5, orders=8, absents=4)
_LONG = replace(_MIDDLE, shape=LONG, context=1024, asked=640, batch=3, longest_gap=1000, fewest=500)
_LONGEST = replace(_MIDDLE, shape=LONGEST, context=2048, asked=800, batch=2, longest_gap=1500, fewest=1000)
_WIDE = replace(_MIDDLE, shape=WIDE, context=1536, asked=720, batch=2, longest_gap=1200, fewest=700, twice=("order",))

# From short to long; the helpers fade out early. The rates fall to nothing, rise again and fall, twice.
CURRICULUM = (
    replace(_SHORT, steps=800),
    replace(_MIDDLE, steps=900, helper=(1.0, 0.5)),
    replace(_LONG, steps=1200, rate=(1.0, 0.7), helper=(0.5, 0.0)),
    replace(_LONG, steps=1000, rate=(0.7, 0.4), helper=(0.0, 0.0)),
    replace(_LONGEST, steps=500, rate=(0.4, 0.25), helper=(0.0, 0.0)),
    replace(_LONG, steps=1200, rate=(0.25, 0.0), helper=(0.0, 0.0)),
    replace(_LONG, steps=1000, rate=(0.4, 0.3), helper=(0.0, 0.0), twice=("order",)),
    replace(_LONGEST, steps=1000, rate=(0.3, 0.2), helper=(0.0, 0.0), twice=("order",)),
    replace(_WIDE, steps=2200, rate=(0.2, 0.0), helper=(0.0, 0.0)),
    replace(_WIDE, steps=2600, rate=(0.3, 0.0), helper=(0.0, 0.0), near=0.5),
)

# Contexts of up to 512 tokens, for ablations.
BRIEF = (
    replace(_SHORT, steps=800),
    replace(_MIDDLE, steps=900, helper=(1.0, 0.0)),
    replace(_MIDDLE, steps=900, rate=(1.0, 0.0), helper=(0.0, 0.0)),
)
CURRICULA = {"whole": CURRICULUM, "brief": BRIEF}


@dataclass(frozen=True)
class Plan:
    """Learning rates and the weights of the loss terms beside the answers'.

    Attributes:
        matrix_lr: Of Muon.
        other_lr: Of AdamW.
        read: Weight of the language-model loss on the context.
        subject: Weight of the helper that reads subjects off values, where a stage does not lessen it.
        evidence: Weight of the helper that draws attention to the evidence, likewise.
    """

    matrix_lr: float = 0.02
    other_lr: float = 0.004
    read: float = 0.1
    subject: float = 0.5
    evidence: float = 0.5


def between(ends: tuple[float, float], share: float) -> float:
    """The value a ``share`` of the way from the first to the second."""
    return ends[0] + (ends[1] - ends[0]) * share


class TrainingRun:
    """A training run: the model, its optimizers and where it stands."""

    def __init__(self, folder: Path, size: Size, plan: Plan, curriculum: tuple[Stage, ...], device: str, seed: int):
        """Makes a new run, or takes up the one in ``folder``."""
        torch.manual_seed(seed)
        self.folder, self.size, self.plan, self.curriculum, self.seed = folder, size, plan, curriculum, seed
        self.device = torch.device(device)
        self.low_precision = device != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
        self.model = Reader(size).to(self.device)
        self.optimizers = optimizers(self.model, plan.matrix_lr, plan.other_lr)
        self.base_lrs = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "checkpoint.pt").exists():
            self._load()

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.curriculum)

    def _load(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "size": asdict(self.size),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        torch.save(state, self.folder / "checkpoint.part")
        os.replace(self.folder / "checkpoint.part", self.folder / "checkpoint.pt")

    def stage(self) -> tuple[Stage, float]:
        """The stage of the step at hand, and the share of it that is behind."""
        left = self.step
        for stage in self.curriculum:
            if left < stage.steps:
                return stage, left / stage.steps
            left -= stage.steps
        return self.curriculum[-1], 1.0

    def update(self, batch: Batch, losses_of) -> dict[str, float]:
        """One step; returns the loss terms."""
        stage, done = self.stage()
        factor = min(between(stage.rate, done), (self.step + 1) / 100)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            losses: dict[str, Tensor] = losses_of(batch.to(self.device), 4)
        helpers = self.plan.subject * losses["subject"] + self.plan.evidence * losses["evidence"]
        total = losses["answer"] + self.plan.read * losses["read"] + between(stage.helper, done) * helpers
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += int(batch.length.sum()) + int((batch.segment >= 0).sum())
        return {name: loss.item() for name, loss in losses.items()}

    def train(
        self,
        tokenizer: PreTrainedTokenizerFast,
        compiled: bool,
        workers: int = 0,
        every: int = 20,
        save_every: int = 200,
    ) -> None:
        """Trains to the end of the curriculum.

        Args:
            tokenizer: The one that `training.tokenizer` made.
            compiled: Use torch.compile; minutes for each stage.
            workers: Processes that make batches; 0 makes them here.
            every: Steps between rows of the log.
            save_every: Steps between checkpoints.
        """
        losses_of = torch.compile(self.model.losses) if compiled else self.model.losses
        stage, source, sums, begun = None, None, {}, time.monotonic()
        with (self.folder / "log.csv").open("a", newline="") as file:
            log = csv.writer(file)
            if self.step == 0:
                log.writerow(("step", "seconds", "tokens", "answer", "read", "subject", "evidence"))
            for _ in tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, mininterval=10):
                if self.stage()[0] is not stage:
                    stage = self.stage()[0]
                    source = batches(tokenizer, stage, self.seed * 1_000_003 + self.step, workers)
                losses = self.update(next(source), losses_of)
                sums = {name: sums.get(name, 0.0) + value for name, value in losses.items()}
                self.seconds, begun = self.seconds + time.monotonic() - begun, time.monotonic()
                if self.step % every == 0:
                    log.writerow(
                        (self.step, round(self.seconds), self.tokens, *(f"{s / every:.4f}" for s in sums.values()))
                    )
                    file.flush()
                    sums = {}
                if self.step % save_every == 0 or self.step == self.steps:
                    self.save()


def main() -> None:
    """Reads the arguments and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="bundled", help="name of the folder under training/results")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--curriculum", choices=CURRICULA, default="whole")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--subject", type=float, default=Plan.subject, help="weight of a helper; 0 leaves it out")
    parser.add_argument("--evidence", type=float, default=Plan.evidence, help="weight of the other, likewise")
    parser.add_argument("--batch", type=int, default=1, help="multiplies the contexts of a step")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; a GPU needs some")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    args = parser.parse_args()
    curriculum = tuple(
        replace(stage, steps=round(stage.steps * args.scale), batch=stage.batch * args.batch)
        for stage in CURRICULA[args.curriculum]
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_PATH)
    plan = Plan(subject=args.subject, evidence=args.evidence)
    run = TrainingRun(RESULTS / args.run, SIZES[args.size], plan, curriculum, args.device, args.seed)
    run.train(tokenizer, compiled=args.compile, workers=args.workers)
    print(f"{run.step} steps, {run.tokens} tokens, {run.seconds / 60:.1f} minutes on {run.device}")


if __name__ == "__main__":
    main()
