"""What repair methods are worth on the models of several runs, side by side: `python -m training.ranking RUN RUN`.

For ablations: does a helper of the training change which method is better than which? Every run answers the same generated
cases with the same arms as ``ragkv eval`` does; rows are kept in the run's folder, so a stopped evaluation goes on from them,
and two runs may be evaluated side by side first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ragkv import PromptTemplate, bundled
from ragkv.chunk import digest
from ragkv.evaluation import Bench, Plan, evaluate, parse_arms
from training.cases import generated_cases
from training.export import read_checkpoint
from training.tokenizer import DEFAULT_PATH as TOKENIZER_PATH
from training.train import RESULTS

ARMS = (
    "full-documents",
    "full-prefill",
    "reuse",
    "sensitive-tokens:ratio=0.1",
    "cache-blend:ratio=0.15,check_layer=1",
    "cache-blend:ratio=0.15",
    "lego-link:k=16",
    "question-aware:ratio=0.15",
    "oracle:ratio=0.15",
    "random:ratio=0.15",
)


def bench_of(folder: Path) -> Bench:
    """The bench of a run's last checkpoint, with the template and the foreign text of the bundled model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER_PATH)
    model, template = read_checkpoint(folder, tokenizer), PromptTemplate(**bundled.TEMPLATE)
    return Bench(model, tokenizer, template, max_new_tokens=16, foreign=bundled.foreign())


def summary_of(folder: Path, plan: Plan) -> dict[str, Any]:
    """What ``ragkv eval`` would say of a run."""
    show = lambda items, what: tqdm(items, desc=f"{folder.name}: {what}", mininterval=5)  # noqa: E731
    # A folder for every checkpoint: rows of an earlier one are none of this.
    rows = folder / f"ranking-{digest((folder / 'checkpoint.pt').read_bytes()).hex()[:8]}"
    return evaluate(bench_of(folder), plan, rows, progress=show).summary


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Exact match of every arm in every run, in per cent with its 95 % interval, and the budget charged; a Markdown table."""
    cells: dict[str, list[str]] = {}
    for summary in summaries.values():
        for arm in summary["arms"]:
            mean, low, high, _ = (100 * value for value in arm["scores"]["all"]["em"])
            budget = f"{100 * arm['cost']['budget']:.0f} %"
            cells.setdefault(arm["name"], []).append(f"{mean:.1f} ({low:.0f} to {high:.0f}), {budget}")
    lines = ["| arm | " + " | ".join(summaries) + " |", "|---" * (len(summaries) + 1) + "|"]
    return "\n".join(lines + [f"| `{name}` | " + " | ".join(row) + " |" for name, row in cells.items()])


def main() -> None:
    """Reads the arguments, evaluates every run, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders under training/results with a checkpoint")
    parser.add_argument("--n", type=int, default=96, help="cases")
    parser.add_argument("--documents", type=int, default=3, help="in a case")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = f"generated cases over {args.documents} documents, seed {args.seed}"
    cases = generated_cases(args.seed, args.n, args.documents)
    summaries = {}
    for run in args.runs:
        plan = Plan(run, data, cases, parse_arms(ARMS, [0.15]), timed=0, seed=args.seed)
        summaries[run] = summary_of(RESULTS / run, plan)
    print(table(summaries))


if __name__ == "__main__":
    main()
