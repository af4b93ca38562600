"""What documents are read behind, and how near fused prompts come then: nothing, an example in the prompt, a neutral text.

    python -P benchmarks/fronts.py --model PATH --data FILE [--dtype bfloat16] [--cases 40] [--json FILE]

`plain` is the default template: documents are read behind its one line of instruction. `example` has passages, a question and its
answer in front of the prompt's own passages, so that documents are read, and stand, behind passages. `neutral` leaves the prompt as
it is, and documents are read behind another text (`PromptTemplate.anchor`). KL of the first token to each prompt's own full
prefill in nats, F1 of greedy answers; what is left out does not fit into the model's positions. Stop it when you like: it says
what there is.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ragkv import PromptTemplate
from ragkv.closeness import divergence
from ragkv.evaluation import Bench, read_cases
from ragkv.evaluation.cases import Case, usable
from ragkv.evaluation.formats import brief
from ragkv.evaluation.metrics import f1
from ragkv.evaluation.statistics import Resampling, difference
from ragkv.library.sensitivity import FOREIGN
from ragkv.machine import machine
from ragkv.methods.words import as_method
from ragkv.model.loading import load_model

FULL = "full-prefill"
METHODS = (FULL, "reuse", "sensitive-tokens:ratio=0.1", "relevant-tokens:ratio=0.05", "relevant-tokens:ratio=0.1")
EXAMPLE = """Answer the question with the help of these passages. Here is an example.

The Aire is a river in the north of England. It rises at Malham and flows through Leeds.

Malham is a village in Yorkshire with some 150 people. It is known for its limestone cliff, which many visit in May.

Carla Stein is a chemist and lives in Hull. She was born in Ghent in 1961 and wrote her first book in 1984.

Question: In which county does the river rise that flows through Leeds?
Answer: It rises at Malham, which is in Yorkshire.

Now the passages for the question that you are to answer."""

Row = dict[str, float]


def fronts(tokenizer: PreTrainedTokenizerBase) -> dict[str, PromptTemplate]:
    """Templates by what stands in front."""
    plain = PromptTemplate.default(tokenizer)
    if getattr(tokenizer, "chat_template", None):
        example = PromptTemplate.from_chat_template(tokenizer, instruction=EXAMPLE)
    else:
        example = replace(plain, prefix=f"{EXAMPLE}\n\n")
    return {
        "plain": plain,
        "example": example,
        "neutral": replace(plain, anchor=f"{plain.prefix}{FOREIGN}{plain.after_chunk}"),
    }


def asked(bench: Bench, case: Case) -> Row:
    """KL and F1 of each method."""
    reading = bench.read(case, ("document",))
    chunks = reading.at(case.retrieved, "document")
    prompts = [bench.fuse(chunks, case, as_method(word)) for word in METHODS]
    whole = prompts[0][0].logits.clone()
    row = {f"kl {word}": divergence(whole, prompt.logits) for word, (prompt, _) in zip(METHODS, prompts, strict=True)}
    if bench.max_new_tokens:
        said = bench.answers(prompts, case)
        row |= {
            f"f1 {word}": f1(outcome.text, case.answers, case.language)
            for word, outcome in zip(METHODS, said, strict=True)
        }
    bench.release(reading)
    return row


def summed(rows: dict[str, dict[str, Row]], documents: dict[str, str]) -> dict[str, Any]:
    """Means with 95 % intervals, and what each front has more than `plain`."""
    resampling = Resampling(list(rows), seed=0, documents=documents)

    def values(front: str, name: str) -> dict[str, list[float]]:
        return {case: [row[front][name]] for case, row in rows.items()}

    figures: dict[str, Any] = {}
    first = next(iter(rows.values()), {})
    for front, names in first.items():
        for name in names:
            figures[f"{front} {name}"] = {"mean": resampling.estimate(values(front, name))}
            others = {"more than plain": ("plain", name)}
            if name.startswith("f1"):
                others["more than full"] = (front, f"f1 {FULL}")
            for what, other in others.items():
                if other != (front, name):
                    more = difference(values(front, name), values(*other))
                    figures[f"{front} {name}"][what] = resampling.estimate(more)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="How near fused prompts come, by what documents are read behind.")
    parser.add_argument("--model", required=True, help="name or path of a transformers decoder")
    parser.add_argument("--data", type=Path, required=True, help="as for ragkv eval")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=24, help="of an answer; with 0 nothing is answered")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    model, tokenizer, _, foreign, *_ = load_model(args.model, None, {"dtype": args.dtype})
    form, cases = read_cases(args.data, limit=args.cases)
    asking = {"max_new_tokens": args.max_new_tokens, "instruction": brief(form, cases), "foreign": foreign}
    benches = {name: Bench(model, tokenizer, template, **asking) for name, template in fronts(tokenizer).items()}
    fit = [case for case in usable(cases)[0] if not any(bench.unfit(case) for bench in benches.values())]
    rows: dict[str, dict[str, Row]] = {}
    try:
        for case in fit[: args.cases]:
            rows[case.id] = {name: asked(bench, case) for name, bench in benches.items()}
            print(f"{len(rows)}: {case.id}", flush=True)
    except KeyboardInterrupt:
        print("stopped")
    figures = summed(rows, {case.id: case.about for case in fit if case.about})
    for name, figure in figures.items():
        print(name, {what: [round(number, 3) for number in said[:3]] for what, said in figure.items()})
    if args.json:
        about: dict[str, Any] = {"model": Path(args.model).name, "data": args.data.name, "dtype": args.dtype}
        about["machine"] = machine(model.device)
        args.json.write_text(json.dumps({**about, "cases": len(rows), "arms": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
