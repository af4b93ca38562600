"""How things are shown: results on stdout, hints and progress on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ragkv.amounts import milliseconds as milliseconds  # for the commands
from ragkv.amounts import number as number
from ragkv.amounts import size as size

if TYPE_CHECKING:
    from ragkv.retrieval import SkippedFile

Item = TypeVar("Item")

_COLOURS = {"green": "32", "red": "31", "bold": "1", "dim": "2"}


def as_json(value: dict[str, Any], *, one_line: bool = False) -> None:
    """Print one JSON object, at once."""
    indent = None if one_line else 2
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # of another encoding, or a file's name that is no Unicode
        text = json.dumps(value, indent=indent)
    print(text, flush=True)


def hint(text: str) -> None:
    """Say something that is not the result."""
    print(text, file=sys.stderr)


def confirmed(question: str) -> bool:
    """Ask on stderr; no where nobody can be asked."""
    if sys.stdin is None or not sys.stdin.isatty():
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def paint(text: str, colour: str) -> str:
    """Coloured text on a terminal that wants it, the text itself elsewhere (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"\033[{_COLOURS[colour]}m{text}\033[0m"


def progress(items: Iterable[Item] | None = None, shown: bool | None = None, **options: Any) -> Any:
    """A tqdm bar on stderr; silent where stderr is no terminal, unless told otherwise."""
    from tqdm import tqdm

    disable = None if shown is None else not shown
    return tqdm(items, file=sys.stderr, disable=disable, leave=False, dynamic_ncols=True, **options)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows in columns, the first ones to the left and numbers to the right; what a terminal would obey is not."""
    from rich.cells import cell_len

    shown = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [cell + gap if at < left else gap + cell for at, (cell, gap) in enumerate(zip(row, gaps, strict=True))]
        print("  ".join(cells).rstrip())


def documents(counts: dict[str, int], hidden: int) -> str:
    """What became of documents, kind by kind, and what was not looked at."""
    said = f"documents: {', '.join(f'{count} {kind}' for kind, count in counts.items() if count) or 'none'}"
    return f"{said} ({number(hidden, 'hidden one')} left out)" if hidden else said


def skipped(files: Iterable[SkippedFile]) -> None:
    """Say which files could not be read, and why."""
    for file in files:
        hint(f"skipped {short(file.source)}: {file.reason}")


def kv(sizes: dict[str, int]) -> str:
    """What KV take where they are kept, behind a list: ``; 1.5 MiB of KV on disk``; what is in memory besides is a copy."""
    if not sizes:
        return ""
    return f"; {size(sizes['disk'])} of KV on disk" if "disk" in sizes else f"; {size(sizes['cpu'])} of KV in memory"


def duration(seconds: float) -> str:
    """A long time for people: ``5 s``, ``3 min``, ``2 h``, ``9 d``."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def plain(text: str) -> str:
    """A text in one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def short(source: str) -> str:
    """A file below the working folder by its relative path, anything else as it is; as :func:`plain` text."""
    path = Path(source)
    below = path.is_absolute() and path.is_relative_to(Path.cwd())
    return plain(str(path.relative_to(Path.cwd())) if below else source)
