"""Raw rows on disk, one JSON object a line, and the settings of the run that they belong to."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from ragkv.evaluation.errors import EvaluationError

Row = dict[str, Any]
# What is no Unicode, as a file's name may be, becomes an escape that JSON reads back.
_ESCAPED = "backslashreplace"


class Rows:
    """The rows of one run, kept in a folder. A stopped run goes on where it was.

    Args:
        folder: made if it is not there.
        settings: what every row of the run has in common.

    Raises:
        EvaluationError: the folder holds rows of other settings, or cannot be read.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "rows.jsonl"
        self._agree(folder / "settings.json", settings)
        self._kept: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)  # by case and order: by arm
        self._load()

    def of(self, case: str, order: int) -> dict[str, Row]:
        """The rows of one case in one order of its chunks, by arm."""
        return self._kept.get((case, order), {})

    def all(self) -> list[Row]:
        """Every row so far."""
        return [row for held in self._kept.values() for row in held.values()]

    def add(self, row: Row) -> None:
        """Keep a row, on disk before the call returns."""
        with self._path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._keep(row)

    def _keep(self, row: Row) -> None:
        self._kept[row["case"], row["order"]][row["arm"]] = row

    def _agree(self, path: Path, settings: dict[str, Any]) -> None:
        wanted = json.loads(json.dumps(settings))
        if not path.exists():
            if self._path.exists():
                raise EvaluationError(f"{self._path} is there without {path.name}: give another folder with --out")
            write_json(path, wanted)
            return
        try:
            held = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise EvaluationError(f"{path} is damaged: {error}") from error
        differ = [name for name in {**held, **wanted} if held.get(name) != wanted.get(name)]
        if differ:
            changes = "; ".join(f"{name}: {held.get(name)!r} there, {wanted.get(name)!r} now" for name in differ)
            raise EvaluationError(
                f"{path.parent} holds a run of other settings ({changes}): give another folder with --out, or remove it"
            )

    def _load(self) -> None:
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # stopped while a row was being written
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines()):
            try:
                self._keep(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{self._path}, line {number + 1} is no row of an evaluation: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    half = path.with_suffix(".part")
    half.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors=_ESCAPED)
    os.replace(half, path)
