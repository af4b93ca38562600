"""The study of quality on real questions: `ragkv eval` on several sets of data, the most telling first, and its tables.

    python -P benchmarks/study.py --model PATH --data FOLDER [--out FOLDER] [--dtype float32] [--time-limit S] [--sets NAME ...]
    python -P benchmarks/study.py --tables [--out FOLDER ...] [--json FILE]

DATA holds `hotpotqa_dev*`, `2wikimultihopqa_dev*`, `musique_dev*`, `xquad.en*` and `unnamed*` (made by benchmarks/unnamed.py);
sets that are not there are left out. Stop and start it at will: it goes on where it was, and `--tables` sums up what there is,
also while it runs; sets that are read both in documents and alone are also summed up together, and so are several folders (of
several models). A set is asked in stages: KL of all methods at equal charges for 10 cases, answers and KL of the main arms for
20, then for all cases, at last KL at equal charges for 40.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any

from ragkv.evaluation.statistics import Estimate, Resampling, difference
from ragkv.evaluation.summary import documents_of

#: Sets, the first to be asked first: what their file's name begins with, and how they are asked. Where every document is one
#: chunk, one context is both.
SETS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "hotpotqa": ("hotpotqa_dev", [], ("document",)),
    "xquad": ("xquad.en", ["--retrieve", "5"], ("document", "alone")),
    "unnamed": ("unnamed", [], ("document", "alone")),
    "musique": ("musique_dev", [], ("document",)),
    "2wiki": ("2wikimultihopqa_dev", [], ("document",)),
}
DEFAULT = "relevant-tokens:ratio=0.1"
MAIN = [
    "reuse",
    DEFAULT,
    "sensitive-tokens:ratio=0.1",
    "lego-link:k=16",
    "cache-blend:ratio=0.15,check_layer=1",
    "question-aware:ratio=0.1",
]
#: Every method at charges of about 5, 10, 15 and 20 %: `cache-blend` computes its first two layers whole, and starts at 10 %.
EQUAL = [
    "reuse",
    *[
        f"{method}:ratio={ratio}"
        for method in ("relevant-tokens", "sensitive-tokens", "question-aware", "random")
        for ratio in (0.05, 0.1, 0.15, 0.2)
    ],
    *[f"lego-link:k={k}" for k in (6, 13, 19, 26)],
    *[f"cache-blend:ratio={ratio},check_layer=1" for ratio in (0.018, 0.073, 0.127)],
]
#: Of documents that were read behind the passages nearest to them, which takes as long as all else: not asked with the main arms.
NEAR = ["reuse", DEFAULT, "relevant-tokens:ratio=0.05", "sensitive-tokens:ratio=0.1"]
FULL = ["full-prefill", "full-documents"]
#: Folder, cases, methods, tokens of an answer.
STAGES = [("kl", 10, EQUAL, 0), ("answers", 20, MAIN, 24), ("answers", 10_000, MAIN, 24), ("kl", 40, EQUAL, 0)]
#: Asks for what LongBench asks for; here so that sets of ragkv's own form are asked alike.
INSTRUCTION = "Only give me the answer and do not output any other words."


def run(args: argparse.Namespace) -> None:
    """All stages of all sets, one stage after the other."""
    end = monotonic() + args.time_limit if args.time_limit else None
    for folder, limit, words, tokens in STAGES:
        for name, path in found(args.data, args.sets):
            _, how, contexts = SETS[name]
            near = NEAR if words is EQUAL and len(contexts) == 1 else []
            arms = [*FULL, *[f"{word}@{context}" for word in words for context in contexts]]
            arms += [f"{word}@neighbours" for word in near]
            arms += [f"{DEFAULT},keep_document=true@document"] if len(contexts) > 1 else []
            command = [
                "eval",
                "--model",
                args.model,
                "--data",
                str(path),
                "--out",
                str(args.out[0] / f"{name}-{folder}"),
            ]
            command += ["--limit", str(limit), *how, "--arms", *arms, "--instruction", INSTRUCTION]
            command += ["--budgets", "0.1", "--orders", "1", "--timed", "0", "--jobs", str(args.jobs)]
            command += ["--max-new-tokens", str(tokens)]
            command += ["--dtype", args.dtype] if args.dtype else []
            if end is not None:
                left = int(end - monotonic())
                if left < 1:
                    return
                command += ["--time-limit", str(left)]
            print(f"\n{name}: {folder}, {limit} cases", flush=True)
            subprocess.run([sys.executable, "-P", "-m", "ragkv.cli", *command], check=True)


def found(data: Path, sets: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """The sets whose files are there."""
    for name, (beginning, _, _) in SETS.items():
        paths = sorted(data.glob(f"{beginning}*")) if name in (sets or SETS) else []
        if paths:
            yield name, paths[0]


def runs(outs: Sequence[Path]) -> dict[str, list[Path]]:
    """Folders with rows by what is summed up: each set, and those that are read in both contexts together."""
    found: dict[str, list[Path]] = defaultdict(list)
    for name, kind, out in product(SETS, ("kl", "answers"), outs):
        if (out / f"{name}-{kind}" / "rows.jsonl").exists():
            found[f"{name}-{kind}"].append(out / f"{name}-{kind}")
    for kind in ("kl", "answers"):
        both = [f"{name}-{kind}" for name, (_, _, contexts) in SETS.items() if len(contexts) > 1]
        if all(name in found for name in both):
            found[f"both contexts-{kind}"] = [folder for name in both for folder in found[name]]
    return dict(found)


def summed(*folders: Path) -> dict[str, Any]:
    """What the rows of one or more runs say so far, of each arm over the cases that it was asked."""
    rows = [row for folder in folders for row in read_rows(folder)]
    by_arm: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["case"]] = row
    cases = list(dict.fromkeys(row["case"] for row in rows))
    resampling = Resampling(cases, seed=0, documents=documents_of(rows))

    def values(arm: str, metric: str) -> dict[str, list[float]]:
        return {case: [row[metric]] for case, row in by_arm[arm].items() if metric in row}

    result = {}
    metrics = ("kl_chunks", "kl_documents", "top1_chunks", "gold_nll", "f1", "em", "contained", "budget")
    for arm in sorted(by_arm):
        result[arm] = {metric: e for metric in metrics if (e := resampling.estimate(values(arm, metric))) is not None}
        # by the same method; alone, every chunk's own document stands in front of it
        alone = arm.replace(",keep_document=true", "").replace("@document", "@alone")
        for metric in ("kl_chunks", "f1"):
            for what, other in (("default", f"{DEFAULT}@document"), ("full", FULL[0]), ("alone", alone)):
                if other in by_arm and other != arm:
                    less = resampling.estimate(difference(values(arm, metric), values(other, metric)))
                    if less is not None:
                        result[arm][f"{metric} less {what}"] = less
    settings = [json.loads((folder / "settings.json").read_text(encoding="utf-8")) for folder in folders]
    about = {name: settings[0][name] for name in ("data", "instruction", "max_new_tokens", "device", "versions")}
    about["data"] = ", ".join(dict.fromkeys(one["data"] for one in settings))
    ran = [(arm, figures) for arm, figures in result.items() if "budget" in figures]  # others were refused by the model
    return {"about": about, "cases": len(cases), "arms": dict(sorted(ran, key=lambda arm: arm[1]["budget"]))}


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """A run's rows so far; cases of another run are others, even of the same questions."""
    data = (folder / "rows.jsonl").read_bytes()
    rows = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]  # the last may be half written
    return [row | {"case": f"{folder}/{row['case']}"} for row in rows]


def figure(held: Estimate | Sequence[float] | None, scale: float, digits: int, sign: str = "") -> str:
    """An estimate with its interval."""
    if held is None:
        return ""
    mean, low, high = (f"{scale * value:{sign}.{digits}f}" for value in held[:3])
    return f"{mean} ({low} to {high})"


def table(name: str, held: dict[str, Any]) -> str:
    """One run as Markdown."""
    compared = ["KL to the chunks' full prefill", "less or more than the default", "KL to the documents'", "top-1"]
    answered = ["F1", "less or more than `full-prefill`", "than the default", "than alone", "EM", "contained"]
    answered = answered if held["about"]["max_new_tokens"] else []
    heads = ["arm", "n", "charged", *compared, *answered]
    lines = [f"{name}, {held['cases']} cases", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for arm, figures in held["arms"].items():
        get = figures.get
        cells = [
            figure(get("kl_chunks"), 1, 3),
            figure(get("kl_chunks less default"), 1, 3, "+"),
            figure(get("kl_documents"), 1, 3),
            share(get("top1_chunks")),
        ]
        if answered:
            cells += [figure(get("f1"), 100, 1)]
            cells += [figure(get(f"f1 less {what}"), 100, 1, "+") for what in ("full", "default", "alone")]
            cells += [share(get("em")), share(get("contained"))]
        charged: Estimate = figures["budget"]
        lines.append(f"| `{arm}` | {charged[3]} | {100 * charged[0]:.1f}% | {' | '.join(cells)} |")
    return "\n".join(lines)


def share(held: Estimate | None) -> str:
    """A mean in per cent."""
    return "" if held is None else f"{100 * held[0]:.0f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quality on real questions.")
    parser.add_argument("--model", help="name or path of a transformers decoder with a chat template")
    parser.add_argument("--data", type=Path, help="a folder")
    parser.add_argument(
        "--out", type=Path, nargs="+", default=[Path("build/study")], help="rows and reports (default: build/study)"
    )
    parser.add_argument("--dtype", help="as for ragkv eval")
    parser.add_argument("--jobs", type=int, default=1, help="as for ragkv eval")
    parser.add_argument("--time-limit", type=int, metavar="S", help="seconds after which it stops")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[], help="only these")
    parser.add_argument("--tables", action="store_true", help="print tables of what there is, and run nothing")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="with --tables: write the figures here, beside those of other sets"
    )
    args = parser.parse_args(argv)
    if not args.tables:
        if args.model is None or args.data is None or len(args.out) > 1:
            parser.error("give --model, --data and one --out, or --tables")
        run(args)
        return
    results = {name: summed(*folders) for name, folders in runs(args.out).items()}
    for name, held in results.items():
        print(table(name, held), end="\n\n")
    if args.json:
        before = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        args.json.write_text(json.dumps(before | results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
