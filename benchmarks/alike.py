"""The demo's questions over documents of one kind, by several methods: how many are answered right.

    python -P benchmarks/alike.py --model PATH [--dtype bfloat16] [--behind 2 | --anchor 2] [--methods reuse ...]

36 documents say the same kind of things of other names, and six of them stand in a prompt: what is said of one is easily taken for
another's. An answer is right where it holds the expected one. Documents are read behind so many neighbours (`--behind`), or all
behind the same few documents (`--anchor`).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from time import perf_counter

from transformers import AutoTokenizer

import ragkv
from ragkv import bundled
from ragkv.evaluation.metrics import contains
from ragkv.methods.words import as_method

METHODS = (
    "reuse",
    "sensitive-tokens:ratio=0.1",
    "relevant-tokens:ratio=0.1",
    "relevant-tokens:ratio=0.3",
    "full-prefill",
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers over documents of one kind.")
    parser.add_argument("--model", required=True, help="name or path of a transformers decoder with a chat template")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--behind", type=int, default=0, help="neighbours that each document is read behind")
    parser.add_argument(
        "--anchor", type=int, default=0, help="documents, always the same, that each one is read behind"
    )
    parser.add_argument("--passages", type=int, default=6, help="in each prompt")
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    documents, questions = bundled.documents(), bundled.questions()[: args.questions]
    template = ragkv.PromptTemplate.default(AutoTokenizer.from_pretrained(args.model))
    if args.anchor:
        front = "\n\n".join(list(documents.values())[-args.anchor :])
        template = replace(template, anchor=f"{template.prefix}{front}\n\n")
    with ragkv.RAG.from_pretrained(args.model, dtype=args.dtype, template=template, behind=args.behind) as rag:
        begin = perf_counter()
        rag.add_texts(list(documents.values()), list(documents))
        where = f"the same {args.anchor}" if args.anchor else f"{args.behind} neighbours"
        print(f"{len(documents)} documents, behind {where}, read in {perf_counter() - begin:.1f} s", flush=True)
        for word in args.methods:
            method, right, begin = as_method(word), 0, perf_counter()
            for question in questions:
                answer = rag.ask(question.question, method=method, max_new_tokens=24, top_k=args.passages)
                right += bool(contains(answer.text, [question.answer]))
            each_s = (perf_counter() - begin) / len(questions)
            print(f"{word}: {right} of {len(questions)} right, {each_s:.2f} s each", flush=True)


if __name__ == "__main__":
    main()
