"""A conversation over the same documents: each turn's time to first token against that of its fresh tokens alone.

    python -P benchmarks/conversation.py [--model NAME_OR_PATH] [--dtype DTYPE] [--turns N] [--tokens N] [--rounds N] [--json FILE]

Turns are asked in a :class:`ragkv.Session`, by full prefill, with 5 passages found for the first question and one for each further.
``limit`` is one forward of as many tokens as the turn has new ones, by the model alone, behind a cache of its own that holds what
was said before; best of three, right after the turn. ``apart`` is how far the turn's logits are from the model's own over the whole
conversation. The same turns are then asked as chat messages, whose KV ``paths=`` keeps: each computes what was said in the turn
before, its passages and its question.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache

from ragkv import RAG, FullPrefill
from ragkv.bundled import documents
from ragkv.evaluation.conditions import processor, versions
from ragkv.model.loading import BUNDLED
from ragkv.testing import as_cache

QUESTIONS = (
    "Where are the offices of Dexvia Labs?",
    "And who leads it?",
    "Which profession did that person have before?",
    "What is the town known for?",
    "On which river does it lie?",
    "Who else lives there?",
)


class First:
    """A logits processor that keeps what the first token is chosen from, and the ids in front of it."""

    ids: torch.Tensor | None = None
    logits: torch.Tensor

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if self.ids is None:
            self.ids, self.logits = ids.clone(), scores.clone()
        return scores


@torch.no_grad()
def limit(model: Any, ids: torch.Tensor, fresh: int) -> tuple[float, torch.Tensor]:
    """Milliseconds that the last ``fresh`` tokens take behind a cache of the others, and the logits ``[1, V]``."""
    times = []
    for _ in range(3):
        cache = DynamicCache()
        if ids.shape[1] > fresh:
            model(input_ids=ids[:, :-fresh], **as_cache(cache), logits_to_keep=1)
        begin = perf_counter()
        logits = model(input_ids=ids[:, -fresh:], **as_cache(cache), logits_to_keep=1).logits[:, -1]
        times.append((perf_counter() - begin) * 1e3)
    return min(times), logits


def turns(rag: RAG, args: argparse.Namespace) -> list[dict[str, float]]:
    """One conversation in a session."""
    rows, session = [], rag.session()
    for number in range(args.turns):
        first = First()
        options = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None, "method": FullPrefill()}
        answer = session.ask(
            QUESTIONS[number % len(QUESTIONS)], top_k=5 if number == 0 else 1, logits_processor=[first], **options
        )
        report = answer.report.fusion
        new = report.tokens["fresh"] + report.tokens["recomputed"]
        assert first.ids is not None
        alone_ms, logits = limit(rag.engine.model, first.ids, new)
        apart = float((logits - first.logits).abs().max())
        rows.append({"new": new, "first_ms": answer.report.first_token_ms, "limit_ms": alone_ms, "apart": apart})
    return rows


def as_messages(rag: RAG, args: argparse.Namespace) -> list[dict[str, float]]:
    """The same as chat messages."""
    rows, said = [], list[dict[str, str]]()
    for number in range(args.turns):
        said.append({"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]})
        options = {"max_new_tokens": args.tokens, "do_sample": False, "eos_token_id": None, "method": FullPrefill()}
        answer = rag.ask(messages=said, top_k=5, order="cache", **options)
        assert rag.engine.paths is not None
        rag.engine.paths.wait()
        said.append({"role": "assistant", "content": answer.text or "-"})
        rows.append({"computed": answer.report.fusion.computed_tokens, "first_ms": answer.report.first_token_ms})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--dtype")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        with RAG.from_pretrained(args.model, paths=1 << 30, **({"dtype": args.dtype} if args.dtype else {})) as rag:
            rag.add_texts(list(documents().values()), list(documents()))
            rounds.append({"session": turns(rag, args), "messages": as_messages(rag, args)})
    for number in range(args.turns):
        mine = [one["session"][number] for one in rounds]
        over = median(row["first_ms"] / row["limit_ms"] for row in mine)
        stateless = [one["messages"][number] for one in rounds]
        print(
            f"turn {number + 1}: {mine[0]['new']:4.0f} new tokens, first token {median(row['first_ms'] for row in mine):7.1f} ms, "
            f"{over:.2f} of the limit, apart {max(row['apart'] for row in mine):.0e}; as messages {stateless[0]['computed']:4.0f} "
            f"computed, {median(row['first_ms'] for row in stateless):7.1f} ms"
        )
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name != "json"}
        conditions = {"processor": processor(), "versions": versions()}
        args.json.write_text(json.dumps({"settings": settings, "rounds": rounds, **conditions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
