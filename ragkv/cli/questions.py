"""A file of questions, and the file of their answers, which a stopped run goes on with: JSON objects, one a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkv.cli.searching import condition
from ragkv.errors import RagKVError

#: So many bad lines are named.
_NAMED = 5
#: What a line of answers begins with, by which one that was cut short is known.
_BEGINS = b'{"id": '


@dataclass(frozen=True)
class Question:
    """One line of a file of questions.

    Attributes:
        id: unique in the file; by default the number of its line.
        text: what is asked.
        namespace: whose documents are asked; the folder's by default.
        where: which documents, besides ``--where``: a text as that takes, or a dict.
    """

    id: int | str
    text: str
    namespace: str | None = None
    where: str | dict[str, Any] | None = None

    @classmethod
    def of(cls, line: str, number: int) -> Question:
        """What a line says.

        Raises:
            ValueError: what is wrong with it.
        """
        from ragkv.retrieval.where import condition as checked

        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError("is no JSON object")
        if not isinstance(record.get("question"), str) or not record["question"].strip():
            raise ValueError('has no text under "question"')
        made = cls(
            record.pop("id", number), record.pop("question"), record.pop("namespace", None), record.pop("where", None)
        )
        if record:
            raise ValueError(f"has {', '.join(map(repr, record))}, and holds question, id, namespace and where only")
        if isinstance(made.id, bool) or not isinstance(made.id, int | str):
            raise ValueError(f"has an id that is no text and no whole number: {made.id!r:.40}")
        if not isinstance(made.namespace, str | None):
            raise ValueError(f"has a namespace that is no text: {made.namespace!r:.40}")
        if not isinstance(made.where, str | dict | None):
            raise ValueError(f"has a where that is no text and no object: {made.where!r:.40}")
        try:
            checked(made.condition or {})
        except (ValueError, RagKVError) as error:
            raise ValueError(f"has a bad where: {error}") from error
        return made

    @property
    def condition(self) -> dict[str, Any] | None:
        """``where`` as a dict."""
        return condition(self.where) if isinstance(self.where, str) else self.where

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the line of its answer; what was not given is left out."""
        optional = {"namespace": self.namespace, "where": self.where}
        said = {name: value for name, value in optional.items() if value is not None}
        return {"id": self.id, "question": self.text, **said}


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, blank lines left out.

    Raises:
        RagKVError: it is no text, holds no question, or some lines are none; the message names them.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RagKVError(f"{path} is no text in UTF-8: {error}") from error
    questions, numbers, wrong = list[Question](), dict[int | str, int](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = Question.of(line, number)
            if question.id in numbers:
                raise ValueError(f"has the id {question.id!r} of line {numbers[question.id]}")
        except ValueError as error:
            wrong.append(f"line {number} {error}")
        else:
            numbers[question.id] = number
            questions.append(question)
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise RagKVError(f'{path} must hold {{"question": "..."}} in each line: {"; ".join(wrong[:_NAMED])}{more}')
    if not questions:
        raise RagKVError(f"{path} holds no question")
    return questions


class Answers:
    """The file of answers. What a stopped run left there stays; questions that failed are open again.

    Args:
        path: made if it is not there.
        questions: all of them.

    Attributes:
        path: as given.
        open: questions without an answer.
        before: how many have one.

    Raises:
        RagKVError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, questions: Sequence[Question]):
        if path.is_dir() or not path.parent.is_dir():
            raise RagKVError(f"{path} cannot be written: it must name a file in a folder that is there")
        self.path: Path = path.resolve()
        self._settings = dict[str, Any]()
        self._asked = {question.id: question.as_dict() for question in questions}
        self._data = self.path.read_bytes() if self.path.exists() else b""
        self._lines, self._of = list[bytes](), list[dict[str, Any]]()
        done = set[int | str]()
        for number, line in enumerate(self._data.split(b"\n"), 1):
            record = self._record(line, number)
            if record is not None and "error" not in record and record["id"] not in done:
                done.add(record["id"])
                self._lines.append(line)
        self.open: list[Question] = [question for question in questions if question.id not in done]
        self.before: int = len(done)

    def begin(self, settings: dict[str, Any]) -> None:
        """Go on in the file with the answers of these settings; lines that are asked again leave it.

        Raises:
            RagKVError: it holds answers of other settings.
        """
        self._settings = json.loads(json.dumps(settings))
        for held in self._of:
            differ = [name for name in {**held, **self._settings} if held.get(name) != self._settings.get(name)]
            if differ:
                said = "; ".join(
                    f"{name}: {held.get(name)!r} there, {self._settings.get(name)!r} now" for name in differ
                )
                raise RagKVError(f"{self.path} holds answers of other settings ({said}): give another file with --out")
        kept = b"".join(line + b"\n" for line in self._lines)
        if kept != self._data:
            half = self.path.with_name(f"{self.path.name}.part")
            half.write_bytes(kept)
            os.replace(half, self.path)
        with self.path.open("ab"):
            pass  # what cannot be written is found out before anything is asked
        del self._lines, self._data, self._of

    def add(self, question: Question, line: dict[str, Any]) -> None:
        """Keep an answer, or why there is none; in the file before the call returns."""
        text = json.dumps({**question.as_dict(), **line, "settings": self._settings}, ensure_ascii=False)
        with self.path.open("ab") as file:
            file.write(text.encode("utf-8", "backslashreplace") + b"\n")  # a file's name need not be Unicode

    def _record(self, line: bytes, number: int) -> dict[str, Any] | None:
        """What a line of the file says; ``None`` where it was cut short, or is blank."""
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except ValueError:
            last = number == self._data.count(b"\n") + 1
            if last and (line.startswith(_BEGINS) or _BEGINS.startswith(line)):
                return None
            record = None
        try:
            asked = self._asked.get(record["id"])
            said = {name: record[name] for name in ("id", "question", "namespace", "where") if name in record}
            self._of.append(dict(record["settings"]))
        except (ValueError, TypeError, KeyError) as error:
            raise RagKVError(
                f"{self.path}, line {number} is no answer of 'ragkv ask --batch': give another file with --out"
            ) from error
        if said != asked:
            raise RagKVError(
                f"{self.path}, line {number} answers another question than those asked now, {said['id']!r}: "
                f"{said.get('question')!r:.80}; give another file with --out"
            )
        return dict(record)
