"""Training batches: each context is read once, many questions are asked of it.

Shapes: B contexts, C context tokens, M question tokens (several questions one after the other), K tokens of a name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from ragkv.bundled import TEMPLATE
from training.world.generator import Question, questions
from training.world.names import MIXED_NAMES, TRAINING_NAMES
from training.world.writer import Context, Fact, Shape, write_context

NAME_TOKENS = 6
IGNORED = -100


@dataclass
class Batch:
    """What one step reads.

    Attributes:
        context: Ids, ``[B, C]`` int64, padded at the end with 0.
        context_positions: ``[B, C]`` int64.
        length: Tokens of each context, ``[B]`` int64.
        asked: Ids of the questions and answers, ``[B, M]`` int64.
        asked_positions: ``[B, M]`` int64; every question stands right behind the context.
        segment: Number of the question that a token belongs to, ``[B, M]`` int64, -1 for padding.
        target: The next token where it is a token of an answer, else `IGNORED`; ``[B, M]`` int64.
        evidence: Where in the context the next answer token stands, else -1; ``[B, M]`` int64.
        fact: Context positions of the first tokens of values, ``[B, F]`` int64, -1 for padding.
        subject: Ids of the name of each fact's subject, ``[B, F, K]`` int64, `IGNORED` for padding.
    """

    context: Tensor
    context_positions: Tensor
    length: Tensor
    asked: Tensor
    asked_positions: Tensor
    segment: Tensor
    target: Tensor
    evidence: Tensor
    fact: Tensor
    subject: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Encoder:
    """Turns the segments of a prompt into ids the way ``ragkv.PromptTemplate`` does: each on its own, then spliced."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        """Encodes the fixed parts once."""
        self.backend = tokenizer.backend_tokenizer
        self.part = {name: self.ids(text) for name, text in TEMPLATE.items()}
        self.prefix = [tokenizer.bos_token_id, *self.part["prefix"]]
        self.eos = tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids if text else []

    def chunk(self, text: str) -> list[int]:
        """Ids of a chunk with its wrapper."""
        return self.part["before_chunk"] + self.ids(text) + self.part["after_chunk"]

    def question(self, text: str) -> list[int]:
        """Ids of a question with its wrapper."""
        return self.part["before_question"] + self.ids(text) + self.part["after_question"]


@dataclass
class Example:
    """One context in ids.

    Attributes:
        ids: Prefix and chunks.
        positions: A position for each id.
        offsets: For each chunk the characters ``(start, end)`` of each of its text's tokens.
        bases: For each chunk where its text begins in ``ids``.
    """

    ids: list[int]
    positions: list[int]
    offsets: list[list[tuple[int, int]]]
    bases: list[int]

    def place(self, chunk: int, start: int, text: str) -> range:
        """Where in ``ids`` the text stands that begins at character ``start`` of a chunk."""
        end = start + len(text)
        inside = [i for i, (first, last) in enumerate(self.offsets[chunk]) if first < end and last > start]
        return range(self.bases[chunk] + inside[0], self.bases[chunk] + inside[-1] + 1)

    def place_of(self, fact: Fact) -> range:
        """Where a fact's value stands."""
        return self.place(fact.chunk, fact.start, fact.value)


def encode_context(encoder: Encoder, context: Context, rng: random.Random, longest_gap: int) -> Example:
    """Splices prefix and chunks; the positions may jump between documents, up to ``longest_gap`` in all."""
    encoded = encoder.backend.encode_batch(context.chunks, add_special_tokens=False)
    example = Example(list(encoder.prefix), list(range(len(encoder.prefix))), [e.offsets for e in encoded], [])
    starts = [i == 0 or d != context.chunk_documents[i - 1] for i, d in enumerate(context.chunk_documents)]
    gap_total = rng.randint(0, longest_gap) if longest_gap and rng.random() < 0.5 else 0
    for encoding, starts_document in zip(encoded, starts, strict=True):
        gap = rng.randint(0, 2 * gap_total // sum(starts)) if starts_document else 0
        chunk = encoder.part["before_chunk"] + encoding.ids + encoder.part["after_chunk"]
        at = example.positions[-1] + 1 + gap
        example.bases.append(len(example.ids) + len(encoder.part["before_chunk"]))
        example.ids.extend(chunk)
        example.positions.extend(range(at, at + len(chunk)))
    return example


def first_mention(context: Context, example: Example, name: str) -> range:
    """Where in ``example.ids`` a name stands for the first time."""
    number, start = next((number, chunk.find(name)) for number, chunk in enumerate(context.chunks) if name in chunk)
    return example.place(number, start, name)


def _places(question: Question, context: Context, example: Example) -> list[range]:
    """Where the parts of an answer can be copied from: the values, or the first mention of the subject that is first."""
    if question.kind != "order":
        return [example.place_of(fact) for fact in question.facts]
    return [first_mention(context, example, question.answer)]


def _answer_evidence(
    encoder: Encoder, question: Question, context: Context, example: Example
) -> tuple[list[int], list[int]]:
    """Ids of the answer with EOS, and for each the place in the context that it can be copied from, or -1."""
    answer = [*encoder.ids(question.answer), encoder.eos]
    evidence = [-1] * len(answer)
    places = _places(question, context, example)
    ends = (0, len(answer) - 1 - len(places[-1])) if places else ()
    for start, place in zip(ends, places, strict=False):
        # Behind a line break a word's first token is another one.
        if [example.ids[i] for i in place] == answer[start : start + len(place)]:
            evidence[start : start + len(place)] = place
    return answer, evidence


class Row:
    """Questions laid one after the other, as many as fit."""

    def __init__(self, room: int):
        """Starts empty with ``room`` tokens."""
        self.room = room
        self.ids: list[int] = []
        self.offsets: list[int] = []
        self.segment: list[int] = []
        self.target: list[int] = []
        self.evidence: list[int] = []

    def add(self, question: list[int], answer: list[int], evidence: list[int], number: int) -> bool:
        """Adds a question; False, and nothing is added, if it does not fit."""
        ids = question + answer[:-1]
        if len(self.ids) + len(ids) > self.room:
            return False
        quiet = len(question) - 1
        self.ids += ids
        self.offsets += range(len(ids))
        self.segment += [number] * len(ids)
        self.target += [IGNORED] * quiet + answer
        self.evidence += [-1] * quiet + evidence
        return True


def _pad(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row[:width] + [value] * (width - len(row)) for row in rows])


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        steps: How many steps.
        shape: What contexts look like.
        context: Tokens of a context at most; longer ones are drawn again.
        asked: Tokens of its questions.
        batch: Contexts a step.
        longest_gap: How far the positions may jump in all; the text behind a jump is read as if much lay between.
        fewest: Tokens of a context at least; shorter ones, which are mostly padding, are drawn again.
        rate: Factor of the learning rates at the stage's first step and at its last, linear between.
        helper: Factor of the helpers' weight, likewise.
        mixed: Share of the contexts whose names are any head with any tail; the others use the names of training.
        orders: Pairs asked for *order*, twice a context.
        absents: Questions of *absent*, twice a context.
        twice: Kinds that come twice when the kinds take turns.
        near: Share of the pairs for *order* that are mentioned one right after the other.
    """

    steps: int
    shape: Shape
    context: int
    asked: int
    batch: int
    longest_gap: int = 0
    fewest: int = 0
    rate: tuple[float, float] = (1.0, 1.0)
    helper: tuple[float, float] = (1.0, 1.0)
    mixed: float = 0.0
    orders: int = 3
    absents: int = 2
    twice: tuple[str, ...] = ()
    near: float = 0.0


class Source(IterableDataset):
    """Endless batches of a stage; each worker of a loader has a seed of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int):
        """Nothing is made before it is iterated over."""
        self.encoder, self.stage, self.seed = Encoder(tokenizer), stage, seed

    def __iter__(self) -> Iterator[Batch]:
        """Batches, the same for the same seed and worker."""
        worker = get_worker_info()
        rng = random.Random(self.seed if worker is None else f"{self.seed}/{worker.id}")
        while True:
            drawn = [_draw(self.encoder, self.stage, rng) for _ in range(self.stage.batch)]
            yield _batch(drawn, self.encoder, self.stage, rng)


def _same(batch: Batch) -> Batch:
    return batch


def batches(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int, workers: int = 0) -> Iterator[Batch]:
    """Endless batches of a stage, the same for the same seed and number of worker processes (0: made here)."""
    source = Source(tokenizer, stage, seed)
    if workers == 0:
        return iter(source)
    return iter(DataLoader(source, batch_size=None, collate_fn=_same, num_workers=workers, prefetch_factor=4))


def _draw(encoder: Encoder, stage: Stage, rng: random.Random) -> tuple[Context, Example]:
    while True:
        names = MIXED_NAMES if stage.mixed and rng.random() < stage.mixed else TRAINING_NAMES
        context = write_context(rng, stage.shape, names)
        example = encode_context(encoder, context, rng, stage.longest_gap)
        if stage.fewest <= len(example.ids) <= stage.context and context.facts:
            return context, example


def _spread(found: list[Question], twice: tuple[str, ...]) -> list[Question]:
    """Questions with the kinds in turn, so that rare kinds are not left out where room is short."""
    by_kind: dict[tuple[str, int], list[Question]] = {}
    for number, question in enumerate(found):
        half = number % 2 if question.kind in twice else 0
        by_kind.setdefault((question.kind, half), []).append(question)
    longest = max(map(len, by_kind.values()), default=0)
    return [group[i] for i in range(longest) for group in by_kind.values() if i < len(group)]


def _batch(drawn: list[tuple[Context, Example]], encoder: Encoder, stage: Stage, rng: random.Random) -> Batch:
    rows = []
    for context, example in drawn:
        row = Row(stage.asked)
        asked: list[Question] = []
        for _ in range(2):  # the second time in other words, with other pairs and absentees, where there is room left
            asked += questions(rng, context, orders=stage.orders, absents=stage.absents, near=stage.near)
        for number, question in enumerate(_spread(asked, stage.twice)):
            answer, evidence = _answer_evidence(encoder, question, context, example)
            row.add(encoder.question(question.text), answer, evidence, number)
        rows.append(row)
    examples = [example for _, example in drawn]
    ends = [example.positions[-1] + 1 for example in examples]
    most = 32
    facts: list[list[Fact]] = [context.facts[:most] for context, _ in drawn]
    names = [[_pad([encoder.ids(f.subject.name)], NAME_TOKENS, IGNORED)[0] for f in row] for row in facts]
    blank = torch.full((NAME_TOKENS,), IGNORED)
    # Rounded, so that a compiled model meets few shapes.
    width = min(stage.context, -(-max(len(e.ids) for e in examples) // 128) * 128)
    return Batch(
        context=_pad([e.ids for e in examples], width, 0),
        context_positions=_pad([e.positions for e in examples], width, 0),
        length=torch.tensor([len(e.ids) for e in examples]),
        asked=_pad([r.ids for r in rows], stage.asked, 0),
        asked_positions=_pad([[end + o for o in r.offsets] for r, end in zip(rows, ends, strict=True)], stage.asked, 0),
        segment=_pad([r.segment for r in rows], stage.asked, -1),
        target=_pad([r.target for r in rows], stage.asked, IGNORED),
        evidence=_pad([r.evidence for r in rows], stage.asked, -1),
        fact=_pad([[e.place_of(f)[0] for f in row] for row, e in zip(facts, examples, strict=True)], most, -1),
        subject=torch.stack([torch.stack(row + [blank] * (most - len(row))) for row in names]),
    )
