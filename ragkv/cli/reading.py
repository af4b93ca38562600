"""What is shown while the model reads: how much there is to do, a bar, and what is read again and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ragkv.cli import show
from ragkv.library.watching import Progress

#: So many documents that are read again are named.
_NAMED = 5
_AGAIN = {"missing": "its KV are not in the store", "neighbours": "other passages are nearest to it now"}


@contextmanager
def reading(args: argparse.Namespace, looking: str = "looking") -> Iterator[ReadingBar]:
    """Shows progress on stderr: lines and a bar on a terminal; elsewhere lines alone, and with ``--json`` nothing.

    ``--progress`` shows both wherever that is, ``--no-progress`` neither.

    Args:
        args: of the command.
        looking: what is done with documents before they are read here.
    """
    terminal = sys.stderr.isatty()
    lines, bar = (terminal or not args.json, terminal) if args.progress is None else (args.progress,) * 2
    shown = ReadingBar(lines=lines, bar=bar, looking=looking)
    try:
        yield shown
    finally:
        shown.close()


class ReadingBar:
    """Takes what a call tells of its progress; shows nothing before that.

    Args:
        lines: say how much is to be read, and which documents are read again.
        bar: show a bar.
        looking: what it says before anything is read.
    """

    def __init__(self, lines: bool, bar: bool, looking: str = "looking"):
        self._lines, self._shown, self._bar, self._looking = lines, bar, None, looking
        self._begun, self._again = False, set[str]()

    def __call__(self, progress: Progress) -> None:
        """One step."""
        bar = self._opened(progress.done_documents)
        bar.set_postfix_str(show.short(progress.source), refresh=False)
        if progress.reason == "found":
            bar.total, bar.n = progress.documents, progress.done_documents
            bar.refresh()
            return
        bar.total = progress.tokens
        if not self._begun:
            self._begun = True
            size = f", about {show.size(progress.kv_bytes)} of KV" if progress.kv_bytes else ""
            self._say(f"to read: {show.number(progress.tokens, 'token')}{size}")
            bar.set_description("reading", refresh=False)
            bar.unit, bar.initial = " tokens", 0
            bar.reset(total=progress.tokens)
        if progress.reason in _AGAIN and progress.source not in self._again:
            self._again.add(progress.source)
            if len(self._again) <= _NAMED:
                self._say(f"reading {show.short(progress.source)} again: {_AGAIN[progress.reason]}")
            elif len(self._again) == _NAMED + 1:
                self._say("... and others")
        bar.update(progress.done_tokens - bar.n)
        if progress.done_tokens == progress.tokens:
            bar.refresh()  # tqdm draws no step that follows another within its interval, the last one included

    def close(self) -> None:
        """The bar goes."""
        if self._bar is not None:
            self._bar.close()

    def _opened(self, done: int = 0) -> Any:
        if self._bar is None:  # what was done before it is there says nothing of the rate
            self._bar = show.progress(shown=self._shown, total=0, initial=done, unit=" documents", desc=self._looking)
        return self._bar

    def _say(self, text: str) -> None:
        if self._lines:
            self._opened().clear()
            show.hint(text)
