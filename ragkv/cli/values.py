"""What options may hold: parsers for argparse, which shows their messages as usage errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def at_least(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from ``least`` on."""

    def parsed(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return parsed


def count_option(
    options: argparse._ActionsContainer, name: str, summary: str, least: int = 1, default: int | None = None
) -> None:
    """Registers an option that is a whole number."""
    options.add_argument(name, type=at_least(least), default=default, metavar="N", help=summary)


def parsed(parse: Callable[[str], object]) -> Callable[[str], object]:
    """A parser of one argument whose message argparse shows."""

    def shown(text: str) -> object:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return shown


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share from 0 to 1, got {text!r}")
    return value


def folder_name(text: str) -> str:
    """What a folder is called: an empty one, of a variable that is not set say, is not the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}; the working folder is .")
    return text


def text_of_file(path: str) -> str:
    """What stands in a text file; not nothing."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{path!r} is no text file in UTF-8: {error}") from error
    if not text:
        raise argparse.ArgumentTypeError(f"{path!r} holds no text")
    return text


def schema_of_file(path: str) -> dict[str, Any]:
    """The JSON schema that stands in a file."""
    try:
        schema = json.loads(text_of_file(path))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path!r} is no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{path!r} must hold a JSON schema, an object")
    return schema


#: For the option that every command which reads documents takes.
FOREIGN_HELP = (
    "a text like your documents: each one is read a second time behind it, to see which of its tokens depend on what stands in "
    "front (default: five short English paragraphs; the bundled model brings its own)"
)
