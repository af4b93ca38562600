"""``ragkv chat``: a conversation over the documents, of which nothing is computed twice."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ragkv.cli import show
from ragkv.cli.answers import answered, as_dict, show_sources
from ragkv.cli.arguments import folder
from ragkv.cli.opening import asking_options, open_rag
from ragkv.cli.searching import search_of
from ragkv.errors import RagKVError

if TYPE_CHECKING:
    from ragkv.finding import SourcedAnswer
    from ragkv.rag import RAG
    from ragkv.session import Session

_HELP = """/sources  where the last answer comes from
/new      begin another conversation
/quit     leave; so do the end of the input and Ctrl-C between two answers"""


def run(args: argparse.Namespace) -> int:
    """Answer line by line. A question that cannot be answered is said so, and the conversation goes on."""
    path = folder(args)
    options = asking_options(args, path)
    with open_rag(path, **options) as rag:
        talk = _Talk(rag, args)
        for line in _lines():
            if line in ("/quit", "/exit"):
                break
            talk.hear(line)
    return 1 if talk.failed else 0


class _Talk:
    """A conversation.

    Attributes:
        failed: some question was not answered.
    """

    def __init__(self, rag: RAG, args: argparse.Namespace):
        self._rag, self._args, self._search = rag, args, search_of(args, rag)
        self._last: SourcedAnswer | None = None
        self._session = self._begun()
        self.failed = False

    def hear(self, line: str) -> None:
        """One line of the user."""
        if line == "/new":
            self._session, self._last = self._begun(), None
        elif line == "/sources" and self._last is not None:
            show_sources(self._last)
        elif line.startswith("/"):
            show.hint("nothing was answered yet" if line == "/sources" else _HELP)
        elif line:
            self._ask(line)

    def _begun(self) -> Session:
        return self._rag.session(context_tokens=self._args.context_tokens)

    def _ask(self, question: str) -> None:
        try:
            self._last, milliseconds = answered(self._session.stream, question, self._args, self._search)
        except KeyboardInterrupt:
            show.hint("\nstopped: question and answer are no part of the conversation")
            return
        except RagKVError as error:
            self.failed = True
            show.hint(f"ragkv: {error}")
            return
        if self._args.json:
            show.as_json(as_dict(question, self._last, milliseconds), one_line=True)
        elif self._args.sources:
            show_sources(self._last)


def _lines() -> Iterator[str]:
    """What the user types, without blanks around it; the line is edited where this is a terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield from map(str.strip, sys.stdin or ())
        return
    try:
        import readline  # noqa: F401  (input() edits lines with it)
    except ImportError:
        pass  # not on every system
    show.hint("a question a line; /help says what else, Ctrl-D ends")
    while True:
        try:
            yield input(show.paint("> ", "bold")).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
