"""What workers ask for where the command runs: files, and whether others died of a document."""

from __future__ import annotations

from collections import Counter

#: Workers that may die while they read a document; then it is given up.
DEATHS = 3


class Desk:
    """One for all workers of a run."""

    def __init__(self) -> None:
        self._begun: Counter[bytes] = Counter()

    def read(self, path: str) -> bytes:
        """A whole file.

        Raises:
            DocumentError: it cannot be read.
        """
        from ragkv.retrieval.loaders import file_bytes  # torch comes with it, which is much for a count

        return file_bytes(path)

    def begin(self, document: bytes) -> int:
        """A worker begins to read a document; how many have begun and did not come to an end, this one among them."""
        self._begun[document] += 1
        return self._begun[document]

    def end(self, document: bytes) -> None:
        """A document is read, or given up: nobody died of it."""
        del self._begun[document]
