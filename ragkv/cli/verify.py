"""``ragkv verify``: every record is read to its end and every checksum compared."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ragkv.cli import show
from ragkv.cli.arguments import folder
from ragkv.cli.entries import store_folder
from ragkv.errors import RagKVError, RecordError
from ragkv.folder import in_use, problems
from ragkv.retrieval import Catalogue
from ragkv.retrieval.copies import damaged_copies
from ragkv.retrieval.rescue import rescue
from ragkv.store.maintenance import repair, structure, verify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def run(args: argparse.Namespace) -> int:
    """Verify, and with ``--repair`` remove what is damaged; 1 where damage was found, repaired or not."""
    path = folder(args)
    place = store_folder(path)
    broken, saved = structure(place), None
    if broken and args.repair:
        saved = repair(place)
    documents, done = _documents(path / "documents", args.repair)
    if broken and saved is None:
        damaged, checked, read, dropped = [], 0, 0, 0
    else:
        with show.progress(unit=" records") as bar:
            verdict = verify(place, drop=args.repair, progress=lambda done, total: bar.update())
        damaged, checked, read, dropped = verdict.damaged, verdict.checked, verdict.bytes_read, verdict.dropped
    found = len(damaged) + len(broken) + len(documents)
    if args.json:
        show.as_json(
            {
                "path": str(path),
                "checked": checked,
                "bytes_read": read,
                "damaged": [{"id": key.hex(), "reason": reason} for key, reason in damaged],
                "dropped": dropped,
                "structure": broken,
                "saved": saved,
                "documents": documents,
                "repaired": done,
            }
        )
    else:
        for key, reason in damaged:
            print(f"{key.hex()[:12]}  {reason}")
        for problem in broken:
            print(f"the file: {problem}")
        for text in (*documents, *done):
            print(f"documents: {text}")
        print(f"{show.number(checked, 'record')}, {show.size(read)} read: {_verdict(found, args.repair)}")
        if found and not args.repair:
            show.hint("ragkv: 'ragkv verify --repair' removes what is damaged; it is read again when it is asked for")
    return 1 if found else 0


def _verdict(damaged: int, repaired: bool) -> str:
    if not damaged:
        return "nothing is damaged"
    return f"{damaged:,} damaged{', removed' if repaired else ''}"


def _documents(place: Path, repair: bool) -> tuple[list[str], list[str]]:
    """What is wrong with the documents and what was made of them, and what was done about it; a line each."""
    if not place.is_dir():
        return [], []
    found, done = [f"the file: {problem}" for problem in _structure(place)], []
    if found and not repair:
        return found, []
    if found:
        done.append(f"{show.number(rescue(place), 'value')} saved into a new file")
    with Catalogue(place) as catalogue:
        wrong = catalogue.check()
        if wrong and repair:
            done += _repaired(catalogue)
        for file, reason in () if catalogue.readonly else damaged_copies(place):
            wrong.append(f"{file.name}: {reason}")
            if repair:
                file.unlink()
                done.append(f"{file.name}: removed, it is made again when it is needed")
    return found + wrong, done


def _structure(place: Path) -> list[str]:
    """What is wrong with the file's own pages."""
    found = problems(place)
    if found and in_use(place):  # somebody may have written meanwhile
        with suppress(RecordError), Catalogue(place) as catalogue:
            return catalogue.structure()
    return found


def _repaired(catalogue: Catalogue) -> list[str]:
    try:
        return catalogue.repair(lambda texts: _vectors(catalogue, texts)) + catalogue.check()
    except RagKVError as error:
        return [f"nothing was repaired: {error}"]


def _vectors(catalogue: Catalogue, texts: list[str]) -> NDArray[np.float32]:
    """The vectors of texts, by the embedder that the folder was made with."""
    from ragkv.model.loading import load_embedder
    from ragkv.retrieval import offline_embedder

    embedder = load_embedder(catalogue.defaults.get("embedder")) or offline_embedder()
    catalogue.require("embedder", embedder.fingerprint, embedder.name)
    return embedder.encode_documents(texts)
