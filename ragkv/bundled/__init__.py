"""The model that ragkv ships, with documents, questions and cases of its world (made by ``training/``).

Light to import: torch and transformers are loaded by `load` only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["CASES_PATH", "METHOD", "MODEL_PATH", "TEMPLATE", "documents", "foreign", "load", "questions"]

_HERE = Path(__file__).parent

MODEL_PATH = _HERE / "model"
"""The folder that ``AutoModelForCausalLM.from_pretrained`` takes."""

CASES_PATH = _HERE / "cases.jsonl.bz2"
"""What ``ragkv eval`` asks where no data are given: :func:`ragkv.evaluation.read_cases` reads it."""

TEMPLATE: dict[str, Any] = {
    "prefix": "Read the documents, then answer the question.\n",
    "before_chunk": "",
    "after_chunk": "\n",
    "before_question": "Question:",
    "after_question": "\nAnswer:",
    "after_answer": "\n",
}
"""The arguments of ``ragkv.PromptTemplate`` for this model; the tokenizer's BOS goes before the prefix, once."""

METHOD = "relevant-tokens:keep_document=true"
"""How prompts of this model are put together unless told otherwise: it was trained to know of a passage what its document says."""


def load(**options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Loads the model, in fp32 unless told otherwise and in eval mode, and its tokenizer; needs no network.

    Args:
        **options: of ``from_pretrained``: ``dtype``, ``attn_implementation``, ...
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    options = {"dtype": "float32", **options, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, **options)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)


@dataclass(frozen=True)
class DemoQuestion:
    """A fixed question on the fixed documents.

    Attributes:
        question: The question.
        answer: Its answer.
        kind: What it takes to answer: direct, local, cross, two-hop, absent (docs/bundled-model.md).
        documents: The file names of the documents that it rests on.
    """

    question: str
    answer: str
    kind: str
    documents: tuple[str, ...]


def documents() -> dict[str, str]:
    """The fixed documents: file name to text, in the order of their names; chunks are separated by blank lines."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted((_HERE / "documents").glob("*.md"))}


def foreign() -> str:
    """A text of the model's world, about subjects of its own: ``foreign=`` of an engine, which measures sensitivity with it.

    The library's own is English, of which this model knows nothing.
    """
    return (_HERE / "foreign.txt").read_text(encoding="utf-8")


def questions() -> list[DemoQuestion]:
    """The fixed questions on the fixed documents."""
    rows = json.loads((_HERE / "questions.json").read_text(encoding="utf-8"))
    return [DemoQuestion(r["question"], r["answer"], r["kind"], tuple(r["documents"])) for r in rows]
