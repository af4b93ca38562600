"""``ragkv eval``: gates, then a table of what each arm is worth and costs, raw rows, and a page with plots."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ragkv.bundled import CASES_PATH
from ragkv.cli import show
from ragkv.evaluation import Bench, Case, EvaluationError, Plan, evaluate, parse_arms, read_cases, with_neighbours
from ragkv.evaluation.arms import NEIGHBOURS
from ragkv.evaluation.formats import brief
from ragkv.evaluation.gates import Gate
from ragkv.evaluation.longbench import data_set
from ragkv.evaluation.report import page, tables, templates
from ragkv.evaluation.summary import ALL, METRICS, Metric, metric, of_fewer
from ragkv.library.measured import Measured
from ragkv.model.loading import BUNDLED, load_model


def run(args: argparse.Namespace) -> int:
    """Evaluate."""
    templates()  # hours of work should not end without a report
    upwards = metric(args.metric or "em")  # a name that is none is refused before anything is read
    arms = parse_arms(args.arms, args.budgets)
    form, cases = read_cases(
        CASES_PATH if args.data == BUNDLED else args.data, args.chunk_words, args.retrieve, args.limit
    )
    if any(arm.context == NEIGHBOURS for arm in arms):
        cases = with_neighbours(cases)
    counted = _counted(form, cases)
    if args.metric is None:
        upwards = metric(counted if args.max_new_tokens else "kl_chunks")
    elif not args.max_new_tokens and not upwards.name.startswith(("perplexity", "kl_", "top1_")):
        raise EvaluationError(f"{upwards.name} is counted of answers, and --max-new-tokens 0 asks for none")
    elif upwards.name == "longbench" != counted:
        raise EvaluationError("longbench is counted of LongBench's data sets alone")
    if args.instruction is None:
        args.instruction = brief(form, cases)
    plan = Plan(
        model=args.model,
        data=f"{Path(args.data).name} ({form})",
        cases=cases,
        arms=arms,
        limit=args.limit,
        orders=args.orders,
        timed=args.timed,
        seed=args.seed,
        time_limit_s=args.time_limit,
        command=shlex.join(["ragkv", *args.argv]),
    )
    bench = _bench(args)
    folder = Path(args.out).expanduser()
    path = folder / "report.html"
    passed = show.hint if args.json else print  # --json keeps stdout for its object
    with _terminable():
        result = evaluate(
            bench,
            plan,
            folder,
            passed=lambda gate: passed(_said(gate)),
            progress=_progress,
            jobs=args.jobs,
            make_bench=partial(_bench, args),
        )
    path.write_text(page(result.summary, result.tokens, upwards), "utf-8", errors="replace")
    (folder / "tables.md").write_text(tables(result.summary, upwards), "utf-8", errors="replace")
    if args.json:
        show.as_json({**result.summary, "page": str(path)})
    else:
        _show(result.summary, upwards)
        print(f"\nreport: {path}")
    return 130 if result.interrupted else 0


def _counted(form: str, cases: Sequence[Case]) -> str:
    """The metric by which answers to a data set are counted."""
    return "longbench" if form == "LongBench" and data_set(cases[0].kind) is not None else "em"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with a report of what there is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _bench(args: argparse.Namespace) -> Bench:
    from transformers.utils import logging

    if args.model == BUNDLED:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.model == BUNDLED or not sys.stderr.isatty():
        logging.disable_progress_bar()  # of loading weights
    options = {} if args.dtype is None else {"dtype": args.dtype}
    model, tokenizer, template, foreign, *_ = load_model(args.model, None, options)
    foreign = foreign if args.foreign is None else args.foreign
    methods = [arm.method for arm in parse_arms(args.arms, args.budgets) if arm.method is not None]
    options = {"max_new_tokens": args.max_new_tokens, "instruction": args.instruction, "foreign": foreign}
    return Bench(model, tokenizer, template, measured=Measured.by(*methods), **options)


def _said(gate: Gate) -> str:
    verdict = show.paint("passed", "green") if gate.passed else show.paint("FAILED", "red")
    return f"gate {verdict}: {gate.name}; off by {gate.error:.1e}, at most {gate.limit:.1e} ({gate.note})"


def _progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    return show.progress(items, desc=what, unit="")


def _show(summary: dict[str, Any], upwards: Metric) -> None:
    print(f"\n{show.paint('Against gold and full prefill, and what it costs', 'bold')}\n")
    show.table([_HEAD, *[_row(arm) for arm in _ran(summary)]])
    print(f"\n{show.paint(f'{upwards.label} by kind of question and order of chunks', 'bold')}\n")
    slices = summary["slices"]
    heads = [("arm", *slices), ("cases", *map(str, slices.values()))]
    rows = [
        (arm["name"], *(_mean(arm, name, cases, upwards) for name, cases in slices.items())) for arm in _ran(summary)
    ]
    show.table([*heads, *rows])
    if summary["stopped"]:
        asked = show.number(summary["slices"][ALL], "case")
        print(f"\nstopped after {asked} of {summary['cases']}; the same command goes on from there")
    for why, count in summary["left_out"].items():
        print(f"\nleft out: {show.number(count, 'case')}, {why}")
    for arm in summary["arms"]:
        for why, count in arm["refused"].items():
            print(f"\nrefused by {arm['name']}: {show.number(count, 'prompt')}, {why}")


def _ran(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [arm for arm in summary["arms"] if arm["cost"]]


_HEAD = (
    "arm",
    "n",
    "EM",
    "95 %",
    "F1",
    "perplexity",
    "KL chunks",
    "KL documents",
    "same answer",
    "budget",
    "TTFT",
    "cold",
)


def _row(arm: dict[str, Any]) -> tuple[str, ...]:
    cost, scores = arm["cost"], arm["scores"][ALL]
    return (
        arm["name"],
        str(arm["n"]),
        _mean(arm, ALL, arm["n"], METRICS["em"]),
        f"{100 * scores['em'][1]:.0f}-{100 * scores['em'][2]:.0f}" if "em" in scores else "",
        *[
            _mean(arm, ALL, arm["n"], METRICS[name])
            for name in ("f1", "perplexity", "kl_chunks", "kl_documents", "same_documents")
        ],
        f"{cost['budget']:.1%}",
        f"{cost['ttft_ms']:.1f} ms",
        f"{cost['cold_ms']:.1f} ms" if "cold_ms" in cost else "",
    )


def _mean(arm: dict[str, Any], slice_: str, cases: int, wanted: Metric) -> str:
    held = arm["scores"].get(slice_, {}).get(wanted.name)
    return "" if held is None else wanted.figure(held[0]) + of_fewer(held, cases)
