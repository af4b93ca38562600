"""A process that removes a document, and is killed behind each of its writes in turn. Run with a folder; prints a line of JSON for
each: what is there once the folder was opened again.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from rag_killed import _in_child
from rags import DOCUMENTS, QUESTION, open_rag, small_model

from ragkv.folder import Environment
from ragkv.store.maintenance import entries

TEXTS = dict(list(DOCUMENTS.items())[:2])
SOURCE = next(iter(TEXTS))


def _remove(folder, model, write):
    """Do it, and be killed when so many transactions are committed; to the end, where there are no more."""
    begin, left = Environment._writing, write

    @contextmanager
    def counted(environment, suspicious):
        nonlocal left
        with begin(environment, suspicious) as txn:
            yield txn
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    with open_rag(folder, model, paths=True) as rag:
        Environment._writing = counted
        rag.remove(SOURCE)
        Environment._writing = begin


def _kept(folder):
    return sorted(entry.key.hex() for entry in entries(folder / "kv"))


def _look(folder, model):
    with open_rag(folder, model, paths=True) as rag:
        left = {"wrong": rag.retriever.catalogue.check(), "kept": _kept(folder)}
        left["there"] = [document.source for document in rag.retriever.catalogue]
        left["found"] = [hit.source for hit in rag.ask(QUESTION, max_new_tokens=1, hybrid=True).sources]
    (folder / "left").write_text(json.dumps(left))


def _cut_short(folder, model):
    write, killed = 0, True

    def make():
        with open_rag(folder / "whole", model, paths=True) as rag:
            rag.add_texts(list(TEXTS.values()), list(TEXTS))
            rag.ask(QUESTION, max_new_tokens=1, method="full-prefill")

    if os.waitpid(_in_child(make), 0)[1]:
        sys.exit("there is nothing to remove")
    while killed:
        write += 1
        place = folder / str(write)
        shutil.copytree(folder / "whole", place)
        pid = _in_child(lambda place=place, write=write: _remove(place, model, write))
        status = os.waitpid(pid, 0)[1]
        killed = os.WIFSIGNALED(status)
        if status and not killed:
            sys.exit("it failed")
        if os.waitpid(_in_child(lambda place=place: _look(place, model)), 0)[1]:
            sys.exit("what is left cannot be used")
        print(json.dumps({"killed": killed, **json.loads((place / "left").read_text())}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _cut_short(Path(sys.argv[1]), small_model())
