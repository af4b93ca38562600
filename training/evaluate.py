"""Accuracy of the bundled model by kind of question and by how the context's KV came to be: `python -m training.evaluate`.

Arms: ``full`` (one prefill of the prompt), ``chunk`` (each chunk prefilled behind the prefix alone, keys rotated to
their places), ``chunk, not rotated``, ``document`` (each document prefilled behind the prefix, rotated), ``none`` (no
context). Nothing is recomputed. An answer counts if greedy decoding gives it exactly, end of text included.

Shapes: L layers, G kv heads, T tokens, D head_dim.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from ragkv.bundled import MODEL_PATH
from ragkv.testing import as_cache
from training.data import Encoder
from training.train import RESULTS
from training.world.generator import Question, possible_kinds, questions
from training.world.names import HELDOUT_NAMES, TRAINING_NAMES, Names
from training.world.writer import Context, Shape, write_context

ARMS = ("full", "chunk", "chunk, not rotated", "document", "none")
KV = list[tuple[Tensor, Tensor]]


def prefill(model: LlamaForCausalLM, ids: list[int], positions: Tensor | None = None) -> KV:
    """Keys and values ``[1, G, T, D]`` of every layer, at ``positions`` ``[1, T]`` or from 0 on."""
    cache = DynamicCache()
    model.model(torch.tensor([ids]), **as_cache(cache), position_ids=positions, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def rotate(keys: Tensor, by: int, inv_freq: Tensor) -> Tensor:
    """Keys as if they stood ``by`` positions later."""
    angle = torch.cat((inv_freq, inv_freq)) * by
    half = keys.shape[-1] // 2
    return keys * angle.cos() + torch.cat((-keys[..., half:], keys[..., :half]), -1) * angle.sin()


def reused(model: LlamaForCausalLM, prefix: list[int], pieces: list[list[int]], rotated: bool, gap: int) -> KV:
    """The KV of prefix and pieces, each piece prefilled behind the prefix and put in its place."""
    inv_freq, at = model.model.rotary_emb.inv_freq, len(prefix) + gap
    parts = [prefill(model, prefix)]
    for piece in pieces:
        kv = [(k[:, :, len(prefix) :], v[:, :, len(prefix) :]) for k, v in prefill(model, prefix + piece)]
        shift = at - len(prefix)
        parts.append([(rotate(k, shift, inv_freq), v) for k, v in kv] if rotated else kv)
        at += len(piece)
    return [tuple(torch.cat(tensors, 2) for tensors in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)]


def context_kv(model: LlamaForCausalLM, encoder: Encoder, context: Context, arm: str, gap: int = 0) -> KV:
    """The KV of prefix and context in one of `ARMS`; ``gap`` positions between them stay empty."""
    chunks = [encoder.chunk(text) for text in context.chunks]
    if arm == "none":
        return prefill(model, encoder.prefix)
    if arm == "full":
        ids = encoder.prefix + [token for chunk in chunks for token in chunk]
        positions = torch.arange(len(ids))
        positions[len(encoder.prefix) :] += gap
        return prefill(model, ids, positions[None])
    if arm == "document":
        numbers = sorted(set(context.chunk_documents))
        owned = zip(chunks, context.chunk_documents, strict=True)
        pieces: dict[int, list[int]] = {number: [] for number in numbers}
        for chunk, number in owned:
            pieces[number] += chunk
        return reused(model, encoder.prefix, list(pieces.values()), rotated=True, gap=gap)
    return reused(model, encoder.prefix, chunks, rotated=arm == "chunk", gap=gap)


def right(model: LlamaForCausalLM, encoder: Encoder, kv: KV, asked: list[Question], gap: int = 0) -> list[bool]:
    """Whether greedy decoding behind ``kv`` gives each answer and then EOS (by teacher forcing, which is the same)."""
    heads = [encoder.question(question.text) for question in asked]
    answers = [[*encoder.ids(question.answer), encoder.eos] for question in asked]
    rows = [head + answer[:-1] for head, answer in zip(heads, answers, strict=True)]
    width, past = max(map(len, rows)), kv[0][0].shape[2]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    cache = DynamicCache()
    for index, (k, v) in enumerate(kv):
        cache.update(k.expand(len(asked), -1, -1, -1), v.expand(len(asked), -1, -1, -1), index)
    # Padding stands at the end, where causality already hides it.
    positions = torch.arange(past + gap, past + gap + width).expand(len(asked), -1)
    best = model(ids, **as_cache(cache), position_ids=positions).logits.argmax(-1).tolist()
    return [
        row[len(head) - 1 : len(head) - 1 + len(answer)] == answer
        for row, head, answer in zip(best, heads, answers, strict=True)
    ]


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    shape: Shape,
    n: int,
    seed: int,
    names: Names,
    arms: tuple[str, ...] = ARMS,
    longest: int = 4000,
    gap: int = 0,
) -> dict[str, dict[str, tuple[int, int]]]:
    """Asks at least ``n`` questions of every kind over fresh contexts, in every arm the same.

    Returns:
        For each kind and arm: right answers and questions.
    """
    encoder, rng, kinds = Encoder(tokenizer), random.Random(f"evaluate/{seed}"), possible_kinds(shape.documents[1])
    count: dict[str, dict[str, list[int]]] = {kind: {arm: [0, 0] for arm in arms} for kind in kinds}
    lengths: list[int] = []
    with torch.inference_mode(), tqdm(total=n * len(kinds), mininterval=5) as bar:
        while any(count[kind][arms[0]][1] < n for kind in kinds):
            context = write_context(rng, shape, names)
            wanted = [q for q in questions(rng, context, names) if q.kind in kinds and count[q.kind][arms[0]][1] < n]
            lengths.append(sum(len(encoder.chunk(text)) for text in context.chunks))
            if not wanted or lengths[-1] > longest:
                continue
            for arm in arms:
                results = right(model, encoder, context_kv(model, encoder, context, arm, gap), wanted, gap)
                for question, good in zip(wanted, results, strict=True):
                    count[question.kind][arm][0] += good
                    count[question.kind][arm][1] += 1
            bar.update(len(wanted))
    print(f"{len(lengths)} contexts, {sum(lengths) / len(lengths):.0f} tokens on average")
    return {kind: {arm: (good, all_) for arm, (good, all_) in row.items()} for kind, row in count.items()}


def table(results: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The results as a Markdown table, in per cent."""
    arms = list(next(iter(results.values())))
    lines = ["| kind | n | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in results.values():
        for arm, (good, n) in row.items():
            totals[arm][0] += good
            totals[arm][1] += n
    for kind, row in [*results.items(), ("all", totals)]:
        cells = [f"{100 * good / n:.1f}" if n else "" for good, n in row.values()]
        lines.append(f"| {kind} | {next(iter(row.values()))[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Reads the arguments, evaluates, prints the table and keeps the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH, help="a folder that transformers loads")
    parser.add_argument("--n", type=int, default=300, help="questions of each kind, at least")
    parser.add_argument("--documents", type=int, nargs=2, default=(6, 6), metavar=("FEWEST", "MOST"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trained-names", action="store_true", help="use the names of training, not the held-out ones")
    parser.add_argument("--gap", type=int, default=0, help="positions left empty between prefix and context")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy.json")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    begun = time.monotonic()
    shape = Shape(documents=tuple(args.documents))
    names = TRAINING_NAMES if args.trained_names else HELDOUT_NAMES
    results = evaluate(model, tokenizer, shape, args.n, args.seed, names, tuple(args.arms), gap=args.gap)
    print(table(results))
    print(f"{time.monotonic() - begun:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
