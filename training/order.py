"""Where *order* fails: `python -m training.order`. One full prefill of each context, held-out names, six documents.

Two things are looked at: how many tokens lie between the first mentions of the two subjects, and whether the first half
of the later one's name (its head, which other names may share) stands in front of the earlier one.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkv.bundled import MODEL_PATH
from training.data import Encoder, encode_context, first_mention
from training.evaluate import context_kv, right
from training.world.generator import Question, questions
from training.world.names import HELDOUT_NAMES
from training.world.writer import Context, Shape, write_context

BOUNDS = (0, 50, 100, 200, 400)


@dataclass(frozen=True)
class Asked:
    """What a question of *order* is like, and whether it was answered.

    Attributes:
        apart: Tokens between the first mentions of the two subjects.
        misled: The head of the later one's name stands in front of the earlier one, in a third name.
        good: The answer is right.
    """

    apart: int
    misled: bool
    good: bool


def described(question: Question, context: Context, encoder: Encoder, good: bool) -> Asked:
    """Looks up where the two subjects of a question stand."""
    example = encode_context(encoder, context, random.Random(0), longest_gap=0)
    later = next(e.name for e in context.entities if e.name in question.text and e.name != question.answer)
    at, other = (first_mention(context, example, name)[0] for name in (question.answer, later))
    return Asked(other - at, encoder.ids(later)[0] in example.ids[:at], good)


def ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int, documents: int, seed: int) -> list[Asked]:
    """Asks ``n`` questions, up to 15 of a context."""
    encoder, rng = Encoder(tokenizer), random.Random(f"order/{seed}")
    asked: list[Asked] = []
    with torch.inference_mode(), tqdm(total=n, mininterval=5) as bar:
        while len(asked) < n:
            context = write_context(rng, Shape(documents=(documents, documents)), HELDOUT_NAMES)
            found = [q for q in questions(rng, context, HELDOUT_NAMES, orders=15) if q.kind == "order"]
            found = found[: n - len(asked)]
            if not found:
                continue
            results = right(model, encoder, context_kv(model, encoder, context, "full"), found)
            asked += [described(q, context, encoder, good) for q, good in zip(found, results, strict=True)]
            bar.update(len(found))
    return asked


def table(asked: list[Asked]) -> str:
    """Exact match by distance and by misleading head, as a Markdown table."""
    groups: dict[str, list[Asked]] = {}
    for low, high in pairwise((*BOUNDS, inf)):
        name = f"{low} tokens apart or more" if high == inf else f"{low} to {high - 1} tokens apart"
        groups[name] = [a for a in asked if low <= a.apart < high]
    groups["the later name's head stands before"] = [a for a in asked if a.misled]
    groups["it does not"] = [a for a in asked if not a.misled]
    groups["all"] = asked
    lines = ["| *order* | n | exact match, % |", "|---|---|---|"]
    for name, group in groups.items():
        match = f"{100 * sum(a.good for a in group) / len(group):.1f} " if group else ""
        lines.append(f"| {name} | {len(group)} | {match}|")
    return "\n".join(lines)


def main() -> None:
    """Reads the arguments, asks, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH, help="a folder that transformers loads")
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    begun = time.monotonic()
    print(table(ask(model, tokenizer, args.n, args.documents, args.seed)))
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
