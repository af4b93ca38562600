"""Draws the loss curves of a run from its log: `python -m training.curves`. Writes ``curves.svg`` beside the log."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from training.train import RESULTS

TERMS = {
    "answer": "answers",
    "read": "language model on the context",
    "subject": "helper: subject read at the value",
    "evidence": "helper: attention to the evidence",
}


def draw(folder: Path) -> Path:
    """Draws ``log.csv`` of a run's folder.

    Returns:
        The picture's path.
    """
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 4.5))
    axes = figure.add_subplot()
    millions = [int(row["tokens"]) / 1e6 for row in rows]
    for term, label in TERMS.items():
        axes.plot(millions, [float(row[term]) for row in rows], label=label, linewidth=1)
    axes.set(xlabel="million tokens", ylabel="loss (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    target = folder / "curves.svg"
    with rc_context({"svg.hashsalt": "ragkv"}):
        figure.savefig(target, metadata={"Date": None})
    return target


def main() -> None:
    """Reads the arguments and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="bundled", help="name of the folder under training/results")
    print(f"wrote {draw(RESULTS / parser.parse_args().run)}")


if __name__ == "__main__":
    main()
