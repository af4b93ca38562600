"""Writes the fixed documents and questions of the demo, and the bundled foreign text: `python -m training.documents`.

The same ones every time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import ragkv.bundled
from training.world.generator import Question, questions
from training.world.names import HELDOUT_NAMES, TRAINING_NAMES
from training.world.writer import Context, Shape, write_context

HOME = Path(ragkv.bundled.__file__).parent
SHAPE = Shape(documents=(36, 36), chunks=(2, 3), words=(36, 80), facts=(2, 2), types=(3, 3), notes=0.0)
FOREIGN = Shape(documents=(6, 6), chunks=(1, 1), words=(24, 40), facts=(2, 3), types=(3, 3), notes=0.5)
ASKED = {"direct": 7, "local": 6, "cross": 9, "two-hop": 6, "absent": 2}


def file_name(subject: str) -> str:
    """The file of the document on a subject."""
    return subject.lower().replace(" ", "-") + ".md"


def texts(context: Context) -> dict[str, str]:
    """File name to text; a blank line between chunks."""
    chunks: dict[int, list[str]] = {}
    for chunk, number in zip(context.chunks, context.chunk_documents, strict=True):
        chunks.setdefault(number, []).append(chunk.replace("\n", " "))
    return {file_name(e.name): "\n\n".join(chunks[i]) + "\n" for i, e in enumerate(context.entities)}


def row(question: Question) -> dict[str, str | list[str]]:
    """A question as it stands in the file."""
    files = list(dict.fromkeys(file_name(fact.subject.name) for fact in question.facts))
    return {"question": question.text, "answer": question.answer, "kind": question.kind, "documents": files}


def choose(found: list[Question]) -> list[Question]:
    """The first questions of each kind, no two with the same answer, the kinds mixed."""
    chosen: list[Question] = []
    for kind, count in ASKED.items():
        answers = {question.answer for question in chosen}
        fresh = {q.answer: q for q in found if q.kind == kind and (kind == "absent" or q.answer not in answers)}
        pool = [q for q in found if q.kind == kind] if kind == "absent" else list(fresh.values())
        chosen += pool[:count]
    random.Random(0).shuffle(chosen)
    return chosen


def main() -> None:
    """Reads the arguments and writes ``documents/*.md``, ``questions.json`` and ``foreign.txt``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HOME)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    context = write_context(rng, SHAPE, HELDOUT_NAMES)
    shutil.rmtree(args.out / "documents", ignore_errors=True)
    (args.out / "documents").mkdir(parents=True)
    for name, text in texts(context).items():
        (args.out / "documents" / name).write_text(text, encoding="utf-8")
    rows = [row(question) for question in choose(questions(rng, context, HELDOUT_NAMES))]
    (args.out / "questions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    foreign = write_context(random.Random(f"foreign/{args.seed}"), FOREIGN, TRAINING_NAMES)
    (args.out / "foreign.txt").write_text("\n".join(foreign.chunks) + "\n", encoding="utf-8")
    print(f"wrote {len(context.entities)} documents and {len(rows)} questions")


if __name__ == "__main__":
    main()
