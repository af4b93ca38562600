"""What packed weights are worth: the same questions, computed in full, in float32 and packed.

    python -P benchmarks/packed.py --model FOLDER --data CASES.json [--cases 10] [--retrieve 3] [--json OUT.json]

Nothing is reused, so that what differs is the weights. KL is of the answer's first token against float32's; F1 and exact match are
of the answers, perplexity of the first gold answer.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

from ragkv.evaluation import Bench, metrics, read_cases
from ragkv.evaluation.bench import Outcome
from ragkv.evaluation.cases import Case
from ragkv.evaluation.conditions import conditions
from ragkv.evaluation.formats import brief
from ragkv.library.measured import Measured
from ragkv.methods import FullPrefill
from ragkv.model.loading import load_model

LOADED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, packed": {"weights": "float16"},
    "int8, packed": {"weights": "int8"},
}


def asked(args: argparse.Namespace, options: dict[str, Any]) -> tuple[list[tuple[Case, Outcome]], dict[str, Any]]:
    """Every case's answer by the model as it is loaded with these options, and under which conditions."""
    form, cases = read_cases(args.data, top_k=args.retrieve, limit=args.cases)
    model, tokenizer, template, foreign, *_ = load_model(args.model, "cpu", options)
    more = {
        "max_new_tokens": args.new_tokens,
        "instruction": brief(form, cases),
        "measured": Measured.NOTHING,
        "foreign": foreign,
    }
    bench = Bench(model, tokenizer, template, **more)
    answers: list[tuple[Case, Outcome]] = []
    for case in cases[: args.cases]:
        texts: Any = [case.text(place) for place in case.retrieved]  # which an engine takes, too
        prompt = bench.fuse(texts, case, FullPrefill())
        answers += [(case, outcome) for outcome in bench.answers([prompt], case)]
        print(".", end="", flush=True)
    return answers, conditions(bench.engine, "")


def row(case: Case, outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    """What one answer is worth."""
    return {
        "answer": outcome.text,
        "answers": case.answers,
        "tokens": len(outcome.ids),
        "f1": metrics.f1(outcome.text, case.answers, case.language),
        "em": metrics.exact_match(outcome.text, case.answers, case.language),
        "gold_nll": outcome.reply.gold_nll,
        "kl": metrics.divergence(reference.logits, outcome.logits),
        "same_first": metrics.same_top(reference.logits, outcome.logits),
        "same": float(outcome.reply.ids == reference.reply.ids),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over cases; of KL the median and the largest, too."""
    found = {name: mean(each[name] for each in rows) for name in ("f1", "em", "kl", "same_first", "same")}
    kl = [each["kl"] for each in rows]
    found |= {"kl_median": median(kl), "kl_most": max(kl), "perplexity": math.exp(mean(e["gold_nll"] for e in rows))}
    return {name: round(value, 5) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a transformers model")
    parser.add_argument("--data", type=Path, required=True, help="cases, in any form that ragkv eval reads")
    parser.add_argument("--cases", type=int, default=10)
    parser.add_argument("--retrieve", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--weights", nargs="+", choices=LOADED, default=list(LOADED))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    reference: list[tuple[Case, Outcome]] = []
    report: dict[str, Any] = {"model": Path(args.model).name, "data": args.data.name, "retrieve": args.retrieve}
    report |= {"weights": {}, "rows": {}}
    for name in dict.fromkeys(["float32", *args.weights]):
        answers, report["conditions"] = asked(args, LOADED[name])
        reference = reference or answers
        rows = [row(case, said, right) for (case, said), (_, right) in zip(answers, reference, strict=True)]
        report["rows"][name], report["weights"][name] = rows, summary(rows)
        print(f"\n{name}, {len(rows)} cases: " + ", ".join(f"{k} {v:g}" for k, v in summary(rows).items()), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
