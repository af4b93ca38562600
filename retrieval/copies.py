"""What lies beside a catalogue and is made of it: looking whether it is damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ragkv.errors import RecordError
from ragkv.retrieval.arrays import ArrayFile
from ragkv.retrieval.segments import SegmentedIndex
from ragkv.retrieval.words import WordIndex

INDEX_FILE, WORDS_FILE = "index.safetensors", "words.sqlite"


def damaged_copies(folder: Path) -> Iterator[tuple[Path, str]]:
    """The copies in a catalogue's folder that are damaged, and why; each may be deleted, and is made again then."""
    for file, check in ((folder / INDEX_FILE, _index), (folder / WORDS_FILE, lambda path: WordIndex(path).check())):
        if file.exists() and (wrong := check(file)):
            yield file, wrong


def _index(path: Path) -> str:
    """What is wrong with an index and its files, if anything is."""
    number = path.stat().st_ino
    try:
        index = SegmentedIndex(ArrayFile(path).shapes.get("vectors", (0, 0))[-1] or 1)
        index.load(path)
        index.check()
    except RecordError as error:
        # Where another process has put its own in the place, files of the former may be gone.
        return str(error) if not path.exists() or path.stat().st_ino == number else _index(path)
    return ""
